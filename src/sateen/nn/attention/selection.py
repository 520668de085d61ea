"""Which key blocks an oracle layer's queries keep: tile maxima, a few queries at a time, without gradient.

The scores of all queries at once would take memory O(T S); a chunk's are dropped as soon as its lists are
made. Shape letters as in `nn.attention.base`; n blocks per list.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sateen import ops
from sateen.nn.attention.base import Sequences

CHUNK = 256  # queries at a time, fewer where their scores would pass
SCORES = 2**25  # numbers


@torch.no_grad()
def choose_blocks(
    q_TNH: Tensor,
    k_SKH: Tensor,
    seq: Sequences,
    cu_seqlens_k: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    forced_window: int | None = None,
) -> Tensor:
    """int32 [K, T, n]: per query and key/value head, the blocks with the largest attention probability.

    Args:
        q_TNH: the oracle's rotated queries.
        k_SKH: its visible keys, every one since the first of each sequence.
        seq: the queries' sequences and positions.
        cu_seqlens_k: offsets of the keys.
        block_size: keys per block; 1 chooses single tokens.
        num_blocks: blocks chosen by probability.
        forced_window: also list every block that holds one of this many newest keys; such blocks are left out
            of the ranking, so that they take nothing from its budget.

    Source: HySparse (arXiv 2602.03560) §3.2; the union with a window is HySparse2's (arXiv 2609.26368).
    """
    K, N = k_SKH.shape[1], q_TNH.shape[1]
    value = k_SKH.new_zeros(k_SKH.shape[0], K, 1)  # the output is not used
    lists = []
    for q0, q1, k0, k1, cu_q, cu_k in _chunks(seq.cu_seqlens, cu_seqlens_k, N):
        _, lse_NT, maxima_NTb = ops.attention(
            q_TNH[q0:q1], k_SKH[k0:k1], value[k0:k1],
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, block_max=block_size,
        )  # fmt: skip
        if forced_window is None:
            lists.append(ops.select_blocks(maxima_NTb, lse_NT, num_kv_heads=K, num_blocks=num_blocks))
            continue
        position_T = seq.position_ids[q0:q1]
        first_T = (position_T - forced_window + 1).clamp(min=0) // block_size
        block = torch.arange(maxima_NTb.shape[-1], device=q_TNH.device)
        maxima_NTb = maxima_NTb.masked_fill(block >= first_T[:, None], -torch.inf)
        chosen = ops.select_blocks(maxima_NTb, lse_NT, num_kv_heads=K, num_blocks=num_blocks)
        # The most blocks that this many consecutive keys can touch.
        touched = (forced_window - 2 + block_size) // block_size + 1
        recent = first_T[:, None] + torch.arange(touched, device=q_TNH.device)
        recent = torch.where(recent <= position_T[:, None] // block_size, recent, -1).to(torch.int32)
        lists.append(torch.cat([chosen, recent.expand(K, -1, -1)], dim=-1))
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
            last = k1 - (q1 - stop)  # right-aligned: a chunk's last query sees no key after this
            offsets = cu_seqlens_q.new_tensor([[0, stop - start], [0, last - k0]])
            found.append((start, stop, k0, last, offsets[0], offsets[1]))
    return found
