"""Where a serving model's weights lie in memory: end to end on huge pages, which a step reads faster."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from sateen.ops.native import native, native_available

ARENA_BYTES = 32 * 2**20  # moved at a time, so that little memory is held twice
ALIGNMENT = 64


@torch.no_grad()
def move_to_huge_pages(tensors: Iterable[Tensor]) -> None:
    """Gives contiguous CPU tensors other memory with the same numbers; those that share theirs go on sharing.

    Nothing happens without the compiled kernels, nor where less than an arena would be moved. It is advice: a
    system that has no pages to give leaves small ones.

    A processor fetches ahead up to the end of a page: reading 256 MB on one core of an AMD EPYC in a virtual
    machine took half the time with pages of 2 MB.
    """
    chosen: dict[tuple[int, torch.Size, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes:
            chosen.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), []).append(tensor)
    groups = list(chosen.values())
    if native_available() or sum(group[0].nbytes for group in groups) < ARENA_BYTES:
        return
    while groups:
        # What was freed goes back to the system first: weights before they were packed, and the last arena's.
        native().release_free_memory()
        size, count = 0, 0
        while count < len(groups) and (not count or size + groups[count][0].nbytes <= ARENA_BYTES):
            size += -(-groups[count][0].nbytes // ALIGNMENT) * ALIGNMENT
            count += 1
        _move(groups[:count], size)
        del groups[:count]


def _move(groups: list[list[Tensor]], size: int) -> None:
    arena, start = torch.empty(size, dtype=torch.uint8), 0
    native().advise_huge_pages(arena.numpy())
    for group in groups:
        first = group[0]
        moved = arena[start : start + first.nbytes].view(first.dtype).view(first.shape)
        start += -(-first.nbytes // ALIGNMENT) * ALIGNMENT
        moved.copy_(first)
        for tensor in group:
            tensor.data = moved
