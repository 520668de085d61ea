"""The kernel of attention over cached int8 rows: for a few queries and many keys, as in decoding.

The query heads of a group and some queries of one sequence are the rows of a tile; the keys are dealt out to
several programs where tiles are few, and `merge_parts` joins their results. Codes of P and of the values are
whole numbers that float16 holds and float32 sums exactly, so their product runs on float16 tensor cores,
which read values in the order the cache keeps them. Shape letters as in `__init__.py`; B sequences.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sateen.ops.int8_attention.quantize import Int8Rows
from sateen.ops.int8_attention.triton_forward import LN_2, LOG2_E
from sateen.ops.int8_attention.triton_quantize import padded, quantize_tile, round_even
from sateen.ops.spans import cut
from sateen.ops.triton_merge import merge_parts


@triton.jit
def _forward(
    q, k8, k_scale, v8, v_scale, k_mean, sink, out, lse,
    tile_rows, tile_places, tile_counts, tile_sequences, cu_q, cu_k,
    q_t, q_n, k_s, k_k, ks_s, ks_k, v_s, v_k, vs_s, vs_k, T, scale, scale_log2, window,
    G: tl.constexpr, H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, TILE: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
    PARTS: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    K = tl.num_programs(1)
    N = K * G
    count = tl.load(tile_counts + tile)
    b = tl.load(tile_sequences + tile).to(tl.int64)
    k_row = tl.load(cu_k + b).to(tl.int64)
    length = (tl.load(cu_k + b + 1) - k_row).to(tl.int32)
    first_place = tl.load(tile_places + tile) + length - (tl.load(cu_q + b + 1) - tl.load(cu_q + b))
    row, h, w, j = tl.arange(0, ROWS), tl.arange(0, H_PAD), tl.arange(0, V_PAD), tl.arange(0, TILE)
    place = first_place + row // G
    t = tl.load(tile_rows + tile).to(tl.int64) + row // G
    n = head * G + row % G
    used = (row // G < count) & (row < QUERIES * G)
    x = tl.load(
        q + t[:, None] * q_t + n[:, None] * q_n + h[None, :], mask=used[:, None] & (h[None, :] < H), other=0.0
    ).to(tl.float32)
    q8, q_scale = quantize_tile(x)
    q_scale = q_scale * scale_log2

    stop = tl.where(count > 0, tl.maximum(first_place + count - 1 + BLOCK, 0) // BLOCK, 0)
    first = 0
    if HAS_WINDOW:
        first = tl.minimum(tl.maximum(first_place - window + 1, 0) // BLOCK, stop)
    share = (stop - first + PARTS - 1) // PARTS
    first = first + part * share
    stop = tl.minimum(first + share, stop)
    acc = tl.zeros([ROWS, V_PAD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for number in range(first, stop):
        key = number * BLOCK + j
        here = (j < BLOCK) & (key < length)
        source = k_row + key
        k_tile = tl.load(
            k8 + source[:, None] * k_s + head * k_k + h[None, :],
            mask=here[:, None] & (h[None, :] < H),
            other=0,
        )
        step = tl.load(k_scale + source * ks_s + head * ks_k, mask=here, other=0.0)
        products = tl.dot(q8, tl.trans(k_tile), out_dtype=tl.int32)
        scores = products.to(tl.float32) * q_scale[:, None] * step[None, :]
        seen = here[None, :] & (key[None, :] <= place[:, None])
        if HAS_WINDOW:
            seen = seen & (key[None, :] > place[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        probs = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(top - finite)
        top = new_top
        total = total * decay + tl.sum(probs, 1)
        # A scale per token cannot leave the sum over tokens, so it joins P, which gets one per row and block.
        weight = tl.load(v_scale + source * vs_s + head * vs_k, mask=here, other=0.0)
        weighted = probs * weight[None, :]
        largest = tl.max(weighted, 1)
        row_scale = tl.div_rn(largest, tl.zeros_like(largest) + 255.0)
        divisor = tl.where(row_scale > 0, row_scale, 1.0)[:, None] + tl.zeros_like(weighted)
        codes = tl.minimum(round_even(tl.div_rn(weighted, divisor)), 255.0)
        v_tile = tl.load(
            v8 + source[:, None] * v_s + head * v_k + w[None, :],
            mask=here[:, None] & (w[None, :] < V),
            other=0,
        )
        product = tl.dot(codes.to(tl.float16), v_tile.to(tl.float16))
        acc = acc * decay[:, None] + product * row_scale[:, None]

    some = total > 0
    divisor = tl.where(some, total, 1.0)
    middle = tl.load(k_mean + (b * K + head) * H + h, mask=h < H, other=0.0)
    whole = tl.where(some, top, 0.0) * LN_2 + tl.log(divisor) + scale * tl.sum(x * middle[None, :], 1)
    whole = tl.where(some, whole, float("-inf"))
    acc = acc / divisor[:, None]
    if HAS_SINK:
        logit = tl.load(sink + n, mask=used, other=0.0).to(tl.float32)
        acc = acc / (1.0 + tl.exp(logit - whole))[:, None]
    tl.store(lse + (part * N + n) * T + t, whole, mask=used)
    tl.store(
        out + ((part.to(tl.int64) * T + t[:, None]) * N + n[:, None]) * V + w[None, :],
        acc.to(out.dtype.element_ty),
        mask=used[:, None] & (w[None, :] < V),
    )


class Tiles(NamedTuple):
    """What may be tuned without a change of results beyond rounding.

    Attributes:
        rows: rows of a tile, query heads times queries.
        parts: programs that share one sequence's keys; None decides by the number of tiles.
        num_warps: warps of a program.
        num_stages: tiles in flight.
    """

    rows: int
    parts: int | None = None
    num_warps: int = 4
    num_stages: int = 1


def rows_forward(
    q: Tensor, rows: Int8Rows, cu_q: Tensor, cu_k: Tensor, sink: Tensor | None, *,
    scale: float, window: int | None, block_size: int, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [T, N, V] in q's dtype and the log-sum-exp [N, T]; offsets are int32."""
    (T, N, H), (S, K, V) = q.shape, rows.v_SKV.shape
    G, B = N // K, cu_q.numel() - 1
    if T == 0:
        return q.new_empty(T, N, V), q.new_empty(N, T, dtype=torch.float32)
    tile = padded(block_size)
    few, many = max(16, int(triton.next_power_of_2(G))), 64
    numbers = tile * max(padded(H), padded(V))  # of a tile of keys or values, whose size bounds the stages
    stages = 3 if numbers <= 64 * 128 else 2 if numbers <= 128 * 128 else 1
    tiles = tiles or Tiles(rows=few if T <= 4 * B else max(few, many), num_stages=stages)
    queries = tiles.rows // G
    places = cut(cu_q, T, queries)
    programs = places.row_M.numel() * K
    parts = tiles.parts or _parts(programs, S // B // block_size, q.device)
    out = torch.empty(parts, T, N, V, dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    lse = torch.empty(parts, N, T, device=q.device)
    k8, k_scale, v8, v_scale, mean = rows
    _forward[(places.row_M.numel(), K, parts)](
        q, k8, k_scale, v8, v_scale, mean.contiguous(), lse if sink is None else sink, out, lse,
        places.row_M, places.place_M, places.count_M, places.sequence_M, cu_q, cu_k,
        q.stride(0), q.stride(1), k8.stride(0), k8.stride(1), *k_scale.stride(), v8.stride(0), v8.stride(1),
        *v_scale.stride(), T, scale, scale * LOG2_E, window or 0,
        G=G, H=H, V=V, ROWS=tiles.rows, QUERIES=queries, BLOCK=block_size, TILE=tile,
        H_PAD=padded(H), V_PAD=padded(V), PARTS=parts,
        HAS_WINDOW=window is not None, HAS_SINK=sink is not None and parts == 1,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return (out[0], lse[0]) if parts == 1 else merge_parts(out, lse, sink, q.dtype)


def _parts(programs: int, num_blocks: int, device: torch.device) -> int:
    """Programs per tile: enough to fill the GPU, with four blocks for each of them at least."""
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // programs
    return max(1, min(32, num_blocks // 4, int(triton.next_power_of_2(max(1, wanted)))))
