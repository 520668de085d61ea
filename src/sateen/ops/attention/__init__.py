"""Packed causal softmax attention with windows, grouped queries and sinks."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.ops.attention.chunked import attention_torch
from sateen.ops.attention.native import attention_native
from sateen.ops.attention.reference import OP, attention_reference
from sateen.ops.attention.select import select_blocks
from sateen.ops.attention.triton import attention_triton
from sateen.ops.packed import check_packed

__all__ = [
    "OP",
    "attention",
    "attention_native",
    "attention_reference",
    "attention_torch",
    "attention_triton",
    "select_blocks",
]


def attention(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Causal softmax attention over packed sequences.

    Args:
        q_TNH: queries, packed over sequences; T tokens, N heads, H channels.
        k_SKH: keys; K divides N (grouped-query attention).
        v_SKV: values; V may differ from H.
        cu_seqlens_q: int32 [B + 1], offsets of the sequences' queries; first 0, last T.
        cu_seqlens_k: the same for keys, last S; equal to `cu_seqlens_q` when None. A sequence with more keys
            than queries is right-aligned: its last query sees its last key.
        scale: multiplier of the scores; 1/sqrt(H) when None.
        window: keys each query sees, its own included; None for all earlier keys.
        sink_N: a logit per query head that joins the softmax without a value and without `scale`.
        return_lse: also return the log-sum-exp of the scaled scores, float32 [N, T], the sink not included.
        block_max: also return the largest scaled score in each tile of this many keys, float32
            [N, T, ceil(longest sequence / block_max)], -inf where nothing is visible.
        backend: `auto`, or one of `OP.backends`.

    Returns:
        The output [T, N, V] in q's dtype; a tuple with the log-sum-exp and the tile maxima where asked for.
        A query that sees no key gives zeros and a log-sum-exp of -inf. Only the output is differentiable.

    Raises:
        ShapeError: N is not a multiple of K, or the offsets do not fit the tensors.
        BackendUnavailable: the named backend cannot run this call.

    Source: sinks as in MiMo-V2-Flash (arXiv 2601.02780 §2.2, eq. 1-4); tile maxima as in HySparse
    (arXiv 2602.03560 algorithm 1), raw and not divided by the row sum.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    check_packed("attention", q_TNH, k_SKH, v_SKV, cu_seqlens_q, cu_seqlens_k, window=window, sink=sink_N)
    # Autocast would lower the matrix products inside the backends; scores and sums are float32 by contract.
    with torch.autocast(q_TNH.device.type, enabled=False):
        out: Tensor | tuple[Tensor, ...] = OP(
            q_TNH,
            k_SKH,
            v_SKV,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=q_TNH.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            sink_N=sink_N,
            return_lse=return_lse,
            block_max=block_max,
            backend=backend,
        )
    return out
