"""A `Tokenizer` from the metadata of a GGUF file: byte-level BPE with its special tokens and chat template.

The metadata name the pre-tokenizer by a word; this file knows what the words stand for. Reading files is the
checkpoint room's part. Keys: the page on GGUF in the ggml repository; words: llama.cpp's vocabulary code and
the published tokenizer.json of each family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from sateen.data.tokenizer import Tokenizer
from sateen.errors import CheckpointError, ConfigError, unknown_name

_NAMED = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
}
_TEMPLATE = "tokenizer.chat_template"
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # tokenizer.ggml.token_type; the others are ordinary tokens
_GPT4_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words before merging.

    Attributes:
        pattern: the words; GPT-2's when None.
        is_digitwise: every digit stands alone, before the pattern is applied.
        is_nfc: text is composed first (Unicode's form NFC).
        prefers_whole: a word that is a token is that token, whatever the merges give.
        adds_bos: what happens when the metadata do not say.
    """

    pattern: str | None = None
    is_digitwise: bool = False
    is_nfc: bool = False
    prefers_whole: bool = False
    adds_bos: bool = False


_LLAMA3 = PreTokenizer(_GPT4_WORDS % "{1,3}", prefers_whole=True, adds_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(is_digitwise=True),
    "starcoder": PreTokenizer(is_digitwise=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    # llama.cpp does not compose; the published tokenizer.json does, and models were trained with that.
    "qwen2": PreTokenizer(_GPT4_WORDS % "", is_nfc=True),
}


def tokenizer_from_metadata(metadata: Mapping[str, Any], *, origin: str) -> Tokenizer:
    """The tokenizer that `tokenizer.*` keys describe.

    Args:
        metadata: keys and values of the file.
        origin: where they came from, for messages.

    Raises:
        ConfigError: another model than byte-level BPE, or a pre-tokenizer we do not know.
        CheckpointError: keys are missing or do not fit together.
    """
    model = str(metadata.get("tokenizer.ggml.model"))
    if model != "gpt2":
        raise ConfigError(
            f"{origin}: tokenizer.ggml.model is {model!r}; accepted: 'gpt2' (byte-level BPE); bring your own"
        )
    word = str(metadata.get("tokenizer.ggml.pre", "none given"))
    if word not in PRE_TOKENIZERS:
        raise ConfigError(f"{origin}: {unknown_name('tokenizer.ggml.pre', word, PRE_TOKENIZERS)}")
    pre = PRE_TOKENIZERS[word]
    tokens, types = _tokens(metadata, origin)
    raw = _bpe(tokens, types, _merges(metadata, origin), pre, origin)
    names = {name: _named(metadata, key, tokens, origin) for name, key in _NAMED.items()}
    adds_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", pre.adds_bos)) and names["bos"] is not None
    adds_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and names["eos"] is not None
    raw.post_processor = _post_processor(raw, names, adds_bos, adds_eos)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in names.items() if token is not None},
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
    }
    if (template := _template(metadata)) is not None:
        config["chat_template"] = template
    return Tokenizer(raw, config)


def _tokens(metadata: Mapping[str, Any], origin: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The tokens by id and their types."""
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", (1,) * len(tokens))
    if not tokens or len(types) != len(tokens):
        raise CheckpointError(
            f"{origin}: {len(tokens)} tokens with {len(types)} types; a tokenizer has one type per token"
        )
    used = Counter(token for token, kind in zip(tokens, types, strict=True) if kind != _UNUSED)
    ((most, count),) = used.most_common(1) or [("", 1)]
    if count > 1:
        raise CheckpointError(f"{origin}: the token {most!r} has two ids; convert the model again")
    return tokens, types


def _merges(metadata: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges", ()):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise CheckpointError(f"{origin}: the merge {merge!r} is not two tokens and a space between them")
        merges.append((left, right))
    return merges


def _bpe(
    tokens: tuple[str, ...],
    types: tuple[int, ...],
    merges: list[tuple[str, str]],
    pre: PreTokenizer,
    origin: str,
) -> RawTokenizer:
    # Ids of unused tokens are padding of the embedding; nothing is written with them.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    try:
        model = models.BPE(vocab, merges, ignore_merges=pre.prefers_whole)
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{origin}: its vocabulary and merges do not fit together ({error})") from None
    raw = RawTokenizer(model)
    if pre.is_nfc:
        raw.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.is_digitwise else []
    if pre.pattern is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    raw.pre_tokenizer = pre_tokenizers.Sequence(steps)
    raw.decoder = decoders.ByteLevel()
    for kind, is_special in ((_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, found in zip(tokens, types, strict=True) if found == kind]
        raw.add_tokens([AddedToken(token, special=is_special, normalized=False) for token in added])
    return raw


def _named(metadata: Mapping[str, Any], key: str, tokens: tuple[str, ...], origin: str) -> str | None:
    """The string of the token that a key names by id."""
    if key not in metadata:
        return None
    index = int(metadata[key])
    if not 0 <= index < len(tokens):
        raise CheckpointError(f"{origin}: {key} is {index}; accepted: 0 to {len(tokens) - 1}")
    return tokens[index]


def _post_processor(raw: RawTokenizer, names: Mapping[str, str | None], bos: bool, eos: bool) -> Any:
    """What `encode` of other libraries adds around a text; ours adds nothing unless asked."""
    before, after = ([str(names[name])] * is_on for name, is_on in (("bos", bos), ("eos", eos)))
    if not before + after:
        return processors.ByteLevel(trim_offsets=False)
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        special_tokens=[(token, raw.token_to_id(token)) for token in dict.fromkeys(before + after)],
    )


def _template(metadata: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template, or all of them where the file has several, as tokenizer_config.json writes them."""
    plain = metadata.get(_TEMPLATE)
    named = {
        key.removeprefix(f"{_TEMPLATE}."): str(value)
        for key, value in metadata.items()
        if key.startswith(f"{_TEMPLATE}.")
    }
    if not named:
        return None if plain is None else str(plain)
    every = ({} if plain is None else {"default": str(plain)}) | named
    return [{"name": name, "template": template} for name, template in every.items()]
