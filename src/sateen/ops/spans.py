"""Where packed tokens and their blocks stand, computed on their device without waiting for it.

GPU kernels are launched over tables of these sizes, which only the shapes decide, so tables hold spare rows.
Shape letters: B sequences, T query tokens, M blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """Packed sequences cut into blocks, each sequence from its own first token; all int32.

    Attributes:
        sequence_M: the sequence of each block.
        row_M: the packed row of its first token.
        place_M: the same, counted from the first token of the sequence.
        count_M: its tokens; fewer in the last block of a sequence, 0 in the spare blocks at the end.
        first_B: number of the first block of each sequence, [B + 1]; the last entry counts the blocks.
    """

    sequence_M: Tensor
    row_M: Tensor
    place_M: Tensor
    count_M: Tensor
    first_B: Tensor


def cut(cu_seqlens: Tensor, num_tokens: int, size: int) -> Blocks:
    """The blocks of `size` tokens of sequences with offsets `cu_seqlens` [B + 1]."""
    cu = cu_seqlens.int()
    num_sequences = cu.numel() - 1
    first = torch.zeros_like(cu)
    first[1:] = ((cu.diff() + size - 1) // size).cumsum(0)
    number = torch.arange(
        (num_tokens + num_sequences * (size - 1)) // size, dtype=torch.int32, device=cu.device
    )
    sequence = torch.searchsorted(first[1:], number, right=True, out_int32=True)
    sequence = sequence.clamp(max=max(num_sequences - 1, 0))
    place = (number - first[sequence]) * size
    row = cu[sequence] + place
    count = (cu[sequence + 1] - row).clamp(0, size)
    return Blocks(sequence, row, place, count, first)


class Queries(NamedTuple):
    """Where each packed query stands; all int32 [T].

    Attributes:
        sequence_T: its sequence.
        key_row_T: the packed row of the first key of its sequence.
        place_T: the place among the keys of its sequence that it stands at, right-aligned; it sees no later
            one, and nothing where the place is negative.
    """

    sequence_T: Tensor
    key_row_T: Tensor
    place_T: Tensor


def stand(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_queries: int) -> Queries:
    """The places of `num_queries` queries."""
    cu_q, cu_k = cu_seqlens_q.int(), cu_seqlens_k.int()
    number = torch.arange(num_queries, dtype=torch.int32, device=cu_q.device)
    sequence = torch.searchsorted(cu_q[1:], number, right=True, out_int32=True)
    place = number + (cu_k[1:] - cu_q[1:])[sequence] - cu_k[sequence]
    return Queries(sequence, cu_k[sequence], place)
