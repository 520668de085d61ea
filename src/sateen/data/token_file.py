"""Token ids of many documents on disk, mapped into memory when read.

A token file is a folder: `tokens.bin` (little-endian uint16 or uint32), `offsets.bin` (int64, where each
document starts, then the end), `meta.json` and, where not every token is trained to be predicted,
`targets.bin` (uint8, 1 for those that are).
`write_tokens` makes one, `TokenFile` reads one, `loader.Loader` mixes several.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sateen.data.text import Document
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError

_VERSION = 1
_BATCH = 256


@dataclass(frozen=True)
class TokenDocument:
    """The tokens of one document.

    Attributes:
        input_ids: its tokens.
        is_target: for each token whether it is trained to be predicted; None trains all.
    """

    input_ids: Sequence[int]
    is_target: Sequence[bool] | None = None


class TokenFile:
    """A token file opened for reading; nothing is loaded before it is used.

    Attributes:
        path: the folder.
        tokens: uint16 or uint32 [num_tokens].
        offsets: int64 [num_documents + 1].
        targets: uint8 [num_tokens], or None when every token is a target.
        tokenizer_sha256: fingerprint of the tokenizer that made the ids.
    """

    def __init__(self, path: str | Path):
        """Opens a folder that `write_tokens` made.

        Raises:
            ConfigError: not a token file, of another version, or of sizes that its meta.json does not give.
        """
        self.path = Path(path)
        try:
            meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ConfigError(f"{self.path} is not a token file: {error}; write it again") from error
        if meta.get("version") != _VERSION:
            raise ConfigError(f"{self.path} has version {meta.get('version')}, not {_VERSION}; rewrite it")
        self.tokenizer_sha256: str = meta["tokenizer_sha256"]
        num_tokens, num_documents = meta["num_tokens"], meta["num_documents"]
        self.tokens = self._map("tokens.bin", np.dtype(meta["dtype"]), num_tokens)
        self.offsets = self._map("offsets.bin", np.dtype("<i8"), num_documents + 1)
        self.targets = self._map("targets.bin", np.dtype("u1"), num_tokens) if meta["has_targets"] else None

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.size)

    @property
    def num_documents(self) -> int:
        return int(self.offsets.size) - 1

    def document(self, index: int) -> NDArray[np.int64]:
        """The tokens of one document."""
        start, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.tokens[start:end].astype(np.int64)

    def _map(self, name: str, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
        file = self.path / name
        found = file.stat().st_size if file.is_file() else -1
        if found != size * dtype.itemsize:
            raise ConfigError(f"{file} has {found} bytes, not {size * dtype.itemsize}; rewrite it")
        return np.memmap(file, dtype=dtype, mode="r", shape=(size,))


def write_tokens(
    path: str | Path, documents: Iterable[TokenDocument], *, vocab_size: int, tokenizer_sha256: str
) -> TokenFile:
    """Writes a token file and opens it; an interrupted call leaves no folder of that name.

    Args:
        path: the folder to make; an older token file of that name is replaced.
        documents: read once, in order; empty ones are left out.
        vocab_size: ids are below it; 65,536 or less gives two bytes per token.
        tokenizer_sha256: `Tokenizer.fingerprint`.

    Raises:
        ConfigError: no documents, a token outside the vocabulary, or a mask of another length.
    """
    target = Path(path)
    if target.exists() and not (target / "meta.json").is_file():
        raise ConfigError(f"{target} exists and is not a token file; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        offsets = [0]
        is_masked = False
        with (work / "tokens.bin").open("wb") as tokens, (work / "targets.bin").open("wb") as targets:
            for document in documents:
                ids = np.asarray(document.input_ids, dtype=np.int64)
                if ids.size == 0:
                    continue
                if ids.min() < 0 or ids.max() >= vocab_size:
                    raise ConfigError(
                        f"document {len(offsets) - 1} has tokens from {ids.min()} to {ids.max()} in a "
                        f"vocabulary of {vocab_size}; use the tokenizer of this model"
                    )
                mask = np.ones(ids.size, dtype=np.uint8)
                if document.is_target is not None:
                    is_masked = True
                    mask = np.asarray(document.is_target, dtype=np.uint8)
                    if mask.size != ids.size:
                        raise ConfigError(
                            f"document {len(offsets) - 1} has {mask.size} mask values and {ids.size} tokens; "
                            "give one per token"
                        )
                ids.astype(dtype).tofile(tokens)
                mask.tofile(targets)
                offsets.append(offsets[-1] + ids.size)
        if len(offsets) == 1:
            raise ConfigError(f"{target}: no documents to write; give at least one that is not empty")
        if not is_masked:
            (work / "targets.bin").unlink()
        np.asarray(offsets, dtype="<i8").tofile(work / "offsets.bin")
        meta = {
            "version": _VERSION,
            "dtype": dtype.str,
            "num_tokens": offsets[-1],
            "num_documents": len(offsets) - 1,
            "has_targets": is_masked,
            "tokenizer_sha256": tokenizer_sha256,
            "tokens_sha256": _sha256(work / "tokens.bin"),
        }
        (work / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        if target.exists():
            shutil.rmtree(target)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return TokenFile(target)


def write_texts(path: str | Path, documents: Iterable[Document], tokenizer: Tokenizer) -> TokenFile:
    """A token file of plain text: each document between two end-of-text tokens.

    The leading one gives the first token something to be predicted from: bits per byte then count every byte.
    """
    return write_tokens(
        path,
        _encoded(documents, tokenizer),
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.fingerprint,
    )


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterable[TokenDocument]:
    end = tokenizer.eos_id
    batch: list[str] = []
    for document in documents:
        batch.append(document.text)
        if len(batch) == _BATCH:
            yield from (TokenDocument([end, *ids, end]) for ids in tokenizer.encode_batch(batch))
            batch = []
    yield from (TokenDocument([end, *ids, end]) for ids in tokenizer.encode_batch(batch))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
