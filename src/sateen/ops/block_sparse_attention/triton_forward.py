"""The forward kernel: a program takes one query and one key/value head, and walks the keys of its list.

The query heads of a group share the list, so they are the rows of one tile; a tile of keys is gathered row by
row, whatever the block size, and may hold several short blocks. With few queries the list is dealt out to
several programs, whose results `merge_parts` joins. Shape letters as in `__init__.py`; G query heads of a
group.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sateen.ops.spans import Queries
from sateen.ops.triton import dot_dtype
from sateen.ops.triton_merge import merge_parts

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _forward(
    q, k, v, idx, key_rows, places, sink, out, lse,
    q_t, q_n, k_s, k_k, v_s, v_k, idx_k, idx_t, idx_i, T, n, scale,
    BLOCK: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    LIST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
    PARTS: tl.constexpr, HAS_SINK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2).to(tl.int64)
    place = tl.load(places + t)
    key_row = tl.load(key_rows + t).to(tl.int64)
    listed = idx + head * idx_k + t * idx_t
    # Lists are mostly in front of their padding: what follows the last block in sight is not walked.
    slot = tl.arange(0, LIST)
    every = tl.load(listed + slot * idx_i, mask=slot < n, other=-1)
    num_slots = tl.max(tl.where((every >= 0) & (every * BLOCK <= place), slot + 1, 0), 0)
    num_tiles = (num_slots * BLOCK + KEYS - 1) // KEYS
    share = (num_tiles + PARTS - 1) // PARTS * KEYS
    first = part.to(tl.int32) * share
    stop = tl.minimum(first + share, num_slots * BLOCK)

    row, h, w = tl.arange(0, ROWS), tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    head_N = head * G + row
    q_tile = tl.load(
        q + t * q_t + head_N[:, None] * q_n + h[None, :],
        mask=(row[:, None] < G) & (h[None, :] < H),
        other=0.0,
    ).to(DOT)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, V_PAD], tl.float32)
    for at in range(first, stop, KEYS):
        j = at + tl.arange(0, KEYS)
        block = tl.load(listed + (j // BLOCK) * idx_i, mask=j < stop, other=-1)
        key = block * BLOCK + j % BLOCK
        seen = (block >= 0) & (key <= place)
        source = key_row + key
        k_tile = tl.load(
            k + source[:, None] * k_s + head * k_k + h[None, :],
            mask=seen[:, None] & (h[None, :] < H),
            other=0.0,
        ).to(DOT)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2_E)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        probs = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(top - finite)
        v_tile = tl.load(
            v + source[:, None] * v_s + head * v_k + w[None, :],
            mask=seen[:, None] & (w[None, :] < V),
            other=0.0,
        ).to(DOT)
        acc = acc * decay[:, None] + tl.dot(probs.to(DOT), v_tile, input_precision="ieee")
        total = total * decay + tl.sum(probs, 1)
        top = new_top

    some = total > 0
    divisor = tl.where(some, total, 1.0)
    acc = acc / divisor[:, None]
    whole = tl.where(some, tl.where(some, top, 0.0) * LN_2 + tl.log(divisor), float("-inf"))
    if HAS_SINK:
        logit = tl.load(sink + head_N, mask=row < G, other=0.0).to(tl.float32)
        acc = acc / (1.0 + tl.exp(logit - whole))[:, None]
    N = tl.num_programs(1) * G
    tl.store(lse + (part * N + head_N) * T + t, whole, mask=row < G)
    tl.store(
        out + ((part * T + t) * N + head_N[:, None]) * V + w[None, :],
        acc.to(out.dtype.element_ty),
        mask=(row[:, None] < G) & (w[None, :] < V),
    )


class Tiles(NamedTuple):
    """What may be tuned without a change of results beyond rounding.

    Attributes:
        keys: keys of a tile.
        rows: rows of a tile of queries and heads in the kernel of the keys' gradients.
        num_warps: warps of a program; `kv_warps` of that kernel.
        num_stages: tiles in flight.
        parts: programs that share one list; None decides by the number of queries.
    """

    keys: int
    rows: int
    num_warps: int = 4
    kv_warps: int = 8
    num_stages: int = 2
    parts: int | None = None


def tiles_for(q: Tensor, v: Tensor) -> Tiles:
    """Tile sizes by the bytes of a row, so that tiles fit registers and shared memory; not tuned on a GPU."""
    width = max(padded(q.shape[2]), padded(v.shape[2]))
    if q.element_size() == 4:  # no tensor cores: products by plain multiplication
        return Tiles(keys=32, rows=16, num_stages=1)
    if width <= 64:
        return Tiles(keys=64, rows=64, kv_warps=4)
    return Tiles(keys=64, rows=64) if width <= 128 else Tiles(keys=32, rows=32)


def padded(size: int) -> int:
    """The size of a tile's side that holds `size` channels: a power of two, and what `tl.dot` takes."""
    return max(16, int(triton.next_power_of_2(size)))


def _parts(programs: int, length: int, tiles: Tiles, device: torch.device) -> int:
    """Programs per list: enough to fill the GPU, with four tiles for each of them at least."""
    if tiles.parts is not None:
        return tiles.parts
    if device.type != "cuda":
        return 1
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count // max(programs, 1)
    most = max(1, length // (4 * tiles.keys))
    return min(32, most, int(triton.next_power_of_2(max(1, wanted))))


def forward(
    q: Tensor, k: Tensor, v: Tensor, idx: Tensor, sink: Tensor | None, where: Queries,
    block_size: int, scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output [T, N, V] in q's dtype and the log-sum-exp [N, T]; `idx` is int32 [K, T, n]."""
    (T, N, H), (_, K, V), n = q.shape, v.shape, idx.shape[2]
    tiles = tiles or tiles_for(q, v)
    parts = _parts(T * K, n * block_size, tiles, q.device)
    out = torch.empty(parts, T, N, V, dtype=q.dtype if parts == 1 else torch.float32, device=q.device)
    lse = torch.empty(parts, N, T, device=q.device)
    if T == 0:
        return out[0], lse[0]
    _forward[(T, K, parts)](
        q, k, v, idx, where.key_row_T, where.place_T, lse if sink is None else sink, out, lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), *idx.stride(),
        T, n, scale,
        BLOCK=block_size, G=N // K, H=H, V=V,
        LIST=triton.next_power_of_2(n), ROWS=padded(N // K), KEYS=tiles.keys,
        H_PAD=padded(H), V_PAD=padded(V),
        PARTS=parts, HAS_SINK=sink is not None and parts == 1, DOT=dot_dtype(q.dtype),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return (out[0], lse[0]) if parts == 1 else merge_parts(out, lse, sink, q.dtype)
