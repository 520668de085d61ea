"""Attention with all tile maxima at once, and the choice among them: memory O(T S), the truth."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sateen.ops.attention.reference import attention_reference
from sateen.ops.attention.select import select_blocks
from sateen.ops.op import Op


def recent_blocks(block_size: int, forced_window: int | None) -> int:
    """The most blocks that the newest keys of a window can touch; 0 without a window."""
    return 0 if forced_window is None else (forced_window - 2 + block_size) // block_size + 1


def choose_from_maxima(
    maxima_NTb: Tensor, lse_NT: Tensor, position_T: Tensor, *, num_kv_heads: int, block_size: int,
    num_blocks: int, forced_window: int | None, aggregate: str,
) -> Tensor:  # fmt: skip
    """The lists int32 [K, T, n] of `attention_and_blocks`; `position_T` is each query's place in its keys."""
    settings: dict[str, Any] = {
        "num_kv_heads": num_kv_heads,
        "num_blocks": num_blocks,
        "aggregate": aggregate,
    }
    if forced_window is None:
        return select_blocks(maxima_NTb, lse_NT, **settings)
    first_T = (position_T - forced_window + 1).clamp(min=0) // block_size
    block = torch.arange(maxima_NTb.shape[-1], device=maxima_NTb.device)
    ranked_NTb = maxima_NTb.masked_fill(block >= first_T[:, None], -torch.inf)
    chosen = select_blocks(ranked_NTb, lse_NT, **settings)
    touched = torch.arange(recent_blocks(block_size, forced_window), device=maxima_NTb.device)
    recent = first_T[:, None] + touched
    seen = recent <= torch.div(position_T, block_size, rounding_mode="floor")[:, None]
    recent = torch.where(seen, recent, -1).to(torch.int32)
    return torch.cat([chosen, recent.expand(num_kv_heads, -1, -1)], dim=-1)


def positions(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
    """int64 [T]: each query's place among its sequence's keys; negative where it sees none."""
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    parts = [torch.arange(q1 - q0) + (k1 - k0) - (q1 - q0) for (q0, q1), (k0, k1) in spans]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(cu_seqlens_q.device)


def attention_and_blocks_reference(
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
    """See `sateen.ops.attention_and_blocks`."""
    out, lse, maxima = attention_reference(
        q_TNH, k_SKH, v_SKV, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale, sink_N=sink_N,
        return_lse=True, block_max=block_size,
    )  # fmt: skip
    lists = choose_from_maxima(
        maxima, lse, positions(cu_seqlens_q, cu_seqlens_k), num_kv_heads=k_SKH.shape[1],
        block_size=block_size, num_blocks=num_blocks, forced_window=forced_window, aggregate=aggregate,
    )  # fmt: skip
    # Known lists too are made and dropped here, so that autograd keeps the same tensors either way.
    return out, lists if lists_KTn is None else lists_KTn


OP = Op("attention_and_blocks", attention_and_blocks_reference)
