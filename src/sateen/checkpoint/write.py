"""Safetensors shards and their index, written one tensor at a time: no shard is ever held in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sateen.checkpoint.shards import DTYPES, INDEX

SHARD_BYTES = 5 * 2**30
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: known in advance but for its data.

    Attributes:
        name: in the checkpoint.
        dtype: of what `read` returns.
        shape: of what `read` returns.
        read: the tensor, on any device; called once, when its turn has come.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, tensors: Sequence[Outgoing]) -> None:
    """Files of at most `SHARD_BYTES` or one larger tensor, in the order given, and an index if several."""
    groups: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if size and size + tensor.num_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    weight_map = {}
    for i, group in enumerate(groups):
        file = (
            "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        )
        write_shard(folder / file, group)
        weight_map.update({tensor.name: file for tensor in group})
    if len(groups) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))


def write_shard(file: Path, tensors: Sequence[Outgoing]) -> None:
    """One safetensors file; wide numbers stand first, so that all are aligned."""
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.num_bytes
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    words = json.dumps(header, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    with file.open("wb") as out:
        out.write(len(words).to_bytes(8, "little") + words)
        for tensor in ordered:
            data = tensor.read().detach().cpu().contiguous()
            assert (data.dtype, tuple(data.shape)) == (tensor.dtype, tensor.shape), tensor.name
            out.write(data.reshape(-1).view(torch.uint8).numpy().data)
            del data  # before the next one is read
