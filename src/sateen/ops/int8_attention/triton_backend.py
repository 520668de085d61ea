"""INT8 attention by Triton kernels for CUDA; the kernels themselves are loaded by the first call.

Codes and integer products are those of the reference; scores, P and sums are float32. With `pv="float"`, P
and values are multiplied in the values' dtype. No call waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sateen.ops.int8_attention.quantize import Int8Rows
from sateen.ops.int8_attention.reference import OP, P_LEVELS, ROWS_OP
from sateen.ops.triton import PRIORITY, readable, triton_available

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD, MAX_BLOCK, MAX_GROUP = 256, 128, 64  # what a tile holds


def _why_not(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    block_size: int = 64,
    pv: str = "int8",
    qk: str = "int8",
    **_: Any,
) -> str | None:
    if qk != "int8":
        return f"{qk} queries and keys are an experiment of the reference"
    if any(x.dtype not in DTYPES for x in (q_TNH, k_SKH, v_SKV)):
        return f"it takes float32, bfloat16 and float16; got {q_TNH.dtype}, {k_SKH.dtype}, {v_SKV.dtype}"
    if pv == "float" and v_SKV.dtype == torch.float32 and block_size > 64 and v_SKV.shape[2] > 128:
        return "float32 values of more than 128 channels need blocks of at most 64 keys"
    return _too_large(q_TNH, v_SKV, block_size) or triton_available(q_TNH)


def _why_not_rows(q_TNH: Tensor, rows: Int8Rows, *, block_size: int = 64, **_: Any) -> str | None:
    if q_TNH.dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16; got {q_TNH.dtype}"
    if q_TNH.shape[1] // rows.k_SKH.shape[1] > MAX_GROUP:
        return f"it takes groups of at most {MAX_GROUP} query heads"
    return _too_large(q_TNH, rows.v_SKV, block_size) or triton_available(q_TNH)


def _too_large(q: Tensor, v: Tensor, block_size: int) -> str | None:
    if max(q.shape[2], v.shape[2]) <= MAX_HEAD and block_size <= MAX_BLOCK:
        return None
    return f"it takes heads of at most {MAX_HEAD} channels and blocks of at most {MAX_BLOCK} keys"


@OP.register("triton", priority=PRIORITY, why_not=_why_not)
def int8_attention_triton(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    scale: float,
    window: int | None = None,
    sink_N: Tensor | None = None,
    smooth_k: bool = True,
    pv: str = "int8",
    p_bits: str = "u8",
    v_granularity: str = "channel",
    row_sum: str = "float",
    block_size: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_attention`."""
    from sateen.ops.int8_attention.triton_forward import forward

    out, lse = forward(
        readable(q_TNH), readable(k_SKH), readable(v_SKV), cu_seqlens_q.int(), cu_seqlens_k.int(), sink_N,
        causal=causal, scale=scale, window=window, smooth_k=smooth_k, pv=pv, levels=P_LEVELS[p_bits],
        v_granularity=v_granularity, row_sum=row_sum, block_size=block_size,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@ROWS_OP.register("triton", priority=PRIORITY, why_not=_why_not_rows)
def int8_rows_triton(
    q_TNH: Tensor,
    rows: Int8Rows,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    sink_N: Tensor | None = None,
    block_size: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_rows_attention`."""
    from sateen.ops.int8_attention.triton_rows import rows_forward

    rows = rows._replace(k_SKH=readable(rows.k_SKH), v_SKV=readable(rows.v_SKV))
    out, lse = rows_forward(
        readable(q_TNH), rows, cu_seqlens_q.int(), cu_seqlens_k.int(), sink_N,
        scale=scale, window=window, block_size=block_size,
    )  # fmt: skip
    return (out, lse) if return_lse else out
