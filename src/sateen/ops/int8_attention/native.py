"""INT8 attention by the compiled CPU kernels, native/int8_attention.cpp and native/int8_rows.cpp.

Queries, keys and values are quantised in the same call; bfloat16 and float16 are converted to float32 on the way
in and out. Called through `OP` and `ROWS_OP`; shape letters as in `reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.ops.int8_attention.reference import OP, P_LEVELS
from sateen.ops.native import native, native_available

STRIPE, MAX_BLOCK = 64, 1024  # keys that lie side by side, and the longest block; native/int8_tiles.h, int8_block.h
MAX_CHANNELS = 1024


def _rows(x: Tensor) -> Tensor:
    """Float32 with contiguous last dimension, as the kernel reads it; a copy only where needed."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _array(x: Tensor | None) -> NDArray[Any] | None:
    return None if x is None else x.detach().numpy()


def _why_not(q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, *, block_size: int = 64, **_: Any) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {q_TNH.device.type}"
    if q_TNH.dtype == torch.float64:
        return "it computes in float32 and the tensors are float64"
    if block_size % STRIPE or block_size > MAX_BLOCK:
        return f"block_size is a multiple of {STRIPE}, at most {MAX_BLOCK}; got {block_size}"
    if not 0 < min(k_SKH.shape[-1], v_SKV.shape[-1]) <= max(k_SKH.shape[-1], v_SKV.shape[-1]) <= MAX_CHANNELS:
        return f"heads have 1 to {MAX_CHANNELS} channels; got {k_SKH.shape[-1]} and {v_SKV.shape[-1]}"
    return native_available()


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
    block_size: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_attention`.

    Numerics: codes and integer products are the reference's. Key means are summed in another order, and scores
    and exponentials differ from the reference's by roundings of float32, so a code on a border may be its
    neighbour; tests/ops/test_int8_attention_native.py bounds what that does.
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
