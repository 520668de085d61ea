"""Attention over listed blocks by the compiled CPU kernels of native/sparse_forward.cpp and its backward.

Float32 inside; bfloat16 and float16 rows are widened as they are read, so no long cache is converted whole.
Forward and backward are custom ops, so `torch.compile` keeps its graph; calls that need no gradient skip the
dispatcher. Shape letters as in `sateen.ops.attention.native`; n blocks per list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sateen.ops.block_sparse_attention.reference import OP
from sateen.ops.native import native, native_available
from sateen.ops.rows import array, format_of, number_array, number_rows


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, N, _ = q.shape
    out = torch.empty(T, N, v.shape[2])
    lse = torch.empty(N, T)
    native().sparse_forward(
        number_array(q), number_array(k), number_array(v), format_of(q), array(idx), array(cu_q), array(cu_k),
        array(sink), block_size, scale, torch.get_num_threads(), out.numpy(), lse.numpy(),
    )  # fmt: skip
    return out, lse


@torch.library.custom_op("sateen::sparse_forward", mutates_args=(), device_types="cpu")
def sparse_forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The float32 output [T, N, V] and log-sum-exp [N, T]."""
    return _run_forward(q, k, v, idx, cu_q, cu_k, sink, block_size, scale)


@sparse_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, N, _ = q.shape
    return q.new_empty(T, N, v.shape[2], dtype=torch.float32), q.new_empty(N, T, dtype=torch.float32)


@torch.library.custom_op("sateen::sparse_backward", mutates_args=(), device_types="cpu")
def sparse_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cu_q: Tensor, cu_k: Tensor,
    sink: Tensor | None, out: Tensor, lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The float32 gradients of q, k, v and the sinks (empty without sinks)."""
    d_q, d_k, d_v = (torch.empty(x.shape) for x in (q, k, v))
    d_sink = torch.empty(0 if sink is None else sink.shape[0])
    native().sparse_backward(
        number_array(*number_rows(d_out.float())), number_array(q), number_array(k), number_array(v),
        format_of(q), array(idx), array(cu_q), array(cu_k), array(sink), array(out), array(lse), block_size,
        scale, torch.get_num_threads(), *(x.numpy() for x in (d_q, d_k, d_v, d_sink)),
    )  # fmt: skip
    return d_q, d_k, d_v, d_sink


@sparse_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cu_q: Tensor, cu_k: Tensor,
    sink: Tensor | None, out: Tensor, lse: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v = (torch.empty(x.shape, device=x.device) for x in (q, k, v))
    return d_q, d_k, d_v, q.new_empty(0 if sink is None else sink.shape[0], dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, idx, cu_q, cu_k, sink, out, lse = ctx.saved_tensors
    found = sparse_backward(d_out, q, k, v, idx, cu_q, cu_k, sink, out, lse, ctx.block_size, ctx.scale)
    d_q, d_k, d_v = (d.to(x.dtype) for d, x in zip(found, (q, k, v), strict=False))
    return d_q, d_k, d_v, None, None, None, None if sink is None else found[3], None, None


sparse_forward.register_autograd(_gradients, setup_context=_save)


def _why_not(q_TNH: Tensor, *_: Tensor, **__: Any) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {q_TNH.device.type}"
    if q_TNH.dtype == torch.float64:
        return "it computes in float32 and the queries are float64"
    return native_available()


@OP.register("native", priority=20, why_not=_why_not)
def block_sparse_attention_native(
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
    """See `sateen.ops.block_sparse_attention`; scores and sums in float32.

    Queries of a chunk are visited by block: a block's keys are packed once for all that list it. Blocks of
    fewer than 8 keys, and queries that share no blocks, are gathered query by query. In the backward pass a
    worker owns whole rows of every gradient, so there are no atomic additions.
    """
    q, k, v = number_rows(q_TNH, k_SKH, v_SKV)
    idx = idx_KTn.to(torch.int32).contiguous()
    cu_q = cu_seqlens_q.int()
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.int()
    sink = None if sink_N is None else sink_N.float()
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if needs_grad or type(q) is not Tensor or torch.compiler.is_compiling():
        out, lse = sparse_forward(q, k, v, idx, cu_q, cu_k, sink, block_size, scale)
    else:
        out, lse = _run_forward(q, k, v, idx, cu_q, cu_k, sink, block_size, scale)
    out = out.to(q_TNH.dtype)
    return (out, lse) if return_lse else out
