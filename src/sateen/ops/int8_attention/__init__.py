"""Softmax attention with int8 queries, keys and values: integer products, an online softmax in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ShapeError, unknown_name
from sateen.ops.int8_attention.int4 import MAX_ERROR, check_error
from sateen.ops.int8_attention.native import int8_attention_native, int8_rows_attention_native
from sateen.ops.int8_attention.quantize import Int8Rows, integer_matmul, quantize_int8, quantize_rows
from sateen.ops.int8_attention.reference import INT4_CHANNELS, OP, P_LEVELS, ROWS_OP
from sateen.ops.int8_attention.triton_backend import int8_attention_triton, int8_rows_triton
from sateen.ops.packed import check_packed

__all__ = [
    "OP",
    "ROWS_OP",
    "Int8Rows",
    "int8_attention",
    "int8_attention_native",
    "int8_attention_triton",
    "int8_rows_attention",
    "int8_rows_attention_native",
    "int8_rows_triton",
    "int8_sdpa",
    "integer_matmul",
    "quantize_int8",
    "quantize_rows",
]

MAX_BLOCK = 65536  # keys whose products with P, at most 255 * 127 each, still add up within int32


@torch.no_grad()
def int8_attention(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sink_N: Tensor | None = None,
    smooth_k: bool = True,
    qk: str = "int8",
    max_error: float = MAX_ERROR,
    pv: str = "int8",
    p_bits: str = "u8",
    v_granularity: str = "channel",
    row_sum: str = "float",
    block_size: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Attention with int8 queries, keys and values over packed sequences.

    Args:
        q_TNH: float queries, packed over sequences; T tokens, N heads, H channels. One scale per token.
        k_SKH: float keys; K divides N (grouped-query attention). One scale per token.
        v_SKV: float values; V may differ from H.
        cu_seqlens_q: int32 [B + 1], offsets of the sequences' queries; first 0, last T.
        cu_seqlens_k: the same for keys, last S; equal to `cu_seqlens_q` when None. A sequence with more keys
            than queries is right-aligned: its last query sees its last key.
        causal: a query sees no later key; otherwise it sees all keys of its sequence.
        scale: multiplier of the scores; 1/sqrt(H) when None.
        window: keys each query sees, its own included; needs `causal`.
        sink_N: a logit per query head that joins the softmax without a value and without `scale`.
        smooth_k: quantise keys less their mean over the sequence; the softmax does not change.
        qk: codes of queries and keys: `int8`, or `int4`, an experiment of the reference: -7..7 with a scale
            per token and 16 channels, every call measured against float attention.
        max_error: with `int4`, the largest relative L2 error that 64 queries of each sequence may have.
        pv: `int8`, or `float` for the paper's half-INT8 form, whose values and P stay in floating point.
        p_bits: codes of P: `u8` 0..255, or the paper's `s8` 0..127.
        v_granularity: one scale of the values per sequence and head (`head`) or also per `channel`.
        row_sum: what the softmax divides by: the sum of P as floats (`float`) or of its codes (`int8`).
        block_size: keys per block; P is rounded against the running maximum of the blocks so far. None: the
            backend's own.
        return_lse: also return the log-sum-exp of the scaled scores, float32 [N, T], the sink not included.
        backend: `auto`, or one of `OP.backends`.

    Returns:
        The output [T, N, V] in q's dtype, with the log-sum-exp where asked for; not differentiable. A query
        that sees no key gives zeros and a log-sum-exp of -inf.

    Raises:
        ShapeError: shapes, offsets or settings that do not fit together.
        BackendUnavailable: the named backend cannot run this call.
        AccuracyError: `int4` errs by more than `max_error` on these inputs.

    Numerics: relative L2 error at 1,024 tokens and H = 64 against float attention is 1.6 % on N(0, 1) and
    0.4 % on U(-0.5, 0.5) (tests/ops/test_int8_attention.py). Values of one sequence share their scales, so a
    token's output depends on later tokens within that error, `causal` or not.
    Source: Chen et al. 2024, "INT-FlashAttention" (arXiv 2409.16997), algorithm 1. Ours: `smooth_k` (as
    SageAttention, arXiv 2410.02367), `u8`, `channel` and the float row sum; the paper's form is
    `smooth_k=False, p_bits="s8", v_granularity="head", row_sum="int8"`.
    """
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    check_packed(
        "int8_attention", q_TNH, k_SKH, v_SKV, cu_seqlens_q, cu_seqlens_k, window=window, sink=sink_N
    )
    for name, value, known in (
        ("qk", qk, ("int8", "int4")),
        ("pv", pv, ("int8", "float")),
        ("p_bits", p_bits, tuple(P_LEVELS)),
        ("v_granularity", v_granularity, ("channel", "head")),
        ("row_sum", row_sum, ("float", "int8")),
    ):
        if value not in known:
            raise ShapeError(unknown_name(f"int8_attention {name}", value, known))
    if window is not None and not causal:
        raise ShapeError(f"int8_attention window {window} needs causal=True")
    if pv == "float" and row_sum == "int8":
        raise ShapeError("int8_attention row_sum 'int8' needs pv='int8': with pv='float' P has no codes")
    if qk == "int4" and q_TNH.shape[-1] % INT4_CHANNELS:
        raise ShapeError(
            f"int8_attention qk='int4' takes heads of a multiple of {INT4_CHANNELS} channels; got "
            f"{q_TNH.shape[-1]}; use qk='int8'"
        )
    if scale is None:
        scale = q_TNH.shape[-1] ** -0.5
    with torch.autocast(q_TNH.device.type, enabled=False):
        out: Tensor | tuple[Tensor, ...] = OP(
            q_TNH,
            k_SKH,
            v_SKV,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            causal=causal,
            scale=scale,
            window=window,
            sink_N=sink_N,
            smooth_k=smooth_k,
            pv=pv,
            p_bits=p_bits,
            v_granularity=v_granularity,
            row_sum=row_sum,
            return_lse=return_lse,
            backend=backend,
            **({} if qk == "int8" else {"qk": qk}),
            **_block(block_size),
        )
        if qk == "int4":
            check_error(
                out[0] if isinstance(out, tuple) else out, q_TNH, k_SKH, v_SKV,
                cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, scale=scale, sink_N=sink_N,
                causal=causal, window=window, max_error=max_error,
            )  # fmt: skip
    return out


def int8_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    **options: object,
) -> Tensor | tuple[Tensor, ...]:
    """`int8_attention` in the layout of torch's `scaled_dot_product_attention`.

    Args:
        q: [B, N, T, H].
        k: [B, K, S, H]; K divides N.
        v: [B, K, S, V].
        causal: right-aligned where S differs from T: the last query sees the last key, unlike torch's
            `is_causal`.
        scale: multiplier of the scores; 1/sqrt(H) when None.
        return_lse: also return the log-sum-exp, float32 [B, N, T].
        options: the other arguments of `int8_attention`.

    Returns:
        [B, N, T, V] in q's dtype, with the log-sum-exp where asked for.

    Raises:
        ShapeError: as `int8_attention`.
    """
    if not (q.ndim == k.ndim == v.ndim == 4) or not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ShapeError(
            f"int8_sdpa takes q [B,N,T,H], k [B,K,S,H], v [B,K,S,V]; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, N, T, _ = q.shape
    count = torch.arange(B + 1, dtype=torch.int32, device=q.device)
    packed = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    result = int8_attention(
        *packed, cu_seqlens_q=count * T, cu_seqlens_k=count * k.shape[2], causal=causal, scale=scale,
        return_lse=return_lse, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    out = result[0] if isinstance(result, tuple) else result
    out = out.view(B, T, N, v.shape[-1]).transpose(1, 2)
    return (out, result[1].view(N, B, T).transpose(0, 1)) if isinstance(result, tuple) else out


@torch.no_grad()
def int8_rows_attention(
    q_TNH: Tensor,
    rows: Int8Rows,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None = None,
    window: int | None = None,
    sink_N: Tensor | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention over keys and values that a cache holds as int8 rows.

    As `int8_attention`, except that values have one scale per token, so that a row never changes once it is
    written: the scale joins P, which is then quantised to u8 per query and key block.

    Args:
        q_TNH: float queries; quantised here, one scale per token.
        rows: what the cache holds; S rows over B sequences.
        cu_seqlens_q, cu_seqlens_k, scale, window, sink_N, block_size, return_lse: as in `int8_attention`.
        backend: `auto`, or one of `ROWS_OP.backends`.

    Returns:
        As `int8_attention`.

    Raises:
        ShapeError, BackendUnavailable: as `int8_attention`.
    """
    check_packed(
        "int8_attention",
        q_TNH,
        rows.k_SKH,
        rows.v_SKV,
        cu_seqlens_q,
        cu_seqlens_k,
        window=window,
        sink=sink_N,
    )
    with torch.autocast(q_TNH.device.type, enabled=False):
        out: Tensor | tuple[Tensor, ...] = ROWS_OP(
            q_TNH,
            rows,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=q_TNH.shape[-1] ** -0.5 if scale is None else scale,
            window=window,
            sink_N=sink_N,
            return_lse=return_lse,
            backend=backend,
            **_block(block_size),
        )
    return out


def _block(block_size: int | None) -> dict[str, int]:
    if block_size is None:
        return {}
    if not 1 <= block_size <= MAX_BLOCK:
        raise ShapeError(f"int8_attention block_size is 1 to {MAX_BLOCK}; got {block_size}")
    return {"block_size": block_size}
