# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""Triton kernels of packed attention, forward: tiles of queries, and parts of the keys for decoding.

Rows of a tile are (token, head of the group) pairs of one key/value head, tokens first, so that the heads of
a group share each tile of keys and values, and a decode step of few tokens still fills a tile. Offsets stay
on the device: a tile finds its sequence by itself, in a grid that has room for every sequence's last, partly
filled one. Exponentials and logarithms are of base 2. Shape letters: T query tokens, S key tokens, N query
heads, K key/value heads, G = N / K, H query/key head size, V value head size, P parts, m rows of a tile, n
keys of a tile. Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691, algorithm 1); parts of the keys that are
merged afterwards as in Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from sateen.ops.triton import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MINUS_INF = tl.constexpr(float("-inf"))
# The interpreter of Triton 3.9 multiplies the bits of bfloat16 numbers; their products are exact in float32.
IS_WIDENED = tl.constexpr(INTERPRETED)
DYNAMIC = ("T", "num_sequences", "num_steps", "window", "num_blocks", "num_parts")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b in float32; float32 inputs at full precision."""
    if IS_WIDENED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sequence_of(tile, cu_ptr, rows_per_token, num_sequences, num_steps, BLOCK: tl.constexpr):
    """The sequence of a tile, when sequence b has the tiles from `cu[b] * rows_per_token // BLOCK + b` on."""
    low = tile * 0
    high = low + num_sequences
    for _ in range(num_steps):
        middle = (low + high) // 2
        is_right = tl.load(cu_ptr + middle) * rows_per_token // BLOCK + middle <= tile
        low = tl.where(is_right, middle, low)
        high = tl.where(is_right, high, middle)
    return low


@triton.jit
def is_visible(keys, positions, window, HAS_WINDOW: tl.constexpr):
    """Whether a query at a position sees a key; both are offsets in the sequence's keys."""
    seen = keys <= positions
    if HAS_WINDOW:
        seen &= keys > positions - window
    return seen


@triton.jit
def key_range(first, last, window, HAS_WINDOW: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys [low, high) that positions first..last see, and those [full_low, full_high) that all of them see.

    The latter begin and end at multiples of STEP, and are empty for steps below the tile's width: those need
    a mask.
    """
    high = tl.maximum(last + 1, 0)
    low = high * 0
    full_low = low
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0) // STEP * STEP
        full_low = (tl.maximum(last - window + 1, 0) + STEP - 1) // STEP * STEP
    full_high = tl.maximum(first + 1, 0) // STEP * STEP
    if STEP < BLOCK_N:
        full_high = low
    return low, high, full_low, full_high


@triton.jit
def _accumulate(
    acc_mV, top_m, total_m, block_top_m, q_mH, positions_m, start, stop, end, length_k, window, scale,
    k_ptr, v_ptr, k_stride, v_stride, block_max_ptrs, is_row,
    H: tl.constexpr, V: tl.constexpr, HAS_WINDOW: tl.constexpr, PIECES: tl.constexpr, IS_MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys [start, stop) of a tile whose keys end at `end`."""
    channels_H = tl.arange(0, BLOCK_H)
    channels_V = tl.arange(0, BLOCK_V)
    within = tl.arange(0, BLOCK_N)
    for at in range(start, stop, STEP):
        keys = at + within
        k_mask = channels_H[:, None] < H
        v_mask = channels_V[None, :] < V
        if IS_MASKED:
            is_key = (keys < length_k) & (within < STEP)
            k_mask &= is_key[None, :]
            v_mask &= is_key[:, None]
        k_Hn = tl.load(
            k_ptr + keys[None, :].to(tl.int64) * k_stride + channels_H[:, None], mask=k_mask, other=0.0
        )
        scores_mn = dot(q_mH, k_Hn, None) * scale
        if IS_MASKED:
            seen = is_visible(keys[None, :], positions_m[:, None], window, HAS_WINDOW) & is_key[None, :]
            scores_mn = tl.where(seen, scores_mn, MINUS_INF)
        tile_top_m = tl.max(scores_mn, 1)
        if PIECES > 0:
            # A block of maxima is PIECES tiles; the last one writes it.
            begins = at // STEP % PIECES == 0
            ends = (at // STEP % PIECES == PIECES - 1) | (at + STEP >= end)
            block_top_m = tl.where(begins, tile_top_m, tl.maximum(block_top_m, tile_top_m))
            tl.store(block_max_ptrs + at // (STEP * PIECES), block_top_m * LN_2, mask=is_row & ends)
        new_top_m = tl.maximum(top_m, tile_top_m)
        base_m = new_top_m
        if IS_MASKED:
            # A row that has seen no key yet would give exp2(-inf - -inf).
            base_m = tl.where(new_top_m == MINUS_INF, 0.0, new_top_m)
        shrink_m = tl.exp2(top_m - base_m)
        probs_mn = tl.exp2(scores_mn - base_m[:, None])
        total_m = total_m * shrink_m + tl.sum(probs_mn, 1)
        v_nV = tl.load(
            v_ptr + keys[:, None].to(tl.int64) * v_stride + channels_V[None, :], mask=v_mask, other=0.0
        )
        acc_mV = dot(probs_mn.to(v_nV.dtype), v_nV, acc_mV * shrink_m[:, None])
        top_m = new_top_m
    return acc_mV, top_m, total_m, block_top_m


@triton.jit
def _with_sink(total, top, sink_ptrs, mask):
    """The row's normaliser, relative to 2^top, with the sink's share."""
    base = tl.where(top == MINUS_INF, 0.0, top)
    return total + tl.exp2(tl.load(sink_ptrs, mask=mask, other=0.0) * LOG2_E - base)


@triton.jit
def _log_sum_exp(top, total):
    return tl.where(total > 0.0, (top + tl.log2(tl.where(total > 0.0, total, 1.0))) * LN_2, MINUS_INF)


@triton.jit(do_not_specialize=DYNAMIC)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, cu_q_ptr, cu_k_ptr, out_ptr, lse_ptr, block_max_ptr, top_ptr, total_ptr,
    T, num_sequences, num_steps, window, num_blocks, num_parts, scale,
    q_stride_t, q_stride_n, k_stride_s, k_stride_k, v_stride_s, v_stride_k,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_WINDOW: tl.constexpr, PIECES: tl.constexpr, IS_PART: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One tile of queries against its keys, or one part of them.

    Grid: tiles, K, parts. `scale` includes log2(e). Whole: `out` [T,N,V], `lse` [N,T] and, with PIECES tiles
    to a block, `block_max` [N,T,num_blocks]. In parts: `out` [P,T,N,V] without a normaliser, `top` and
    `total` [P,N,T].
    """
    # The last tiles of a causal sequence have the most keys, so they begin first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head_k = tl.program_id(1)
    part = tl.program_id(2)
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
    shift = length_k - length_q  # right-aligned: query t stands at key position t + shift
    positions = rows // G + shift
    last_row = tl.minimum(first_row + BLOCK_M, length_q * G) - 1
    low, high, full_low, full_high = key_range(
        first_row // G + shift, last_row // G + shift, window, HAS_WINDOW, STEP, BLOCK_N
    )
    if IS_PART:
        share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), num_parts), STEP) * STEP
        low += part * share
        high = tl.minimum(high, low + share)
    full_low = tl.minimum(tl.maximum(full_low, low), high)
    full_high = tl.maximum(tl.minimum(full_high, high), full_low)

    channels_H = tl.arange(0, BLOCK_H)
    q_ptrs = (
        q_ptr + tokens.to(tl.int64)[:, None] * q_stride_t + heads[:, None] * q_stride_n + channels_H[None, :]
    )
    q_mH = tl.load(q_ptrs, mask=is_row[:, None] & (channels_H[None, :] < H), other=0.0)
    k_ptr += k_start.to(tl.int64) * k_stride_s + head_k * k_stride_k
    v_ptr += k_start.to(tl.int64) * v_stride_s + head_k * v_stride_k
    stat_rows = heads.to(tl.int64) * T + tokens
    block_max_ptrs = block_max_ptr + stat_rows * num_blocks

    acc_mV = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    top_m = tl.full([BLOCK_M], MINUS_INF, dtype=tl.float32)
    total_m = tl.zeros([BLOCK_M], dtype=tl.float32)
    block_top_m = top_m
    acc_mV, top_m, total_m, block_top_m = _accumulate(
        acc_mV, top_m, total_m, block_top_m, q_mH, positions, low, full_low, high, length_k, window, scale,
        k_ptr, v_ptr, k_stride_s, v_stride_s, block_max_ptrs, is_row,
        H, V, HAS_WINDOW, PIECES, True, BLOCK_N, STEP, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    acc_mV, top_m, total_m, block_top_m = _accumulate(
        acc_mV, top_m, total_m, block_top_m, q_mH, positions, full_low, full_high, high,
        length_k, window, scale,
        k_ptr, v_ptr, k_stride_s, v_stride_s, block_max_ptrs, is_row,
        H, V, HAS_WINDOW, PIECES, False, BLOCK_N, STEP, BLOCK_H, BLOCK_V,
    )  # fmt: skip
    acc_mV, top_m, total_m, block_top_m = _accumulate(
        acc_mV, top_m, total_m, block_top_m, q_mH, positions, full_high, high, high, length_k, window, scale,
        k_ptr, v_ptr, k_stride_s, v_stride_s, block_max_ptrs, is_row,
        H, V, HAS_WINDOW, PIECES, True, BLOCK_N, STEP, BLOCK_H, BLOCK_V,
    )  # fmt: skip

    channels_V = tl.arange(0, BLOCK_V)
    out_rows = tokens.to(tl.int64) * N + heads
    out_mask = is_row[:, None] & (channels_V[None, :] < V)
    if IS_PART:
        out_rows += part.to(tl.int64) * T * N
        part_rows = part.to(tl.int64) * T * N + stat_rows
        tl.store(top_ptr + part_rows, top_m, mask=is_row)
        tl.store(total_ptr + part_rows, total_m, mask=is_row)
    else:
        tl.store(lse_ptr + stat_rows, _log_sum_exp(top_m, total_m), mask=is_row)
        norm_m = total_m
        if HAS_SINK:
            norm_m = _with_sink(total_m, top_m, sink_ptr + heads, is_row)
        acc_mV = acc_mV / tl.where(norm_m > 0.0, norm_m, 1.0)[:, None]
    out_ptrs = out_ptr + out_rows[:, None] * V + channels_V[None, :]
    tl.store(out_ptrs, acc_mV.to(out_ptr.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=("T", "num_parts"))
def merge_kernel(
    parts_ptr, top_ptr, total_ptr, sink_ptr, out_ptr, lse_ptr, T, num_parts,
    N: tl.constexpr, V: tl.constexpr, HAS_SINK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Joins the parts of one token and head. Grid: T, N."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    parts = tl.arange(0, BLOCK_P)
    channels_V = tl.arange(0, BLOCK_V)
    is_part = parts < num_parts
    rows = parts.to(tl.int64) * T * N
    stat_rows = rows + head * T + token
    tops = tl.load(top_ptr + stat_rows, mask=is_part, other=MINUS_INF)
    totals = tl.load(total_ptr + stat_rows, mask=is_part, other=0.0)
    top = tl.max(tops, 0)
    weights = tl.exp2(tops - tl.where(top == MINUS_INF, 0.0, top))
    total = tl.sum(weights * totals, 0)
    tl.store(lse_ptr + head * T + token, _log_sum_exp(top, total))
    norm = total
    if HAS_SINK:
        norm = _with_sink(total, top, sink_ptr + head, True)
    values_PV = tl.load(
        parts_ptr + (rows + token * N + head)[:, None] * V + channels_V[None, :],
        mask=is_part[:, None] & (channels_V[None, :] < V), other=0.0,
    )  # fmt: skip
    out_V = tl.sum(weights[:, None] * values_PV, 0) / tl.where(norm > 0.0, norm, 1.0)
    out_ptrs = out_ptr + (token * N + head) * V + channels_V
    tl.store(out_ptrs, out_V.to(out_ptr.dtype.element_ty), mask=channels_V < V)
