"""Packed causal attention in which each query sees the key blocks that a list names."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.ops.block_sparse_attention.gathered import block_sparse_attention_torch
from sateen.ops.block_sparse_attention.native import block_sparse_attention_native
from sateen.ops.block_sparse_attention.reference import OP, block_sparse_attention_reference
from sateen.ops.block_sparse_attention.triton_backend import block_sparse_attention_triton
from sateen.ops.packed import check_packed

__all__ = [
    "OP",
    "block_sparse_attention",
    "block_sparse_attention_native",
    "block_sparse_attention_reference",
    "block_sparse_attention_torch",
    "block_sparse_attention_triton",
]


def block_sparse_attention(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    idx_KTn: Tensor,
    *,
    block_size: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    sink_N: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention of each query over the key blocks listed for it.

    Args:
        q_TNH: queries, packed over sequences; T tokens, N heads, H channels.
        k_SKH: keys; K divides N, and the N/K query heads of a group share one list.
        v_SKV: values; V may differ from H.
        idx_KTn: integer block numbers, distinct in a row, in any order; -1 pads. Block b of a sequence is its
            keys [b * block_size, (b + 1) * block_size), counted from the sequence's first key. Keys after the
            query stay hidden, inside a listed block too.
        block_size: keys per block; 1 selects single tokens.
        cu_seqlens_q: int32 [B + 1], offsets of the sequences' queries; first 0, last T.
        cu_seqlens_k: the same for keys, last S; equal to `cu_seqlens_q` when None. A sequence with more keys
            than queries is right-aligned: its last query sees its last key.
        scale: multiplier of the scores; 1/sqrt(H) when None.
        sink_N: a logit per query head that joins the softmax without a value and without `scale`.
        return_lse: also return the log-sum-exp of the scaled scores, float32 [N, T], the sink not included.
        backend: `auto`, or one of `OP.backends`.

    Returns:
        The output [T, N, V] in q's dtype, with the log-sum-exp where asked for. A query that sees no key
        gives zeros and -inf. Only the output is differentiable; the list carries no gradient.

    Raises:
        ShapeError: N is not a multiple of K, the lists are not integers [K, T, n], or the offsets do not fit.
        BackendUnavailable: the named backend cannot run this call.

    Source: HySparse (arXiv 2602.03560) eq. 6-7; the sinks of its §4.1, which its eq. 7 leaves out. Blocks of
    one token: HySparse2 (arXiv 2609.26368).
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    shapes = check_packed(
        "block_sparse_attention", q_TNH, k_SKH, v_SKV, cu_seqlens_q, cu_seqlens_k, sink=sink_N
    )
    _check_lists(q_TNH, k_SKH, idx_KTn, block_size, shapes)
    # Autocast would lower the matrix products inside the backends; scores and sums are float32 by contract.
    with torch.autocast(q_TNH.device.type, enabled=False):
        out: Tensor | tuple[Tensor, Tensor] = OP(
            q_TNH,
            k_SKH,
            v_SKV,
            idx_KTn,
            block_size=block_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=q_TNH.shape[-1] ** -0.5 if scale is None else scale,
            sink_N=sink_N,
            return_lse=return_lse,
            backend=backend,
        )
    return out


def _check_lists(q: Tensor, k: Tensor, idx: Tensor, block_size: int, shapes: str) -> None:
    fits = idx.ndim == 3 and idx.shape[:2] == (k.shape[1], q.shape[0]) and idx.shape[2] > 0
    if not fits or idx.is_floating_point():
        raise ShapeError(
            f"block_sparse_attention takes integer idx [K,T,n] with n at least 1; got {idx.dtype} "
            f"{tuple(idx.shape)} for {shapes}"
        )
    if block_size < 1:
        raise ShapeError(
            f"block_sparse_attention takes blocks of at least 1 key; got block_size {block_size}"
        )
