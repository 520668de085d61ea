"""The forward kernel of int8 attention: a program takes a tile of queries and one head.

It walks the key blocks in up to three stages, of which only the first and the last mask keys one by one. All
stages carry the running maximum on; the published Triton kernel drops it between its two stages and with it
everything before the diagonal. Shape letters as in `__init__.py`; B sequences, M key blocks.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sateen.ops.int8_attention.triton_quantize import (
    padded,
    quantize_keys_and_values,
    quantize_tile,
    round_even,
)
from sateen.ops.spans import cut
from sateen.ops.triton import dot_dtype

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _walk(
    acc, total, top, q8, q_scale, k8, k_scale, v, v_sum, v_s, first, stop, length, place, window,
    BLOCK: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_CODES: tl.constexpr,
    LEVELS: tl.constexpr, SUM_CODES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One stage over the blocks [first, stop) of a sequence, at whose keys all pointers begin."""
    j, h, w = tl.arange(0, TILE), tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    for number in range(first, stop):
        key = number * BLOCK + j
        if MASKED or TILE != BLOCK:
            here = (j < BLOCK) & (key < length)
            k_tile = tl.load(k8 + key.to(tl.int64)[:, None] * H_PAD + h[None, :], mask=here[:, None], other=0)
            step = tl.load(k_scale + key, mask=here, other=0.0)
        else:
            k_tile = tl.load(k8 + key.to(tl.int64)[:, None] * H_PAD + h[None, :])
            step = tl.load(k_scale + key)
        products = tl.dot(q8, tl.trans(k_tile), out_dtype=tl.int32)
        scores = products.to(tl.float32) * q_scale[:, None] * step[None, :]
        if MASKED or TILE != BLOCK:
            scores = tl.where(here[None, :], scores, float("-inf"))
            if CAUSAL:
                scores = tl.where(key[None, :] <= place[:, None], scores, float("-inf"))
            if HAS_WINDOW:
                scores = tl.where(key[None, :] > place[:, None] - window, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # rows that have seen nothing yet
        probs = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(top - finite)
        top = new_top
        if HAS_CODES:
            codes = round_even(probs * LEVELS)
            summed = tl.sum(codes, 1) / LEVELS if SUM_CODES else tl.sum(probs, 1)
            v_tile = tl.load(v + (number * V_PAD + w).to(tl.int64)[:, None] * TILE + j[None, :])
            if LEVELS == 255:
                # Both factors have to be signed: codes less 128, and 128 times the sum of the values.
                product = tl.dot((codes - 128.0).to(tl.int8), tl.trans(v_tile), out_dtype=tl.int32)
                product += 128 * tl.load(v_sum + number * V_PAD + w)[None, :]
            else:
                product = tl.dot(codes.to(tl.int8), tl.trans(v_tile), out_dtype=tl.int32)
            acc = acc * decay[:, None] + product.to(tl.float32)
        else:
            summed = tl.sum(probs, 1)
            source = v + key.to(tl.int64)[:, None] * v_s + w[None, :]
            v_tile = tl.load(
                source, mask=((j < BLOCK) & (key < length))[:, None] & (w[None, :] < V), other=0.0
            )
            acc = acc * decay[:, None] + tl.dot(probs.to(DOT), v_tile.to(DOT), input_precision="ieee")
        total = total * decay + summed
    return acc, total, top


@triton.jit
def _forward(
    q, k8, k_scale, k_mean, v, v_scale, v_sum, sink, out, lse,
    tile_rows, tile_places, tile_counts, tile_sequences, cu_q, cu_k, first_block,
    q_t, q_n, v_s, v_k, T, S, M, scale, scale_log2, window,
    G: tl.constexpr, H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, SMOOTH: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_CODES: tl.constexpr, LEVELS: tl.constexpr, SUM_CODES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    N = tl.num_programs(1)
    head, K = n // G, N // G
    count = tl.load(tile_counts + tile)
    b = tl.load(tile_sequences + tile).to(tl.int64)
    k_row = tl.load(cu_k + b)
    length = tl.load(cu_k + b + 1) - k_row
    first_place = tl.load(tile_places + tile) + length - (tl.load(cu_q + b + 1) - tl.load(cu_q + b))
    last_place = first_place + count - 1
    row, h, w = tl.arange(0, ROWS), tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    t = tl.load(tile_rows + tile).to(tl.int64) + row
    used = row < count
    x = tl.load(q + t[:, None] * q_t + n * q_n + h[None, :], mask=used[:, None] & (h[None, :] < H), other=0.0)
    x = x.to(tl.float32)
    q8, q_scale = quantize_tile(x)
    q_scale = q_scale * scale_log2

    # Blocks [first, full_first) and [full_stop, stop) hold keys that some query of the tile does not see.
    stop = (length + BLOCK - 1) // BLOCK
    full_stop = length // BLOCK
    if CAUSAL:
        stop = tl.minimum(stop, tl.maximum(last_place + BLOCK, 0) // BLOCK)
        full_stop = tl.minimum(full_stop, tl.maximum(first_place + 1, 0) // BLOCK)
    stop = tl.where(count > 0, stop, 0)
    first = 0
    full_first = 0
    if HAS_WINDOW:
        first = tl.maximum(first_place - window + 1, 0) // BLOCK
        full_first = tl.minimum((tl.maximum(last_place - window + 1, 0) + BLOCK - 1) // BLOCK, stop)
    full_stop = tl.maximum(tl.minimum(full_stop, stop), full_first)

    place = first_place + row
    k8 += (head * S + k_row) * H_PAD
    k_scale += head * S + k_row
    if HAS_CODES:
        block = head * M + tl.load(first_block + b)
        v += block * V_PAD * TILE
        v_sum += block * V_PAD
    else:
        v += k_row.to(tl.int64) * v_s + head * v_k
    acc = tl.zeros([ROWS, V_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    if HAS_WINDOW:
        acc, total, top = _walk(
            acc, total, top, q8, q_scale, k8, k_scale, v, v_sum, v_s, first, full_first, length, place,
            window, BLOCK, V, TILE, H_PAD, V_PAD, True, CAUSAL, HAS_WINDOW, HAS_CODES, LEVELS, SUM_CODES, DOT,
        )  # fmt: skip
    acc, total, top = _walk(
        acc, total, top, q8, q_scale, k8, k_scale, v, v_sum, v_s, full_first, full_stop, length, place,
        window, BLOCK, V, TILE, H_PAD, V_PAD, False, CAUSAL, HAS_WINDOW, HAS_CODES, LEVELS, SUM_CODES, DOT,
    )  # fmt: skip
    acc, total, top = _walk(
        acc, total, top, q8, q_scale, k8, k_scale, v, v_sum, v_s, full_stop, stop, length, place, window,
        BLOCK, V, TILE, H_PAD, V_PAD, True, CAUSAL, HAS_WINDOW, HAS_CODES, LEVELS, SUM_CODES, DOT,
    )  # fmt: skip

    some = total > 0
    divisor = tl.where(some, total, 1.0)
    whole = tl.where(some, tl.where(some, top, 0.0) * LN_2 + tl.log(divisor), float("-inf"))
    if SMOOTH:
        # The scores lack scale * q·mean in every column: nothing to the softmax, something to a sink.
        middle = tl.load(k_mean + (b * K + head) * H + h, mask=h < H, other=0.0)
        whole += scale * tl.sum(x * middle[None, :], 1)
    acc = acc / divisor[:, None]
    if HAS_CODES:
        acc = acc * (tl.load(v_scale + (b * K + head) * V + w, mask=w < V, other=0.0) / LEVELS)[None, :]
    if HAS_SINK:
        acc = acc / (1.0 + tl.exp(tl.load(sink + n).to(tl.float32) - whole))[:, None]
    tl.store(lse + n * T + t, whole, mask=used)
    tl.store(
        out + (t[:, None] * N + n) * V + w[None, :],
        acc.to(out.dtype.element_ty),
        mask=used[:, None] & (w[None, :] < V),
    )


class Tiles(NamedTuple):
    """What may be tuned without a change of results: query rows, warps of a program, key tiles in flight."""

    rows: int
    num_warps: int
    num_stages: int


def tiles_for(H: int, V: int, tile: int, num_queries: float) -> Tiles:
    """Tile sizes by head sizes, keys of a block and queries of a sequence; not tuned on a GPU."""
    width = max(padded(H), padded(V))
    rows = 128 if num_queries > 64 else 64 if num_queries > 32 else 32
    if tile > 64 or width > 128:
        rows = min(rows, 64)
    stages = 3 if width * tile <= 64 * 128 else 2 if width * tile <= 128 * 128 else 1
    return Tiles(rows, 8 if rows * max(width, tile) >= 128 * 128 else 4, stages)


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None, *,
    causal: bool, scale: float, window: int | None, smooth_k: bool, pv: str, levels: int,
    v_granularity: str, row_sum: str, block_size: int, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [T, N, V] in q's dtype and the log-sum-exp [N, T]; offsets are int32."""
    (T, N, H), (S, K, V) = q.shape, v.shape
    out = torch.empty(T, N, V, dtype=q.dtype, device=q.device)
    lse = torch.empty(N, T, device=q.device)
    if T == 0:
        return out, lse
    tile = padded(block_size)
    tiles = tiles or tiles_for(H, V, tile, T / (cu_q.numel() - 1))
    blocks, places = cut(cu_k, S, block_size), cut(cu_q, T, tiles.rows)
    has_codes = pv == "int8"
    codes = quantize_keys_and_values(
        k,
        v,
        cu_k,
        blocks,
        smooth_k=smooth_k,
        has_codes=has_codes,
        per_channel=v_granularity == "channel",
        tile=tile,
    )
    k8, k_scale, k_mean, v8, v_scale, v_sum = codes
    unread = lse  # stands for tensors that this form does not have
    _forward[(places.row_M.numel(), N)](
        q, k8, k_scale, unread if k_mean is None else k_mean, v if v8 is None else v8,
        unread if v_scale is None else v_scale, unread if v_sum is None else v_sum,
        unread if sink is None else sink, out, lse,
        places.row_M, places.place_M, places.count_M, places.sequence_M, cu_q, cu_k, blocks.first_B,
        q.stride(0), q.stride(1), v.stride(0), v.stride(1), T, S, blocks.row_M.numel(),
        scale, scale * LOG2_E, window or 0,
        G=N // K, H=H, V=V, ROWS=tiles.rows, BLOCK=block_size, TILE=tile, H_PAD=padded(H), V_PAD=padded(V),
        CAUSAL=causal, HAS_WINDOW=window is not None, SMOOTH=smooth_k, HAS_SINK=sink is not None,
        HAS_CODES=has_codes, LEVELS=levels, SUM_CODES=row_sum == "int8", DOT=dot_dtype(v.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out, lse
