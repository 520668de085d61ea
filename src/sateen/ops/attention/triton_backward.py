# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Triton kernels of packed attention, backward: one over tiles of queries, one over tiles of keys.

Each program owns the rows it writes, so there are no atomic additions and results repeat bit by bit. Tiles
and shape letters are those of `triton_forward`; `norm` is the base-2 logarithm of a row's normaliser, sink
included.
Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691, algorithm 2).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sateen.ops.attention.triton_forward import LOG2_E, MINUS_INF, dot, is_visible, key_range, sequence_of

DYNAMIC = ("T", "num_sequences", "num_steps", "window")


@triton.jit
def _query_gradient(
    dq_mH, q_mH, d_out_mV, norm_m, delta_m, positions_m, start, stop, length_k, window, scale_2,
    k_ptr, v_ptr, k_stride, v_stride,
    H: tl.constexpr, V: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    channels_H = tl.arange(0, BLOCK_H)
    channels_V = tl.arange(0, BLOCK_V)
    for at in range(start, stop, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        k_mask = channels_H[:, None] < H
        v_mask = channels_V[:, None] < V
        if IS_MASKED:
            k_mask &= keys[None, :] < length_k
            v_mask &= keys[None, :] < length_k
        rows = keys[None, :].to(tl.int64)
        k_Hn = tl.load(k_ptr + rows * k_stride + channels_H[:, None], mask=k_mask, other=0.0)
        v_Vn = tl.load(v_ptr + rows * v_stride + channels_V[:, None], mask=v_mask, other=0.0)
        scores_mn = dot(q_mH, k_Hn, None) * scale_2
        if IS_MASKED:
            seen = is_visible(keys[None, :], positions_m[:, None], window, HAS_WINDOW)
            scores_mn = tl.where(seen & (keys[None, :] < length_k), scores_mn, MINUS_INF)
        probs_mn = tl.exp2(scores_mn - norm_m[:, None])
        d_probs_mn = dot(d_out_mV, v_Vn, None)
        d_scores_mn = probs_mn * (d_probs_mn - delta_m[:, None])
        dq_mH = dot(d_scores_mn.to(k_Hn.dtype), tl.trans(k_Hn), dq_mH)
    return dq_mH


@triton.jit(do_not_specialize=DYNAMIC)
def query_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sink_ptr, cu_q_ptr, cu_k_ptr,
    d_q_ptr, norm_ptr, delta_ptr, T, num_sequences, num_steps, window, scale,
    q_stride_t, q_stride_n, k_stride_s, k_stride_k, v_stride_s, v_stride_k, d_stride_t, d_stride_n,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """d_q [T,N,H] of one tile of queries; leaves `norm` and `delta` = rows of d_out * out, both [N,T].

    Grid: tiles, K.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_k = tl.program_id(1)
    b = sequence_of(tile, cu_q_ptr, G, num_sequences, num_steps, BLOCK_M)
    q_start = tl.load(cu_q_ptr + b)
    k_start = tl.load(cu_k_ptr + b)
    length_q = tl.load(cu_q_ptr + b + 1) - q_start
    length_k = tl.load(cu_k_ptr + b + 1) - k_start
    first_row = (tile - (q_start * G // BLOCK_M + b)) * BLOCK_M
    if first_row >= length_q * G:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < length_q * G
    heads = head_k * G + rows % G
    tokens = q_start + rows // G
    shift = length_k - length_q
    positions = rows // G + shift
    last_row = tl.minimum(first_row + BLOCK_M, length_q * G) - 1
    low, high, full_low, full_high = key_range(
        first_row // G + shift, last_row // G + shift, window, HAS_WINDOW, BLOCK_N, BLOCK_N
    )
    full_low = tl.minimum(full_low, high)
    full_high = tl.maximum(tl.minimum(full_high, high), full_low)

    channels_H = tl.arange(0, BLOCK_H)
    channels_V = tl.arange(0, BLOCK_V)
    H_mask = is_row[:, None] & (channels_H[None, :] < H)
    V_mask = is_row[:, None] & (channels_V[None, :] < V)
    wide = tokens.to(tl.int64)[:, None]
    out_rows = tokens.to(tl.int64) * N + heads
    stat_rows = heads.to(tl.int64) * T + tokens
    q_mH = tl.load(
        q_ptr + wide * q_stride_t + heads[:, None] * q_stride_n + channels_H[None, :], mask=H_mask, other=0.0
    )
    d_out_mV = tl.load(
        d_out_ptr + wide * d_stride_t + heads[:, None] * d_stride_n + channels_V[None, :],
        mask=V_mask,
        other=0.0,
    )
    out_mV = tl.load(out_ptr + out_rows[:, None] * V + channels_V[None, :], mask=V_mask, other=0.0)
    delta_m = tl.sum(d_out_mV.to(tl.float32) * out_mV.to(tl.float32), 1)
    norm_m = tl.load(lse_ptr + stat_rows, mask=is_row, other=0.0) * LOG2_E
    if HAS_SINK:
        sink_m = tl.load(sink_ptr + heads, mask=is_row, other=0.0) * LOG2_E
        top_m = tl.maximum(norm_m, sink_m)
        base_m = tl.where(tl.abs(top_m) == float("inf"), 0.0, top_m)
        norm_m = base_m + tl.log2(tl.maximum(tl.exp2(norm_m - base_m) + tl.exp2(sink_m - base_m), 1e-37))
        norm_m = tl.where(top_m == float("inf"), top_m, norm_m)
        norm_m = tl.where(top_m == MINUS_INF, MINUS_INF, norm_m)
    # A row without keys: any finite number, because its scores are all -inf.
    norm_m = tl.where(norm_m == MINUS_INF, 0.0, norm_m)
    tl.store(delta_ptr + stat_rows, delta_m, mask=is_row)
    tl.store(norm_ptr + stat_rows, norm_m, mask=is_row)

    k_ptr += k_start.to(tl.int64) * k_stride_s + head_k * k_stride_k
    v_ptr += k_start.to(tl.int64) * v_stride_s + head_k * v_stride_k
    scale_2 = scale * LOG2_E
    dq_mH = tl.zeros([BLOCK_M, BLOCK_H], dtype=tl.float32)
    dq_mH = _query_gradient(
        dq_mH, q_mH, d_out_mV, norm_m, delta_m, positions, low, full_low, length_k, window, scale_2,
        k_ptr, v_ptr, k_stride_s, v_stride_s, H, V, HAS_WINDOW, True, BLOCK_N, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    dq_mH = _query_gradient(
        dq_mH, q_mH, d_out_mV, norm_m, delta_m, positions, full_low, full_high, length_k, window, scale_2,
        k_ptr, v_ptr, k_stride_s, v_stride_s, H, V, HAS_WINDOW, False, BLOCK_N, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    dq_mH = _query_gradient(
        dq_mH, q_mH, d_out_mV, norm_m, delta_m, positions, full_high, high, length_k, window, scale_2,
        k_ptr, v_ptr, k_stride_s, v_stride_s, H, V, HAS_WINDOW, True, BLOCK_N, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    d_q_ptrs = d_q_ptr + out_rows[:, None] * H + channels_H[None, :]
    tl.store(d_q_ptrs, (dq_mH * scale).to(d_q_ptr.dtype.element_ty), mask=H_mask)


@triton.jit
def _key_gradient(
    dk_nH, dv_nV, k_nH, v_nV, keys_n, start, stop, end_row, shift, window, scale_2,
    q_ptr, d_out_ptr, norm_ptr, delta_ptr, T, q_stride_t, q_stride_n, d_stride_t, d_stride_n,
    G: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HAS_WINDOW: tl.constexpr, IS_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    channels_H = tl.arange(0, BLOCK_H)
    channels_V = tl.arange(0, BLOCK_V)
    for at in range(start, stop, BLOCK_M):
        rows = at + tl.arange(0, BLOCK_M)
        is_row = rows < end_row
        tokens = (rows // G).to(tl.int64)
        heads = (rows % G).to(tl.int64)
        # Rows behind the last count as zeros everywhere, so they add nothing.
        q_Hm = tl.load(
            q_ptr + tokens[None, :] * q_stride_t + heads[None, :] * q_stride_n + channels_H[:, None],
            mask=is_row[None, :] & (channels_H[:, None] < H), other=0.0,
        )  # fmt: skip
        d_out_mV = tl.load(
            d_out_ptr + tokens[:, None] * d_stride_t + heads[:, None] * d_stride_n + channels_V[None, :],
            mask=is_row[:, None] & (channels_V[None, :] < V), other=0.0,
        )  # fmt: skip
        norm_m = tl.load(norm_ptr + heads * T + tokens, mask=is_row, other=0.0)
        delta_m = tl.load(delta_ptr + heads * T + tokens, mask=is_row, other=0.0)
        scores_nm = dot(k_nH, q_Hm, None) * scale_2
        if IS_MASKED:
            seen = is_visible(keys_n[:, None], (rows // G + shift)[None, :], window, HAS_WINDOW)
            scores_nm = tl.where(seen, scores_nm, MINUS_INF)
        probs_nm = tl.exp2(scores_nm - norm_m[None, :])
        dv_nV = dot(probs_nm.to(d_out_mV.dtype), d_out_mV, dv_nV)
        d_probs_nm = dot(v_nV, tl.trans(d_out_mV), None)
        d_scores_nm = probs_nm * (d_probs_nm - delta_m[None, :])
        dk_nH = dot(d_scores_nm.to(q_Hm.dtype), tl.trans(q_Hm), dk_nH)
    return dk_nH, dv_nV


@triton.jit(do_not_specialize=DYNAMIC)
def key_gradient_kernel(
    d_out_ptr, q_ptr, k_ptr, v_ptr, norm_ptr, delta_ptr, cu_q_ptr, cu_k_ptr, d_k_ptr, d_v_ptr,
    T, num_sequences, num_steps, window, scale,
    q_stride_t, q_stride_n, k_stride_s, k_stride_k, v_stride_s, v_stride_k, d_stride_t, d_stride_n,
    K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr, HAS_WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """d_k [S,K,H] and d_v [S,K,V] of one tile of keys, summed over the heads of the group. Grid: tiles, K."""
    tile = tl.program_id(0)
    head_k = tl.program_id(1)
    b = sequence_of(tile, cu_k_ptr, 1, num_sequences, num_steps, BLOCK_N)
    q_start = tl.load(cu_q_ptr + b)
    k_start = tl.load(cu_k_ptr + b)
    length_q = tl.load(cu_q_ptr + b + 1) - q_start
    length_k = tl.load(cu_k_ptr + b + 1) - k_start
    first_key = (tile - (k_start // BLOCK_N + b)) * BLOCK_N
    if first_key >= length_k:
        return

    keys = first_key + tl.arange(0, BLOCK_N)
    is_key = keys < length_k
    last_key = tl.minimum(first_key + BLOCK_N, length_k) - 1
    shift = length_k - length_q
    # Rows [low, high) see some of the keys, rows [full_low, full_high) all of them.
    low = tl.maximum(first_key - shift, 0) * G
    high = length_q * G
    full_high = high
    if HAS_WINDOW:
        high = tl.minimum(high, tl.maximum(last_key + window - shift, 0) * G)
        full_high = tl.minimum(high, tl.maximum(first_key + window - shift, 0) * G)
    full_low = low + tl.cdiv(tl.maximum(last_key - shift, 0) * G - low, BLOCK_M) * BLOCK_M
    full_low = tl.minimum(full_low, tl.maximum(high, low))
    full_high = tl.maximum(low + tl.maximum(full_high - low, 0) // BLOCK_M * BLOCK_M, full_low)

    channels_H = tl.arange(0, BLOCK_H)
    channels_V = tl.arange(0, BLOCK_V)
    H_mask = is_key[:, None] & (channels_H[None, :] < H)
    V_mask = is_key[:, None] & (channels_V[None, :] < V)
    wide = (k_start + keys).to(tl.int64)[:, None]
    k_nH = tl.load(
        k_ptr + wide * k_stride_s + head_k * k_stride_k + channels_H[None, :], mask=H_mask, other=0.0
    )
    v_nV = tl.load(
        v_ptr + wide * v_stride_s + head_k * v_stride_k + channels_V[None, :], mask=V_mask, other=0.0
    )
    start = q_start.to(tl.int64)
    first_head = (head_k * G).to(tl.int64)
    q_ptr += start * q_stride_t + first_head * q_stride_n
    d_out_ptr += start * d_stride_t + first_head * d_stride_n
    norm_ptr += first_head * T + start
    delta_ptr += first_head * T + start

    dk_nH = tl.zeros([BLOCK_N, BLOCK_H], dtype=tl.float32)
    dv_nV = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    dk_nH, dv_nV = _key_gradient(
        dk_nH, dv_nV, k_nH, v_nV, keys, low, full_low, high, shift, window, scale * LOG2_E,
        q_ptr, d_out_ptr, norm_ptr, delta_ptr, T, q_stride_t, q_stride_n, d_stride_t, d_stride_n,
        G, H, V, HAS_WINDOW, True, BLOCK_M, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    dk_nH, dv_nV = _key_gradient(
        dk_nH, dv_nV, k_nH, v_nV, keys, full_low, full_high, high, shift, window, scale * LOG2_E,
        q_ptr, d_out_ptr, norm_ptr, delta_ptr, T, q_stride_t, q_stride_n, d_stride_t, d_stride_n,
        G, H, V, HAS_WINDOW, False, BLOCK_M, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    dk_nH, dv_nV = _key_gradient(
        dk_nH, dv_nV, k_nH, v_nV, keys, full_high, high, high, shift, window, scale * LOG2_E,
        q_ptr, d_out_ptr, norm_ptr, delta_ptr, T, q_stride_t, q_stride_n, d_stride_t, d_stride_n,
        G, H, V, HAS_WINDOW, True, BLOCK_M, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    K_rows = wide * K + head_k
    d_k_ptrs = d_k_ptr + K_rows * H + channels_H[None, :]
    d_v_ptrs = d_v_ptr + K_rows * V + channels_V[None, :]
    tl.store(d_k_ptrs, (dk_nH * scale).to(d_k_ptr.dtype.element_ty), mask=H_mask)
    tl.store(d_v_ptrs, dv_nV.to(d_v_ptr.dtype.element_ty), mask=V_mask)
