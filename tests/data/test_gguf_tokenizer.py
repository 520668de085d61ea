"""Tokenizers rebuilt from GGUF metadata.

Truth: a byte-pair encoder of twenty lines written here, over the published word patterns and the `regex`
package; transformers' own classes of the families; and ids worked out by hand.
"""

from __future__ import annotations

import json
import unicodedata
from itertools import pairwise

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, trainers

from sateen.data.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_metadata
from sateen.data.tokenizer import Tokenizer
from sateen.errors import CheckpointError, ConfigError

regex = pytest.importorskip("regex", reason="needs the regex package, which transformers brings")

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TRICKY = [
    "", " ", "   ", "a", " a", "a ", "It's 12345 dogs' DON'T we'll", "'S 'RE '  'll", "!!!???\n\n.",
    "  two  spaces\n\n\n and\r\nlines\t\ttabs \n", "x=1;y=-3.14e10**2 != 0x1F", "f(x):\n    return x\n\n\n",
    "½ Ⅷ ٣٤٥ 七百 1234567", "naïve cafe\u0301 \uff21 \ufb01", "日本語のテキスト、中文。", "a" * 300,
    "\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301\u0301", "\u200b\ufeff\xa0\u2003end",
    "\x00\x07\x7f", "<|im_start|>user\nhi<|im_end|>",
]  # fmt: skip
TEXT = [
    "It's the 1st of 12345 dogs; we'll see what it returns. return x\n    def f(x): the the café naïve",
    "and the other lines, 日本語のテキスト 1234 12 34 end of the text <tool> don't DON'T",
]


def byte_letters():
    """GPT-2's letter for each byte: printable Latin-1 stands for itself, the others from U+0100 upwards."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


LETTERS = byte_letters()


@pytest.fixture(scope="module")
def trained():
    """Tokens and merges of a small byte-level vocabulary."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(LETTERS.values())
    raw.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    vocab = raw.get_vocab()
    merges = [tuple(pair) for pair in json.loads(raw.to_str())["model"]["merges"]]
    return sorted(vocab, key=vocab.get), merges


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<think>", "<pad0>", "<pad1>"]


def metadata(trained, pre="gpt-2", **more):
    tokens, merges = trained
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": (*SPECIALS, *tokens, *ADDED),
        "tokenizer.ggml.token_type": (3, 3, 3, *[1] * len(tokens), 4, 5, 5),
        "tokenizer.ggml.merges": tuple(" ".join(pair) for pair in merges),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
    } | more


def words(text, pre):
    if pre == "qwen2":
        return regex.findall(QWEN, unicodedata.normalize("NFC", text))
    if pre == "llama-bpe":
        return regex.findall(LLAMA3, text)
    pieces = regex.split(r"(\p{N})", text) if pre == "smollm" else [text]
    return [word for piece in pieces for word in regex.findall(GPT2, piece)]


def encode(text, pre, trained):
    """Byte-pair encoding by its definition: of all neighbours the earliest merge, leftmost first."""
    tokens, merges = trained
    rank = {pair: i for i, pair in enumerate(merges)}
    ids = {token: i + len(SPECIALS) for i, token in enumerate(tokens)}
    found = []
    for word in words(text, pre):
        parts = [LETTERS[b] for b in word.encode()]
        if pre == "llama-bpe" and "".join(parts) in ids:
            parts = ["".join(parts)]
        while True:
            pairs = [(rank[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in rank]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = ["".join(parts[i : i + 2])]
        found += [ids[part] for part in parts]
    return found


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_ids_are_those_of_the_definition(pre, trained):
    tokenizer = tokenizer_from_metadata(metadata(trained, pre), origin="x.gguf")
    for text in TRICKY + TEXT:
        ids = tokenizer.encode(text)
        assert ids == encode(text, pre, trained), repr(text)
        same = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        assert tokenizer.decode(ids) == same


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_ids_are_those_of_the_family_in_transformers(pre, name, trained):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    tokens, merges = trained
    vocab = {token: i for i, token in enumerate([*SPECIALS, *tokens])}
    theirs = getattr(transformers, name)(vocab=vocab, merges=merges)
    ours = tokenizer_from_metadata(metadata(trained, pre), origin="x.gguf")
    for text in TRICKY[:-1] + TEXT:  # theirs reads special tokens in texts
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)


@pytest.mark.parametrize(
    ("pre", "text", "cut"),
    [
        ("gpt-2", "It's 12345 ok\n\n x", ["It", "'s", "Ġ12345", "Ġok", "Ċ", "Ċ", "Ġx"]),
        ("smollm", "It's 123 ok", ["It", "'s", "Ġ", "1", "2", "3", "Ġok"]),
        ("llama-bpe", "IT'S 12345 ok\n\n x", ["IT", "'S", "Ġ", "123", "45", "Ġok", "ĊĊ", "Ġx"]),
        ("qwen2", "IT'S 12 ok!\n\n x", ["IT", "'S", "Ġ", "1", "2", "Ġok", "!ĊĊ", "Ġx"]),
    ],
)
def test_words_are_cut_as_worked_by_hand(pre, text, cut, trained):
    """A vocabulary in which every word is a token shows where the words end."""
    letters = list(LETTERS.values())
    whole = [word for word in cut if len(word) > 1]
    chains = [(word[:i], word[i]) for word in whole for i in range(1, len(word))]
    grown = [left + right for left, right in chains]
    tokens = list(dict.fromkeys([*letters, *grown]))
    spec = metadata((tokens, list(dict.fromkeys(chains))), pre)
    ours = tokenizer_from_metadata(spec, origin="x.gguf")
    assert [spec["tokenizer.ggml.tokens"][i] for i in ours.encode(text)] == cut


def test_llama3_prefers_whole_tokens_to_merges(trained):
    tokens, merges = trained
    lone = "xqxq"  # a token that no merge makes
    assert lone not in tokens
    grown = ([*tokens, lone], merges)
    index = len(SPECIALS) + len(tokens)
    assert tokenizer_from_metadata(metadata(grown, "llama-bpe"), origin="x").encode(lone) == [index]
    assert index not in tokenizer_from_metadata(metadata(grown, "gpt-2"), origin="x").encode(lone)


def test_special_tokens_have_their_types(trained):
    ours = tokenizer_from_metadata(metadata(trained), origin="x.gguf")
    size = len(trained[0])
    assert ours.special_ids == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert ours.config["pad_token"] == "<|endoftext|>"
    assert 2 not in ours.encode("<|im_end|>")  # the text of a control token stays text
    assert ours.encode("<think>") == [size + 3]  # a user-defined token is part of the text
    assert ours.vocab_size == size + 4  # unused ids behind it are padding
    assert ours.decode([2, size + 3], skip_special=True) == "<think>"


def test_added_tokens_are_found_before_text_is_composed(trained):
    tokens, merges = trained
    spec = metadata((tokens, merges), "qwen2")
    lone = "<cafe\u0301>"
    spec["tokenizer.ggml.tokens"] = (*SPECIALS, *tokens, lone, *ADDED[1:])
    ours = tokenizer_from_metadata(spec, origin="x.gguf")
    assert ours.encode(lone) == [len(SPECIALS) + len(tokens)]
    assert ours.encode("<caf\xe9>") == encode("<caf\xe9>", "qwen2", trained)


def test_a_template_is_carried(trained):
    source = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    plain = tokenizer_from_metadata(metadata(trained, **{"tokenizer.chat_template": source}), origin="x.gguf")
    ids = plain.apply_chat_template([{"role": "user", "content": "the <|im_end|>"}])
    pieces = [encode(text, "gpt-2", trained) for text in ("user\nthe ", "<|im_end|>", "\n")]
    want = [1, *pieces[0], *pieces[1], 2, *pieces[2]]
    assert plain.decode(ids) == "<|im_start|>user\nthe <|im_end|><|im_end|>\n"
    assert ids == want
    several = {"tokenizer.chat_template": source, "tokenizer.chat_template.tool_use": "tools"}
    assert tokenizer_from_metadata(metadata(trained, **several), origin="x").config["chat_template"] == [
        {"name": "default", "template": source},
        {"name": "tool_use", "template": "tools"},
    ]


@pytest.mark.parametrize(
    ("more", "around"),
    [
        ({}, ([], [])),
        ({"tokenizer.ggml.add_bos_token": True}, ([1], [])),
        ({"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}, ([1], [2])),
        ({"tokenizer.ggml.pre": "llama-bpe"}, ([1], [])),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, ([], [])),
    ],
)
def test_a_saved_tokenizer_is_an_ordinary_one(more, around, trained, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    ours = tokenizer_from_metadata(metadata(trained, **more), origin="x.gguf")
    ours.save(tmp_path)
    again, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TRICKY:
        assert again.encode(text) == ours.encode(text)
        if "<|" not in text:
            assert theirs(text)["input_ids"] == [*around[0], *ours.encode(text), *around[1]]
    assert again.fingerprint == ours.fingerprint
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tokenizer.ggml.model": "llama"}, r"'llama'; accepted: 'gpt2' \(byte-level BPE\)"),
        ({"tokenizer.ggml.pre": "qwen-2"}, r"'qwen-2'; did you mean qwen2\? \(known: gpt-2, llama-bpe"),
        ({"tokenizer.ggml.pre": "default"}, "unknown tokenizer.ggml.pre 'default'"),
        ({"tokenizer.ggml.token_type": (1, 1)}, r"\d+ tokens with 2 types"),
        ({"tokenizer.ggml.merges": ("a b c",)}, "the merge 'a b c' is not two tokens"),
        ({"tokenizer.ggml.merges": ("ab cd",)}, "do not fit together"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "eos_token_id is 9999; accepted: 0 to"),
        (
            {"tokenizer.ggml.tokens": ("a", "a"), "tokenizer.ggml.token_type": (1, 1)},
            "the token 'a' has two ids",
        ),
    ],
)
def test_metadata_that_are_refused(more, words, trained):
    with pytest.raises((ConfigError, CheckpointError), match=words) as caught:
        tokenizer_from_metadata(metadata(trained, **more), origin="x.gguf")
    assert str(caught.value).startswith("x.gguf: ")


def test_every_known_word_makes_a_tokenizer(trained):
    for pre in PRE_TOKENIZERS:
        ours = tokenizer_from_metadata(metadata(trained, pre), origin="x.gguf")
        assert ours.decode(ours.encode(TEXT[0])) == TEXT[0]
