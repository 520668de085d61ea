"""INT8 attention by the compiled CPU kernels, native/int8_attention.cpp and native/int8_rows.cpp.

Queries, keys and values are quantised in the same call; bfloat16 and float16 are converted to float32 on the
way in and out. Called through `OP` and `ROWS_OP`; shape letters as in `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.ops.int8_attention.quantize import Int8Rows
from sateen.ops.int8_attention.reference import OP, P_LEVELS, ROWS_OP
from sateen.ops.native import native, native_available

STRIPE, MAX_BLOCK = (
    64,
    1024,
)  # keys that lie side by side, and the longest block; native/int8_tiles.h, int8_block.h
MAX_CHANNELS = 1024
BLOCK, ROWS_BLOCK = 512, 64  # keys per block where the caller has no wish (source: ours)


def _rows(x: Tensor) -> Tensor:
    """Float32 with contiguous last dimension, as the kernel reads it; a copy only where needed."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _array(x: Tensor | None) -> NDArray[Any] | None:
    return None if x is None else x.detach().numpy()


def _unfit(q: Tensor, channels: tuple[int, int], block_size: int) -> str | None:
    if q.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "it computes in float32 and the tensors are float64"
    if block_size % STRIPE or block_size > MAX_BLOCK:
        return f"block_size is a multiple of {STRIPE}, at most {MAX_BLOCK}; got {block_size}"
    if min(channels) < 1 or max(channels) > MAX_CHANNELS:
        return f"heads have 1 to {MAX_CHANNELS} channels; got {channels[0]} and {channels[1]}"
    return native_available()


def _why_not(
    q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, *, block_size: int = BLOCK, qk: str = "int8", **_: Any
) -> str | None:
    if qk != "int8":
        return f"{qk} queries and keys are an experiment of the reference"
    return _unfit(q_TNH, (k_SKH.shape[-1], v_SKV.shape[-1]), block_size)


def _why_not_rows(q_TNH: Tensor, rows: Int8Rows, *, block_size: int = ROWS_BLOCK, **_: Any) -> str | None:
    return _unfit(q_TNH, (rows.k_SKH.shape[-1], rows.v_SKV.shape[-1]), block_size)


@OP.register("native", priority=20, why_not=_why_not)
def int8_attention_native(
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
    block_size: int = BLOCK,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_attention`.

    Numerics: integer products are exact. Key means are summed in another order than the reference's, and
    exponentials differ by roundings of float32, so a code on a border may be its neighbour;
    tests/ops/test_int8_attention_native.py bounds what that does.
    """
    T, N, _ = q_TNH.shape
    out, lse = torch.empty(T, N, v_SKV.shape[2]), torch.empty(N, T)
    sink = None if sink_N is None else sink_N.float().contiguous()
    native().int8_attention(
        *(_array(_rows(x)) for x in (q_TNH, k_SKH, v_SKV)),
        _array(cu_seqlens_q.int()),
        _array(cu_seqlens_k.int()),
        _array(sink),
        scale,
        causal,
        window or 0,
        smooth_k,
        pv == "float",
        P_LEVELS[p_bits],
        v_granularity == "channel",
        row_sum == "int8",
        block_size,
        torch.get_num_threads(),
        out.numpy(),
        lse.numpy(),
    )
    out = out.to(q_TNH.dtype)
    return (out, lse) if return_lse else out


@ROWS_OP.register("native", priority=20, why_not=_why_not_rows)
def int8_rows_attention_native(
    q_TNH: Tensor,
    rows: Int8Rows,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    sink_N: Tensor | None = None,
    block_size: int = ROWS_BLOCK,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_rows_attention`; with few queries as fast as the rows come from memory."""
    T, N, _ = q_TNH.shape
    out, lse = torch.empty(T, N, rows.v_SKV.shape[2]), torch.empty(N, T)
    arrays = (rows.k_SKH, rows.k_scale_SK, rows.v_SKV, rows.v_scale_SK, rows.k_mean_BKH)
    native().int8_rows_attention(
        _array(_rows(q_TNH)),
        *(_array(x.contiguous()) for x in arrays),
        _array(cu_seqlens_q.int()),
        _array(cu_seqlens_k.int()),
        _array(None if sink_N is None else sink_N.float().contiguous()),
        scale,
        window or 0,
        block_size,
        torch.get_num_threads(),
        out.numpy(),
        lse.numpy(),
    )
    out = out.to(q_TNH.dtype)
    return (out, lse) if return_lse else out
