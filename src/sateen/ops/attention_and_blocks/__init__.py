"""Causal attention and, from the same scores, the key blocks that mattered to each query."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.ops.attention_and_blocks.chunked import attention_and_blocks_torch
from sateen.ops.attention_and_blocks.native import attention_and_blocks_native
from sateen.ops.attention_and_blocks.reference import OP, attention_and_blocks_reference
from sateen.ops.packed import check_packed

__all__ = [
    "OP",
    "attention_and_blocks",
    "attention_and_blocks_native",
    "attention_and_blocks_reference",
    "attention_and_blocks_torch",
]


def attention_and_blocks(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    forced_window: int | None = None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    sink_N: Tensor | None = None,
    aggregate: str = "max",
    lists_KTn: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal softmax attention, and the blocks with the largest attention probability per query and K head.

    Args:
        q_TNH: queries, packed over sequences; T tokens, N heads, H channels.
        k_SKH: keys, every one since the first of each sequence; K divides N.
        v_SKV: values; V may differ from H.
        block_size: keys per block, counted from a sequence's first key; 1 chooses single tokens.
        num_blocks: blocks chosen by probability, the largest over the block's keys.
        forced_window: also list every block that holds one of this many newest keys; such blocks are left out
            of the ranking, so that they take nothing from its budget.
        cu_seqlens_q: int32 [B + 1], offsets of the sequences' queries; first 0, last T.
        cu_seqlens_k: the same for keys, last S; equal to `cu_seqlens_q` when None. A sequence with more keys
            than queries is right-aligned: its last query sees its last key.
        scale: multiplier of the scores; 1/sqrt(H) when None.
        sink_N: a logit per query head that joins the softmax without a value; the choice leaves it out.
        aggregate: how the heads of a group rank a block together: by the `max` of their probabilities, as in
            the paper, or by their `mean`.
        lists_KTn: what an earlier call with these arguments chose; it comes back, and backends need not
            choose again.
        backend: `auto`, or one of `OP.backends`.

    Returns:
        The output [T, N, V] in q's dtype, and int32 lists [K, T, n]: first `num_blocks` chosen blocks,
        ascending, ties to the lower index, padded with -1; then, with a forced window, its blocks in the same
        way. Memory is O(T). Only the output is differentiable; the lists carry no gradient.

    Raises:
        ShapeError: the tensors or offsets do not fit, or a count is below 1.
        BackendUnavailable: the named backend cannot run this call.

    Source: HySparse (arXiv 2602.03560) eq. 3 and §3.2; the union with a window is HySparse2's
    (arXiv 2609.26368).
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    check_packed("attention_and_blocks", q_TNH, k_SKH, v_SKV, cu_seqlens_q, cu_seqlens_k, sink=sink_N)
    if block_size < 1 or num_blocks < 1 or (forced_window is not None and forced_window < 1):
        raise ShapeError(
            "attention_and_blocks takes a block_size, num_blocks and forced_window of at least 1; got "
            f"{block_size}, {num_blocks}, {forced_window}"
        )
    if aggregate not in ("max", "mean"):
        raise ShapeError(f"attention_and_blocks: aggregate {aggregate!r} must be 'max' or 'mean'")
    # Autocast would lower the matrix products inside the backends; scores and sums are float32 by contract.
    with torch.autocast(q_TNH.device.type, enabled=False):
        found: tuple[Tensor, Tensor] = OP(
            q_TNH,
            k_SKH,
            v_SKV,
            block_size=block_size,
            num_blocks=num_blocks,
            forced_window=forced_window,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=q_TNH.shape[-1] ** -0.5 if scale is None else scale,
            sink_N=sink_N,
            aggregate=aggregate,
            lists_KTn=lists_KTn,
            backend=backend,
        )
    return found
