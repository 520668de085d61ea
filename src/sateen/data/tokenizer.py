"""Text to token ids and back: byte-level BPE in Hugging Face's files.

`Tokenizer` wraps the `tokenizers` library: it trains small vocabularies for the demo and loads the ones that
checkpoints bring. Plain text never becomes a special token; only chat templates and `token_id` make those.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as RawTokenizer

from sateen.data.bpe import BYTES, train_bpe
from sateen.data.template import CHATML, ChatTemplate, Message
from sateen.errors import CheckpointError, ConfigError, unknown_name

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
CHATML_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A vocabulary with its merges, special tokens and chat template.

    Attributes:
        config: the contents of `tokenizer_config.json`, kept as they were read.
    """

    def __init__(self, raw: RawTokenizer, config: dict[str, Any]):
        # The text of a special token is encoded as text; `_with_specials` serves rendered templates.
        raw.encode_special_tokens = True
        self._raw = raw
        self.config = config

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = CHATML_TOKENS
    ) -> Tokenizer:
        """A byte-level BPE tokenizer of these texts: every byte has a token and every digit stands alone.

        Args:
            texts: the training text; the result depends on nothing else.
            vocab_size: all tokens, the special ones and the 256 bytes included.
            special_tokens: take the first ids; must hold the ChatML tokens, because the template uses them.

        Raises:
            ConfigError: no room for the bytes, a missing ChatML token, or too little text for the vocabulary.
        """
        missing = [token for token in CHATML_TOKENS if token not in special_tokens]
        if missing:
            raise ConfigError(f"the chat template needs {', '.join(missing)}; add them to special_tokens")
        raw = train_bpe(texts, vocab_size, special_tokens)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        }
        return cls(raw, config)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a model directory.

        Raises:
            CheckpointError: `tokenizer.json` or `tokenizer_config.json` is missing or cannot be read.
        """
        folder = Path(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}; a model directory needs one to read text")
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            raw = RawTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(f"{folder}: its tokenizer files cannot be read: {error}") from error
        separate = folder / "chat_template.jinja"
        if separate.is_file():
            config["chat_template"] = separate.read_text(encoding="utf-8")
        return cls(raw, config)

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into a folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        # A template file would win over the configuration's own when the folder is read again.
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        special_map = {name: self.config[name] for name in _NAMED if self.config.get(name) is not None}
        _write(folder / "tokenizer.json", self._raw.to_str(pretty=True))
        _write(folder / "tokenizer_config.json", json.dumps(self.config, indent=2, ensure_ascii=False))
        _write(folder / "special_tokens_map.json", json.dumps(special_map, indent=2, ensure_ascii=False))

    def to_json(self) -> str:
        """The contents of `tokenizer.json`."""
        return str(self._raw.to_str())

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._raw.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """The special tokens and their ids, by id."""
        added = self._raw.get_added_tokens_decoder()
        return {token.content: i for i, token in sorted(added.items()) if token.special}

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of the vocabulary, merges and rules; token files carry it."""
        return hashlib.sha256(self._raw.to_str().encode()).hexdigest()

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each token id stands for [vocab_size]; 0 for special tokens and unused ids.

        Raises:
            ConfigError: the vocabulary is not byte-level, so its strings do not show their bytes.
        """
        if not self._is_byte_level:
            raise ConfigError("bytes per token need a byte-level vocabulary; this one has another decoder")
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._raw.get_vocab(with_added_tokens=False).items():
            sizes[i] = len(token)  # a byte-level vocabulary writes one character per byte
        for i, added in self._raw.get_added_tokens_decoder().items():
            sizes[i] = 0 if added.special else len(added.content.encode())
        return sizes

    def token_text(self, token: int) -> bytes:
        """The bytes that one token stands for; a special token's own string, nothing for an unused id."""
        added = self._raw.get_added_tokens_decoder().get(token)
        if added is not None:
            return str(added.content).encode()
        written = self._raw.id_to_token(token)
        if written is None:
            return b""
        if self._is_byte_level and BYTES.keys() >= set(written):
            return bytes(BYTES[c] for c in written)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", written)
        return bytes.fromhex(byte[1]) if byte else str(self._raw.decode([token])).encode()

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self._raw.to_str())["decoder"])

    @property
    def eos_id(self) -> int:
        """The id of the `eos_token` that the configuration names."""
        return self._named_id("eos_token")

    @property
    def bos_id(self) -> int | None:
        """The id of the `bos_token`, or None when the configuration names none."""
        return None if self.config.get("bos_token") is None else self._named_id("bos_token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a generation: `eos_token`, and ChatML's ends where the vocabulary has them."""
        ends = [self.special_ids[token] for token in (TURN_END, END_OF_TEXT) if token in self.special_ids]
        return tuple(sorted({self.eos_id, *ends}))

    def token_id(self, token: str) -> int:
        """The id of a token by its exact string, special or not.

        Raises:
            ConfigError: no such token.
        """
        found = self._raw.token_to_id(token)
        if found is None:
            raise ConfigError(unknown_name("token", token, self.special_ids))
        return int(found)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; nothing is added, and the text of a special token stays text."""
        return list(self._raw.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        encodings = self._raw.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of these ids; bytes that are not UTF-8 become U+FFFD."""
        return str(self._raw.decode(list(ids), skip_special_tokens=skip_special))

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of `tokenizer_config.json`.

        Raises:
            ConfigError: there is none, or it does not parse.
        """
        source = self.config.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise ConfigError("tokenizer_config.json has no chat_template; use plain prompts")
        return ChatTemplate(source, list(self.special_ids))

    def render_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        *,
        is_escaped: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as text; with `is_escaped`, as `encode_rendered` wants it.

        Args:
            messages: dictionaries with `role` and `content`, and whatever else the template reads.
            add_generation_prompt: end with the header of an assistant turn.
            is_escaped: mark special tokens' strings in contents, so that they are encoded as text.
            variables: further names that the template reads, for example `tools` or `enable_thinking`.
        """
        named = {name: _content(self.config.get(name)) or "" for name in _NAMED}
        variables = {**named, "add_generation_prompt": add_generation_prompt, **variables}
        return self.template.render(messages, variables, is_escaped=is_escaped)

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of an escaped rendering: the template's special tokens are tokens, contents' are text."""
        ids: list[int] = []
        for piece, may_be_special in self.template.split_rendered(text):
            raw = self._with_specials if may_be_special else self._raw
            # The batch call lets other threads run meanwhile, which the plain one does not.
            (encoding,) = raw.encode_batch_fast([piece], add_special_tokens=False)
            ids.extend(encoding.ids)
        return ids

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any
    ) -> list[int]:
        """The ids of a conversation; see `render_chat` for the arguments."""
        text = self.render_chat(messages, add_generation_prompt, is_escaped=True, **variables)
        return self.encode_rendered(text)

    @cached_property
    def _with_specials(self) -> RawTokenizer:
        # A second tokenizer, because the switch is a state and servers encode from several threads.
        twin = RawTokenizer.from_str(self._raw.to_str())
        twin.encode_special_tokens = False
        return twin

    def _named_id(self, name: str) -> int:
        token = _content(self.config.get(name))
        if token is None:
            raise ConfigError(f"tokenizer_config.json names no {name}; add it")
        return self.token_id(token)


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Nothing, when the model has a row for every token of the tokenizer; rows beyond them are padding.

    Raises:
        ConfigError: the tokenizer has more tokens than the model's `vocab_size`.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model's vocab_size is {vocab_size}; "
            "use the model's own tokenizer or resize its embedding"
        )


def _content(token: Any) -> str | None:
    """A special token's string; configurations write it plainly or as a dictionary."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
