"""Attention by Triton kernels: forward, backward, and decoding in parts, on CUDA.

Offsets are never read on the host, so calls neither wait for the device nor break a CUDA graph; only tile
maxima need the longest sequence, for their shape. Forward and backward are custom ops, so `torch.compile`
keeps its graph. The kernels have run under Triton's interpreter and have been compiled for sm_90; they have
never run on a GPU. Shape letters: T query tokens, S key tokens, N query heads, K key/value heads, H query/key
head size, V value head size, G = N / K, P parts.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sateen.ops.attention.reference import OP
from sateen.ops.attention.triton_tiles import MAX_PARTS, MIN_ROWS, tile, tuning
from sateen.ops.triton import PRIORITY, triton_available

LOG2_E = 1.4426950408889634
MAX_HEAD = 256  # channels; a tile holds whole heads
MAX_KEYS = 128  # of a tile of maxima; longer blocks are several tiles
SHORT = 16  # tokens per sequence, on average, up to which a call counts as decoding
PART_KEYS = 256  # least keys per part, on average


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int, block_max: int, num_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from sateen.ops.attention.triton_forward import forward_kernel, merge_kernel

    T, N, H = q.shape
    S, K, V = v.shape
    G, B = N // K, len(cu_q) - 1
    out = q.new_empty(T, N, V)
    lse = torch.empty(N, T, dtype=torch.float32, device=q.device)
    maxima = torch.full((N, T, num_blocks), -torch.inf, dtype=torch.float32, device=q.device)
    if T * N == 0 or B == 0:
        return out, lse, maxima
    sizes = {"BLOCK_H": _padded(H), "BLOCK_V": _padded(V)}
    is_short = T <= B * SHORT and not block_max
    chosen = tile(
        "decode" if is_short else "forward",
        width=max(sizes.values()), dtype=q.dtype, capability=_capability(q.device),
    )  # fmt: skip
    rows = max(chosen.rows, min(_padded(-(-T * G // B)), 64)) if is_short else chosen.rows
    step, pieces = (chosen.keys, 0) if not block_max else _pieces(block_max)
    num_tiles = T * G // rows + B
    num_parts = _parts(num_tiles * K, min(S // B, window or S), q.device) if is_short else 1
    is_part = num_parts > 1
    top = total = lse
    target = out
    if is_part:
        target = torch.empty(num_parts, T, N, V, dtype=torch.float32, device=q.device)
        top, total = torch.empty(2, num_parts, N, T, dtype=torch.float32, device=q.device)
    with _on(q.device):
        forward_kernel[(num_tiles, K, num_parts)](
            q, k, v, lse if sink is None else sink, cu_q, cu_k, target, lse, maxima, top, total,
            T, B, B.bit_length(), window, num_blocks, num_parts, scale * LOG2_E,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            N=N, G=G, H=H, V=V, HAS_SINK=sink is not None, HAS_WINDOW=window > 0, PIECES=pieces,
            IS_PART=is_part, BLOCK_M=rows, BLOCK_N=_padded(step), STEP=step, **sizes,
            num_warps=chosen.warps, num_stages=chosen.stages,
        )  # fmt: skip
        if is_part:
            merge_kernel[(T, N)](
                target, top, total, lse if sink is None else sink, out, lse, T, num_parts,
                N=N, V=V, HAS_SINK=sink is not None, BLOCK_P=_power_of_two(num_parts), BLOCK_V=_padded(V),
                num_warps=2,
            )  # fmt: skip
    return out, lse, maxima


@torch.library.custom_op("sateen::attention_triton_forward", mutates_args=())
def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int, block_max: int, num_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [T,N,V], log-sum-exp [N,T], tile maxima [N,T,num_blocks]; `window`, `block_max` 0 are none."""
    return _run_forward(q, k, v, cu_q, cu_k, sink, scale, window, block_max, num_blocks)


@triton_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    scale: float, window: int, block_max: int, num_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, N, _ = q.shape
    stats = q.new_empty(N, T, num_blocks, dtype=torch.float32)
    return q.new_empty(T, N, v.shape[2]), q.new_empty(N, T, dtype=torch.float32), stats


@torch.library.custom_op("sateen::attention_triton_backward", mutates_args=())
def triton_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    out: Tensor, lse: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and the sinks (empty without sinks)."""
    from sateen.ops.attention.triton_backward import key_gradient_kernel, query_gradient_kernel

    T, N, H = q.shape
    S, K, V = v.shape
    G, B = N // K, len(cu_q) - 1
    d_out = _rows(d_out, d_out.dtype)
    d_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    norm, delta = torch.empty(2, N, T, dtype=torch.float32, device=q.device)
    numbers = (T, B, B.bit_length(), window, scale)
    strides = [stride for x in (q, k, v, d_out) for stride in x.stride()[:2]]
    sizes = {"G": G, "H": H, "V": V, "HAS_WINDOW": window > 0, "BLOCK_H": _padded(H), "BLOCK_V": _padded(V)}
    query, key = (
        tile(name, width=max(_padded(H), _padded(V)), dtype=q.dtype, capability=_capability(q.device))
        for name in ("query_gradient", "key_gradient")
    )
    with _on(q.device):
        if T * N and B:
            query_gradient_kernel[(T * G // query.rows + B, K)](
                d_out, q, k, v, out, lse, lse if sink is None else sink, cu_q, cu_k, d_q, norm, delta,
                *numbers, *strides, N=N, HAS_SINK=sink is not None, **sizes,
                BLOCK_M=query.rows, BLOCK_N=query.keys, num_warps=query.warps, num_stages=query.stages,
            )  # fmt: skip
        if S * K and B:
            key_gradient_kernel[(S // key.keys + B, K)](
                d_out, q, k, v, norm, delta, cu_q, cu_k, d_k, d_v,
                *numbers, *strides, K=K, BLOCK_M=key.rows, BLOCK_N=key.keys, **sizes,
                num_warps=key.warps, num_stages=key.stages,
            )  # fmt: skip
    if sink is None:
        return d_q, d_k, d_v, lse.new_empty(0)
    # As a sigmoid, because exp(sink - total) is NaN at infinite sinks; -inf twice is an empty row.
    taken = torch.sigmoid(sink[:, None] - lse).nan_to_num(0.0)
    return d_q, d_k, d_v, -(taken * delta).sum(-1)


@triton_backward.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None,
    out: Tensor, lse: Tensor, scale: float, window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_sink = lse.new_empty(0 if sink is None else len(sink))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sink


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, cu_q, cu_k, sink, ctx.scale, ctx.window, _, _ = inputs
    out, lse, maxima = output
    ctx.save_for_backward(q, k, v, cu_q, cu_k, sink, out, lse)
    ctx.mark_non_differentiable(lse, maxima)


def _gradients(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, cu_q, cu_k, sink, out, lse = ctx.saved_tensors
    d_q, d_k, d_v, d_sink = triton_backward(d_out, q, k, v, cu_q, cu_k, sink, out, lse, ctx.scale, ctx.window)
    return d_q, d_k, d_v, None, None, None if sink is None else d_sink, None, None, None, None


triton_forward.register_autograd(_gradients, setup_context=_save)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _padded(size: int) -> int:
    """The power of two that a tile holds this many channels, rows or keys in."""
    return max(_power_of_two(size), MIN_ROWS)


def _pieces(block_max: int) -> tuple[int, int]:
    """Keys per tile, and tiles per block of maxima: the fewest whose tiles are not too wide."""
    pieces = next(n for n in range(1, block_max + 1) if block_max % n == 0 and block_max // n <= MAX_KEYS)
    return block_max // pieces, pieces


def _parts(num_programs: int, num_keys: int, device: torch.device) -> int:
    """How many parts the keys are cut into: enough programs for the device, not too few keys in each."""
    asked = tuning().parts
    if asked is not None:
        return asked
    wanted = -(-2 * _num_processors(device) // num_programs)
    return max(1, min(wanted, num_keys // PART_KEYS, MAX_PARTS))


@cache
def _num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _on(device: torch.device) -> Any:
    """The device that kernels are launched on; the current one unless the tensors are elsewhere."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous channels, as the kernels read them; a copy only where needed."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _why_not(
    q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, *_: Tensor, block_max: int | None = None, **__: Any
) -> str | None:
    if q_TNH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32 from float32, bfloat16 and float16, and the tensors are {q_TNH.dtype}"
    if max(q_TNH.shape[2], v_SKV.shape[2]) > MAX_HEAD:
        found = f"{q_TNH.shape[2]} and {v_SKV.shape[2]}"
        return f"its tiles hold heads of up to {MAX_HEAD} channels and these have {found}"
    return triton_available(q_TNH)


@OP.register("triton", priority=PRIORITY, why_not=_why_not)
def attention_triton(
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
    """See `sateen.ops.attention`; scores and sums in float32, products of 16-bit inputs in 16 bits.

    Numerics: float32 inputs are multiplied at full precision, not as TF32. Errors against float64 are bounded
    in tests/ops/test_attention_triton.py, under Triton's interpreter.
    """
    q, k, v = (_rows(x, q_TNH.dtype) for x in (q_TNH, k_SKH, v_SKV))
    cu_q = cu_seqlens_q.int()
    cu_k = cu_q if cu_seqlens_k is None else cu_seqlens_k.int()
    sink = None if sink_N is None else sink_N.float().contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_blocks = 0
    if block_max:
        longest = int(cu_k.diff().max()) if len(cu_k) > 1 else 0
        num_blocks = -(-longest // block_max)
    arguments = (q, k, v, cu_q, cu_k, sink, scale, window or 0, block_max or 0, num_blocks)
    inputs = (q, k, v) if sink is None else (q, k, v, sink)
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    run = triton_forward if needs_grad or torch.compiler.is_compiling() else _run_forward
    out, lse, maxima = run(*arguments)
    extra = ([lse] if return_lse else []) + ([maxima] if block_max else [])
    return (out, *extra) if extra else out
