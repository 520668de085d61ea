"""From tile maxima to the key blocks each query keeps."""

from __future__ import annotations

import torch
from torch import Tensor


def select_blocks(
    block_max_NTb: Tensor, lse_NT: Tensor, *, num_kv_heads: int, num_blocks: int, aggregate: str = "max"
) -> Tensor:
    """The `num_blocks` key blocks with the largest attention probability, per query and key/value head.

    Args:
        block_max_NTb: raw tile maxima of the scaled scores, -inf where no key is visible.
        lse_NT: log-sum-exp of each row; subtracted first, because raw logits do not compare across heads.
        num_kv_heads: K; the N/K query heads of a group share one list.
        num_blocks: n, blocks to keep.
        aggregate: how a group ranks a block: by the `max` of its heads' probabilities, or by their `mean`.

    Returns:
        int32 [K, T, n] block indices, ascending, padded with -1; ties go to the lower index.

    Source: HySparse (arXiv 2602.03560) eq. 3 and §3.2; line 16 of its algorithm 1 lacks the exponential.
    """
    N, T, b = block_max_NTb.shape
    log_probs = block_max_NTb - lse_NT.unsqueeze(-1)
    log_probs = torch.where(torch.isneginf(block_max_NTb), -torch.inf, log_probs)
    heads_KGTb = log_probs.view(num_kv_heads, N // num_kv_heads, T, b)
    grouped_KTb = heads_KGTb.amax(1)
    if aggregate == "mean":
        grouped_KTb = torch.where(torch.isneginf(grouped_KTb), -torch.inf, heads_KGTb.exp().sum(1))
    order = grouped_KTb.sort(dim=-1, descending=True, stable=True)
    keep = min(num_blocks, b)
    chosen = order.indices[..., :keep].masked_fill(torch.isneginf(order.values[..., :keep]), b)
    chosen = chosen.sort(dim=-1).values
    chosen = chosen.masked_fill(chosen == b, -1).to(torch.int32)
    return torch.nn.functional.pad(chosen, (0, num_blocks - keep), value=-1)
