"""The compiled kernel that gives attention with block maxima, or with the blocks chosen by them.

native/oracle_forward.cpp reads float32, bfloat16 and float16 rows; the backward pass is that of
`sateen.ops.attention.native`. Shape letters as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sateen.ops.native import native
from sateen.ops.rows import array, format_of, number_array, number_rows


@torch.library.custom_op("sateen::oracle_forward", mutates_args=(), device_types="cpu")
def oracle_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None, scale: float,
    block_size: int, columns: int, chosen: int, forced_window: int, is_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output [T, N, V], log-sum-exp [N, T], and maxima or lists.

    With `chosen` 0 the last are float32 maxima [N, T, columns], empty and not made for 0 columns; else int32
    lists [K, T, columns], the first `chosen` by probability, the rest for the `forced_window`, 0 for none.
    A group's heads have the largest of theirs, or with `is_mean` the mean.
    """
    (T, N, _), K = q.shape, k.shape[1]
    out, lse = torch.empty(T, N, v.shape[2]), torch.empty(N, T)
    lists = torch.empty(K, T, columns, dtype=torch.int32) if chosen else None
    maxima = None if chosen else torch.empty(N, T, columns)
    native().oracle_forward(
        number_array(q), number_array(k), number_array(v), format_of(q), array(cu_q), array(cu_k),
        array(sink), block_size, scale, torch.get_num_threads(), chosen, forced_window, is_mean,
        out.numpy(), lse.numpy(), array(maxima) if columns else None, array(lists),
    )  # fmt: skip
    found = maxima if lists is None else lists
    assert found is not None
    return out, lse, found


@oracle_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None, scale: float,
    block_size: int, columns: int, chosen: int, forced_window: int, is_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, N, _), K = q.shape, k.shape[1]
    out = q.new_empty(T, N, v.shape[2], dtype=torch.float32)
    lse = q.new_empty(N, T, dtype=torch.float32)
    lists = q.new_empty(K, T, columns, dtype=torch.int32)
    return out, lse, lists if chosen else q.new_empty(N, T, columns, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.scale = inputs[6]
    ctx.save_for_backward(*inputs[:6], *output[:2])
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, d_out: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    from sateen.ops.attention.native import attention_backward

    q, k, v, cu_q, cu_k, sink, out, lse = ctx.saved_tensors
    rows = (x.float() for x in (q, k, v))
    *found, d_sink = attention_backward(d_out, *rows, cu_q, cu_k, sink, out, lse, ctx.scale, 0)
    d_q, d_k, d_v = (d.to(x.dtype) for d, x in zip(found, (q, k, v), strict=True))
    return d_q, d_k, d_v, None, None, None if sink is None else d_sink, *[None] * 6


oracle_forward.register_autograd(_gradients, setup_context=_save)


def attention_oracle(
    q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float,
    sink_N: Tensor | None, block_size: int, columns: int, chosen: int = 0, forced_window: int | None = None,
    is_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`oracle_forward` of tensors of any layout; the output in q's dtype."""
    q, k, v = number_rows(q_TNH, k_SKH, v_SKV)
    cu_q = cu_seqlens_q.int()
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.int()
    sink = None if sink_N is None else sink_N.float()
    out, lse, found = oracle_forward(
        q, k, v, cu_q, cu_k, sink, scale, block_size, columns, chosen, forced_window or 0, is_mean
    )
    return out.to(q_TNH.dtype), lse, found
