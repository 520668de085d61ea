"""Attention by the compiled CPU kernels, native/attention_forward.cpp and native/attention_backward.cpp.

Float32 inside; bfloat16 and float16 are converted on the way in and out, where no gradient is needed block by
block of keys, because a step of decoding meets all of a cache. Forward and backward are custom ops, so
`torch.compile` keeps its graph; calls that need no gradient skip the dispatcher. Shape letters: T query
tokens, S key tokens, N query heads, K key/value heads, H query/key head size, V value head size.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.ops.attention.oracle import attention_oracle
from sateen.ops.attention.reference import OP
from sateen.ops.native import native, native_available


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, N, _ = q.shape
    out = torch.empty(T, N, v.shape[2])
    lse = torch.empty(N, T)
    arrays = (_array(x) for x in (q, k, v, cu_q, cu_k, sink))
    native().attention_forward(*arrays, scale, window, torch.get_num_threads(), out.numpy(), lse.numpy())
    return out, lse


HALVES = (torch.bfloat16, torch.float16)


def _run_half(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`_run_forward` of keys and values of 16 bits, read as they lie."""
    out, lse = torch.empty(q.shape[0], q.shape[1], v.shape[2]), torch.empty(q.shape[1], q.shape[0])
    # numpy has no bfloat16; it passes on the bits.
    k_bits, v_bits = (x.detach().view(torch.uint16).numpy() for x in (k, v))
    arrays = (_array(x) for x in (cu_q, cu_k, sink))
    native().attention_forward_half(
        _array(q), k_bits, v_bits, k.dtype == torch.bfloat16, *arrays, scale, window,
        torch.get_num_threads(), out.numpy(), lse.numpy(),
    )  # fmt: skip
    return out, lse


def _is_half(k: Tensor, v: Tensor) -> bool:
    """Whether `_run_half` can read these rows."""
    return k.dtype == v.dtype and k.dtype in HALVES and k.stride(-1) == v.stride(-1) == 1


@torch.library.custom_op("sateen::attention_forward", mutates_args=(), device_types="cpu")
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [T, N, V] and log-sum-exp [N, T] of float32 tensors; `window` 0 is none."""
    return _run_forward(q, k, v, cu_q, cu_k, sink, scale, window)


@attention_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    T, N, _ = q.shape
    return q.new_empty(T, N, v.shape[2]), q.new_empty(N, T)


@torch.library.custom_op("sateen::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    out: Tensor, lse: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and the sinks (empty without sinks)."""
    d_q, d_k, d_v = (torch.empty(x.shape) for x in (q, k, v))
    d_sink = torch.empty(0 if sink is None else sink.shape[0])
    arrays = (_array(x) for x in (_rows(d_out), q, k, v, cu_q, cu_k, sink, out, lse))
    gradients = (x.numpy() for x in (d_q, d_k, d_v, d_sink))
    native().attention_backward(*arrays, scale, window, torch.get_num_threads(), *gradients)
    return d_q, d_k, d_v, d_sink


@attention_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    out: Tensor, lse: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sink = q.new_empty(0 if sink is None else sink.shape[0])
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, sink, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k, sink, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, sink, out, lse = ctx.saved_tensors
    d_q, d_k, d_v, d_sink = attention_backward(
        d_out, q, k, v, cu_q, cu_k, sink, out, lse, ctx.scale, ctx.window
    )
    return d_q, d_k, d_v, None, None, None if sink is None else d_sink, None, None


attention_forward.register_autograd(_gradients, setup_context=_save)


def _rows(x: Tensor) -> Tensor:
    """Float32 with contiguous last dimension, as the kernel reads it; a copy only where needed."""
    x = x if x.dtype == torch.float32 else x.float()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _array(x: Tensor | None) -> NDArray[Any] | None:
    """The same memory as numpy sees it: its buffer protocol costs a fifth of torch's DLPack call."""
    return None if x is None else x.detach().numpy()


def _why_not(
    q_TNH: Tensor, *_: Tensor, window: int | None = None, block_max: int | None = None, **__: Any
) -> str | None:
    if q_TNH.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {q_TNH.device.type}"
    if q_TNH.dtype == torch.float64:
        return "it computes in float32 and the tensors are float64"
    if block_max is not None and window is not None:
        return "it does not return tile maxima within a window"
    return native_available()


def _with_maxima(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor | None, scale: float | None,
    sink: Tensor | None, return_lse: bool, block_max: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    cu_k = cu_q if cu_k is None else cu_k
    longest = int(cu_k.diff().max()) if cu_k.numel() > 1 else 0
    out, lse, maxima = attention_oracle(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=q.shape[-1] ** -0.5 if scale is None else scale,
        sink_N=sink, block_size=block_max, columns=-(-longest // block_max),
    )  # fmt: skip
    return (out, lse, maxima) if return_lse else (out, maxima)


@OP.register("native", priority=20, why_not=_why_not)
def attention_native(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sink_N: Tensor | None = None,
    return_lse: bool = False,
    block_max: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.attention`; scores and sums in float32.

    Numerics: exp is a polynomial of relative error 1e-7; errors against float64 are bounded in
    tests/ops/test_attention_native.py.
    Source: blocks with an online softmax as in Dao 2023, FlashAttention-2 (arXiv 2307.08691, algorithms 1-2).
    In the backward pass a worker owns whole rows of d_q, d_k and d_v, so there are no atomic additions.
    """
    if block_max is not None:
        return _with_maxima(
            q_TNH, k_SKH, v_SKV, cu_seqlens_q, cu_seqlens_k, scale, sink_N, return_lse, block_max
        )
    cu_q = cu_seqlens_q.int()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.int()
    sink = None if sink_N is None else sink_N.float()
    scale = q_TNH.shape[-1] ** -0.5 if scale is None else scale
    inputs = (q_TNH, k_SKH, v_SKV) if sink is None else (q_TNH, k_SKH, v_SKV, sink)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    rest = (cu_q, cu_k, sink, scale, window or 0)
    if needs_grad or type(q_TNH) is not Tensor or torch.compiler.is_compiling():
        out, lse = attention_forward(_rows(q_TNH), _rows(k_SKH), _rows(v_SKV), *rest)
    elif _is_half(k_SKH, v_SKV):
        out, lse = _run_half(_rows(q_TNH), k_SKH, v_SKV, *rest)
    else:
        out, lse = _run_forward(_rows(q_TNH), _rows(k_SKH), _rows(v_SKV), *rest)
    out = out.to(q_TNH.dtype)
    return (out, lse) if return_lse else out
