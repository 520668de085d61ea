"""The gradient kernels: one over queries for theirs, one over key blocks for those of keys and values.

The second walks, for each block, the queries that list it, in their order, so that no two programs add to the
same row and results do not depend on timing. A block that very many queries list is one program's work.
Shape letters as in `__init__.py`; G query heads of a group, M key blocks, E entries of all lists.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sateen.ops.block_sparse_attention.triton_forward import LOG2_E, Tiles, padded, tiles_for
from sateen.ops.spans import Blocks, Queries, cut
from sateen.ops.triton import dot_dtype


class Listing(NamedTuple):
    """Which queries list each key block: those of block m of head k stand at start_KM[k*M+m : k*M+m+2]."""

    query_E: Tensor
    start_KM: Tensor


def invert(idx_KTn: Tensor, where: Queries, blocks: Blocks, block_size: int) -> Listing:
    """The queries of each block in ascending order; padding and blocks ahead of the query are left out."""
    K, T, n = idx_KTn.shape
    M = blocks.row_M.numel()
    useful = (idx_KTn >= 0) & (idx_KTn * block_size <= where.place_T[:, None])
    head = torch.arange(K, dtype=torch.int32, device=idx_KTn.device)[:, None, None]
    block = idx_KTn + blocks.first_B[where.sequence_T][:, None] + M * head
    block, order = torch.where(useful, block, K * M).flatten().sort(stable=True)
    every = torch.arange(K * M + 1, dtype=block.dtype, device=block.device)
    return Listing((order // n % T).int(), torch.searchsorted(block, every, out_int32=True))


@triton.jit
def _gradient_q(
    q, k, v, idx, key_rows, places, total, out, d_out, d_q, delta,
    q_t, q_n, k_s, k_k, v_s, v_k, idx_k, idx_t, idx_i, T, n, scale,
    BLOCK: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    LIST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    N = tl.num_programs(1) * G
    place = tl.load(places + t)
    key_row = tl.load(key_rows + t).to(tl.int64)
    listed = idx + head * idx_k + t * idx_t
    slot = tl.arange(0, LIST)
    every = tl.load(listed + slot * idx_i, mask=slot < n, other=-1)
    stop = tl.max(tl.where((every >= 0) & (every * BLOCK <= place), slot + 1, 0), 0) * BLOCK

    row, h, w = tl.arange(0, ROWS), tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    head_N = head * G + row
    in_q, in_v = (row[:, None] < G) & (h[None, :] < H), (row[:, None] < G) & (w[None, :] < V)
    q_tile = tl.load(q + t * q_t + head_N[:, None] * q_n + h[None, :], mask=in_q, other=0.0).to(DOT)
    at_out = (t * N + head_N[:, None]) * V + w[None, :]
    d_out_tile = tl.load(d_out + at_out, mask=in_v, other=0.0)
    out_tile = tl.load(out + at_out, mask=in_v, other=0.0)
    mean = tl.sum(d_out_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + head_N * T + t, mean, mask=row < G)
    d_out_tile = d_out_tile.to(DOT)
    norm = tl.load(total + head_N * T + t, mask=row < G, other=0.0) * LOG2_E
    acc = tl.zeros([ROWS, H_PAD], tl.float32)
    for at in range(0, stop, KEYS):
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
        v_tile = tl.load(
            v + source[:, None] * v_s + head * v_k + w[None, :],
            mask=seen[:, None] & (w[None, :] < V),
            other=0.0,
        ).to(DOT)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2_E) - norm[:, None]
        probs = tl.exp2(tl.where(seen[None, :], scores, float("-inf")))
        d_probs = tl.dot(d_out_tile, tl.trans(v_tile), input_precision="ieee")
        d_scores = probs * (d_probs - mean[:, None])
        acc += tl.dot(d_scores.to(DOT), k_tile, input_precision="ieee")
    tl.store(
        d_q + (t * N + head_N[:, None]) * H + h[None, :], (acc * scale).to(d_q.dtype.element_ty), mask=in_q
    )


@triton.jit
def _gradient_kv(
    q, k, v, queries, starts, rows, block_places, counts, places, total, delta, d_out, d_k, d_v,
    q_t, q_n, k_s, k_k, v_s, v_k, T, M, scale,
    BLOCK: tl.constexpr, G: tl.constexpr, H: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    QUERIES: tl.constexpr = ROWS // G
    number = tl.program_id(0) // PIECES
    head = tl.program_id(1).to(tl.int64)
    K = tl.num_programs(1)
    first = tl.program_id(0) % PIECES * KEYS
    count = tl.load(counts + number) - first
    inside, h, w = tl.arange(0, KEYS), tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    key = tl.load(rows + number).to(tl.int64) + first + inside
    key_place = tl.load(block_places + number) + first + inside
    here = inside < tl.minimum(count, BLOCK - first)
    in_k, in_v = here[:, None] & (h[None, :] < H), here[:, None] & (w[None, :] < V)
    k_tile = tl.load(k + key[:, None] * k_s + head * k_k + h[None, :], mask=in_k, other=0.0).to(DOT)
    v_tile = tl.load(v + key[:, None] * v_s + head * v_k + w[None, :], mask=in_v, other=0.0).to(DOT)
    acc_k = tl.zeros([KEYS, H_PAD], tl.float32)
    acc_v = tl.zeros([KEYS, V_PAD], tl.float32)
    row = tl.arange(0, ROWS)
    head_N = head * G + row % G
    start = tl.load(starts + head * M + number)
    stop = tl.load(starts + head * M + number + 1)
    if count <= 0:
        stop = start
    for at in range(start, stop, QUERIES):
        entry = at + row // G
        used = (row < QUERIES * G) & (entry < stop)
        t = tl.load(queries + entry, mask=used, other=0).to(tl.int64)
        q_tile = tl.load(
            q + t[:, None] * q_t + head_N[:, None] * q_n + h[None, :],
            mask=used[:, None] & (h[None, :] < H),
            other=0.0,
        ).to(DOT)
        d_out_tile = tl.load(
            d_out + (t[:, None] * (K * G) + head_N[:, None]) * V + w[None, :],
            mask=used[:, None] & (w[None, :] < V),
            other=0.0,
        ).to(DOT)
        place = tl.load(places + t, mask=used, other=-1)
        norm = tl.load(total + head_N * T + t, mask=used, other=0.0) * LOG2_E
        mean = tl.load(delta + head_N * T + t, mask=used, other=0.0)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * (scale * LOG2_E) - norm[None, :]
        probs = tl.exp2(tl.where(key_place[:, None] <= place[None, :], scores, float("-inf")))
        acc_v += tl.dot(probs.to(DOT), d_out_tile, input_precision="ieee")
        d_probs = tl.dot(v_tile, tl.trans(d_out_tile), input_precision="ieee")
        d_scores = probs * (d_probs - mean[None, :])
        acc_k += tl.dot(d_scores.to(DOT), q_tile, input_precision="ieee")
    tl.store(
        d_k + (key[:, None] * K + head) * H + h[None, :], (acc_k * scale).to(d_k.dtype.element_ty), mask=in_k
    )
    tl.store(d_v + (key[:, None] * K + head) * V + w[None, :], acc_v.to(d_v.dtype.element_ty), mask=in_v)


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, idx: Tensor, cu_k: Tensor, sink: Tensor | None,
    where: Queries, out: Tensor, lse: Tensor, block_size: int, scale: float, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v and the sinks (empty without sinks)."""
    (T, N, H), (S, K, V), n = q.shape, v.shape, idx.shape[2]
    G = N // K
    tiles = tiles or tiles_for(q, v)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_sink = q.new_zeros(0 if sink is None else N, dtype=torch.float32)
    if T == 0 or S == 0:
        return d_q.zero_(), d_k.zero_(), d_v.zero_(), d_sink
    total = lse if sink is None else torch.logaddexp(lse, sink.float()[:, None])
    total = torch.where(lse == -torch.inf, 0.0, total)  # a query without keys has no probabilities either
    delta = torch.empty_like(lse)
    sizes = {"BLOCK": block_size, "G": G, "H": H, "V": V, "H_PAD": padded(H), "V_PAD": padded(V)}
    launch = {"DOT": dot_dtype(q.dtype), "num_stages": tiles.num_stages}
    strides = (q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1))
    _gradient_q[(T, K)](
        q, k, v, idx, where.key_row_T, where.place_T, total, out, d_out, d_q, delta, *strides, *idx.stride(),
        T, n, scale,
        LIST=triton.next_power_of_2(n), ROWS=padded(G), KEYS=tiles.keys, num_warps=tiles.num_warps, **sizes,
        **launch,
    )  # fmt: skip
    blocks = cut(cu_k, S, block_size)
    listing = invert(idx, where, blocks, block_size)
    M, keys = blocks.row_M.numel(), min(tiles.keys, padded(block_size))
    _gradient_kv[(M * triton.cdiv(block_size, keys), K)](
        q, k, v, *listing, blocks.row_M, blocks.place_M, blocks.count_M, where.place_T, total, delta, d_out,
        d_k, d_v, *strides, T, M, scale,
        ROWS=max(tiles.rows, padded(G)), KEYS=keys, num_warps=tiles.kv_warps, **sizes, **launch,
    )  # fmt: skip
    if sink is not None:
        d_sink = -((sink.float()[:, None] - total).exp() * delta).sum(1)
    return d_q, d_k, d_v, d_sink
