"""Attention and the choice of blocks in one pass of the compiled CPU kernel, native/oracle_forward.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sateen.ops.attention.oracle import attention_oracle
from sateen.ops.attention_and_blocks.reference import OP, recent_blocks
from sateen.ops.native import native_available


def _why_not(q_TNH: Tensor, *_: Tensor, **__: Any) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {q_TNH.device.type}"
    if q_TNH.dtype == torch.float64:
        return "it computes in float32 and the queries are float64"
    return native_available()


@OP.register("native", priority=20, why_not=_why_not)
def attention_and_blocks_native(
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
    """See `sateen.ops.attention_and_blocks`; scores and sums in float32.

    A worker sees all scores of a few queries of one group, so it lists their blocks itself; block maxima stay
    in its scratch memory. The n largest are found by halving the range of the n-th, not by sorting.
    """
    columns = num_blocks + recent_blocks(block_size, forced_window)
    out, _, lists = attention_oracle(
        q_TNH, k_SKH, v_SKV, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale, sink_N=sink_N,
        block_size=block_size, columns=columns if lists_KTn is None else 0,
        chosen=num_blocks if lists_KTn is None else 0, forced_window=forced_window,
        is_mean=aggregate == "mean",
    )  # fmt: skip
    return out, lists if lists_KTn is None else lists_KTn
