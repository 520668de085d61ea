"""Attention and the choice of blocks in plain torch, in two passes: tile maxima a few queries at a time.

The scores of all queries at once would take memory O(T S); a chunk's are dropped as soon as its lists are
made. The output comes from `ops.attention`, so that its gradient costs no such memory either.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sateen.ops.attention.chunked import attention_torch
from sateen.ops.attention.reference import attention_reference
from sateen.ops.attention_and_blocks.reference import OP, choose_from_maxima, positions

CHUNK = 256  # queries at a time, fewer where their scores would pass
SCORES = 2**25  # numbers


@torch.no_grad()
def _choose(
    q_TNH: Tensor, k_SKH: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float, **settings: Any
) -> Tensor:
    K, N = k_SKH.shape[1], q_TNH.shape[1]
    value = k_SKH.new_zeros(k_SKH.shape[0], K, 1)  # the output is not used
    position_T = positions(cu_seqlens_q, cu_seqlens_k)
    lists = []
    for q0, q1, k0, k1, cu_q, cu_k in _chunks(cu_seqlens_q, cu_seqlens_k, N):
        _, lse_NT, maxima_NTb = attention_reference(
            q_TNH[q0:q1], k_SKH[k0:k1], value[k0:k1], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=scale,
            return_lse=True, block_max=settings["block_size"],
        )  # fmt: skip
        lists.append(choose_from_maxima(maxima_NTb, lse_NT, position_T[q0:q1], num_kv_heads=K, **settings))
    return torch.cat(lists, dim=1)


def _chunks(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int
) -> list[tuple[int, int, int, int, Tensor, Tensor]]:
    """Query and key ranges with their own offsets: everything in one where it is small, as in decoding."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    longest = max((b - a for a, b in pairwise(starts_k)), default=0)
    size = max(1, min(CHUNK, SCORES // max(1, num_heads * longest)))
    if starts_q[-1] <= size:
        return [(0, starts_q[-1], 0, starts_k[-1], cu_seqlens_q, cu_seqlens_k)]
    found = []
    for (q0, q1), (k0, k1) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        for start in range(q0, q1, size):
            stop = min(start + size, q1)
            last = max(k0, k1 - (q1 - stop))  # right-aligned: a chunk's last query sees no key after this
            offsets = cu_seqlens_q.new_tensor([[0, stop - start], [0, last - k0]])
            found.append((start, stop, k0, last, offsets[0], offsets[1]))
    return found


def _why_not(q_TNH: Tensor, *_: Tensor, **__: Any) -> str | None:
    return "it computes in float32 and the queries are float64" if q_TNH.dtype == torch.float64 else None


@OP.register("torch", priority=10, why_not=_why_not)
def attention_and_blocks_torch(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    forced_window: int | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    sink_N: Tensor | None = None,
    aggregate: str = "max",
    lists_KTn: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `sateen.ops.attention_and_blocks`; scores and sums in float32."""
    if lists_KTn is None:
        lists_KTn = _choose(
            q_TNH, k_SKH, cu_seqlens_q, cu_seqlens_k, scale,
            block_size=block_size, num_blocks=num_blocks, forced_window=forced_window, aggregate=aggregate,
        )  # fmt: skip
    out = attention_torch(
        q_TNH, k_SKH, v_SKV, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale, sink_N=sink_N
    )
    assert isinstance(out, Tensor)
    return out, lists_KTn
