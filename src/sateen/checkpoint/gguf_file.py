"""The container of GGUF files: metadata and where each tensor's bytes lie, versions 2 and 3.

`checkpoint.gguf` gives these a meaning. The `gguf` package has a reader too; it builds an array object for
every token of the vocabulary, which takes seconds where this takes a tenth of one. Format: the page on GGUF
in the ggml repository.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sateen.errors import CheckpointError

VERSIONS = (2, 3)
SPLIT = "split.count"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ARRAYS_DEEP = 8
T = TypeVar("T")


@dataclass(frozen=True)
class BlockType:
    """How ggml stores a tensor: `size` values of a row take `num_bytes` bytes."""

    name: str
    size: int
    num_bytes: int


# The types that are read, by ggml's number.
BLOCK_TYPES = {
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    30: BlockType("BF16", 1, 2),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        shape: as torch counts it: rows first, the contiguous axis last.
        kind: how its rows are stored.
        start: offset of its first byte in the file.
        num_bytes: its size in the file.
    """

    shape: tuple[int, ...]
    kind: BlockType
    start: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A file's metadata (arrays of numbers as tuples) and its tensors by name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]

    def rows(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes [rows, bytes of a row], mapped and not copied."""
        stored = self.tensors[name]
        flat = np.memmap(self.path, dtype=np.uint8, mode="r", offset=stored.start, shape=(stored.num_bytes,))
        return flat.reshape(math.prod(stored.shape[:-1]), -1)


def read_gguf(path: str | Path) -> GGUFFile:
    """The metadata and the tensor table of a GGUF file; no tensor is read.

    Raises:
        CheckpointError: no such file, not a GGUF file of a version we read, one part of a split model, an
            incomplete file, or a tensor in a format that is not read.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, _Cursor(path, data))
    except (OSError, ValueError) as error:  # mmap refuses empty files with a ValueError
        raise CheckpointError(f"{path}: cannot be read ({error}); a GGUF file is expected") from None


class _Cursor:
    """Reads little-endian values one after the other."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.offset = path, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.offset:
            raise CheckpointError(f"{self.path}: ends inside its header; fetch the file again")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth == _MOST_ARRAYS_DEEP:
            raise CheckpointError(
                f"{self.path}: a metadata value has the unknown type {kind}; fetch the file again"
            )
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            form = _SCALARS[item]
            return struct.unpack(f"<{count}{form}", self.take(count * struct.calcsize("<" + form)))
        return self.repeat(count, lambda: self.value(item, depth + 1))

    def repeat(self, count: int, read: Callable[[], T]) -> tuple[T, ...]:
        # A damaged count may be astronomical; every item takes bytes, so `take` ends the loop.
        return tuple(read() for _ in range(count))


def _read(path: Path, cursor: _Cursor) -> GGUFFile:
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path}: does not begin with GGUF; it is another kind of file")
    version = cursor.number("I")
    if version not in VERSIONS:
        hint = " (its bytes are in big-endian order)" if version & 0xFFFF == 0 else ""
        raise CheckpointError(
            f"{path}: GGUF version {version}{hint} is not read; accepted: little-endian {VERSIONS}"
        )
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    if metadata.get(SPLIT, 1) > 1:
        raise CheckpointError(
            f"{path}: one of {metadata[SPLIT]} parts of a model; join them with `llama-gguf-split --merge`"
        )
    table = cursor.repeat(num_tensors, lambda: _tensor_row(cursor))
    alignment = int(metadata.get("general.alignment", 32))
    if alignment < 1:
        raise CheckpointError(f"{path}: general.alignment is {alignment}; accepted: 1 or more")
    data_start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, StoredTensor] = {}
    for name, shape, number, offset in table:
        if name in tensors:
            raise CheckpointError(f"{path}: {name} is there twice; fetch or write the file again")
        tensors[name] = _stored(path, name, shape, number, data_start + offset)
    end = max((stored.start + stored.num_bytes for stored in tensors.values()), default=0)
    if end > len(cursor.data):
        raise CheckpointError(
            f"{path}: incomplete, {len(cursor.data)} bytes of {end}; fetch or write the file again"
        )
    return GGUFFile(path, metadata, tensors)


def _tensor_row(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_axes = cursor.string(), cursor.number("I")
    shape = cursor.repeat(num_axes, lambda: int(cursor.number("Q")))
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def _stored(path: Path, name: str, shape: tuple[int, ...], number: int, start: int) -> StoredTensor:
    kind = BLOCK_TYPES.get(number)
    if kind is None:
        accepted = ", ".join(known.name for known in BLOCK_TYPES.values())
        raise CheckpointError(f"{path}: {name} is {_type_name(number)}; accepted: {accepted}")
    if not shape or 0 in shape or shape[-1] % kind.size:
        raise CheckpointError(
            f"{path}: {name} has shape {shape}, which {kind.name} in blocks of {kind.size} cannot store"
        )
    return StoredTensor(shape, kind, start, math.prod(shape) // kind.size * kind.num_bytes)


def _type_name(number: int) -> str:
    try:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(number).name
    except (ImportError, ValueError):
        return f"of ggml type {number}"
