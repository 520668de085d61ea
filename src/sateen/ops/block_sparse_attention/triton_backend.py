"""Block-sparse attention by Triton kernels for CUDA; the kernels themselves are loaded by the first call.

Scores and sums are float32; products read the inputs' dtype, so that P is rounded to it. Forward and backward
are custom ops, so `torch.compile` keeps its graph. No call waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sateen.ops.block_sparse_attention.reference import OP
from sateen.ops.spans import stand
from sateen.ops.triton import PRIORITY, readable, triton_available

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD, MAX_GROUP = 256, 64  # what a tile holds


@torch.library.custom_op("sateen::block_sparse_triton_forward", mutates_args=())
def sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, idx: Tensor, cu_q: Tensor, cu_k: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [T, N, V] in q's dtype and the log-sum-exp [N, T]."""
    from sateen.ops.block_sparse_attention.triton_forward import forward

    return forward(q, k, v, idx, sink, stand(cu_q, cu_k, len(q)), block_size, scale)


@sparse_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, idx: Tensor, cu_q: Tensor, cu_k: Tensor,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, N, _ = q.shape
    return q.new_empty(T, N, v.shape[2]), q.new_empty(N, T, dtype=torch.float32)


@torch.library.custom_op("sateen::block_sparse_triton_backward", mutates_args=())
def sparse_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, idx: Tensor, cu_q: Tensor,
    cu_k: Tensor, out: Tensor, lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and the sinks (empty without sinks)."""
    from sateen.ops.block_sparse_attention.triton_backward import backward

    where = stand(cu_q, cu_k, len(q))
    return backward(d_out.contiguous(), q, k, v, idx, cu_k, sink, where, out, lse, block_size, scale)


@sparse_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, idx: Tensor, cu_q: Tensor,
    cu_k: Tensor, out: Tensor, lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sink = q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: a layer that is computed again hands them out a single time
    sink = saved[3]
    d_q, d_k, d_v, d_sink = sparse_backward(d_out, *saved, ctx.block_size, ctx.scale)
    return d_q, d_k, d_v, None if sink is None else d_sink.to(sink.dtype), None, None, None, None, None


sparse_forward.register_autograd(_gradients, setup_context=_save)


def _why_not(q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, *_: Tensor, **__: Any) -> str | None:
    if q_TNH.dtype not in DTYPES or not q_TNH.dtype == k_SKH.dtype == v_SKV.dtype:
        return (
            "it takes queries, keys and values of one dtype of float32, bfloat16 and float16; "
            f"got {q_TNH.dtype}, {k_SKH.dtype}, {v_SKV.dtype}"
        )
    if max(q_TNH.shape[2], v_SKV.shape[2]) > MAX_HEAD or q_TNH.shape[1] // k_SKH.shape[1] > MAX_GROUP:
        return f"it takes heads of at most {MAX_HEAD} channels in groups of at most {MAX_GROUP}"
    return triton_available(q_TNH)


@OP.register("triton", priority=PRIORITY, why_not=_why_not)
def block_sparse_attention_triton(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    idx_KTn: Tensor,
    *,
    block_size: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    sink_N: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `sateen.ops.block_sparse_attention`.

    Source: an online softmax as in Dao 2023, FlashAttention-2 (arXiv 2307.08691, algorithms 1-2), over the
    blocks of HySparse (arXiv 2602.03560, eq. 6-7).
    """
    q, k, v = readable(q_TNH), readable(k_SKH), readable(v_SKV)
    out, lse = sparse_forward(
        q, k, v, sink_N, idx_KTn.int(), cu_seqlens_q.int(), cu_seqlens_k.int(), block_size, scale
    )
    return (out, lse) if return_lse else out
