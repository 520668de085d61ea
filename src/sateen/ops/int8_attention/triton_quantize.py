"""Kernels that turn keys and values into int8, block by block, and the rounding all int8 kernels share.

Keys are stored head by head with a scale per token. Values are stored by block and channel, the keys of a
block side by side: the order int8 tensor cores read them in. Queries are quantised by the kernels that use
them. Shape letters as in `__init__.py`; B sequences, M key blocks, J places of a block's tile.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sateen.ops.spans import Blocks

# In float32, 1.5 * 2^23 + x has no room for a fraction: the addition rounds x, halves to the even number.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_even(x):
    """`x` as a whole float32, halves to even; |x| below 2^22."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def codes_of(x, scale):
    """Codes in [-127, 127] of float32 `x` with scales of its shape; a scale of 0 gives codes 0."""
    ratio = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
    return tl.minimum(tl.maximum(round_even(ratio), -127.0), 127.0).to(tl.int8)


@triton.jit
def quantize_tile(x):
    """Codes and scales of the rows of a float32 tile."""
    largest = tl.max(tl.abs(x), 1)
    scale = tl.div_rn(largest, tl.zeros_like(largest) + 127.0)
    return codes_of(x, scale[:, None] + tl.zeros_like(x)), scale


@triton.jit
def _survey(
    k, v, rows, counts, k_sum, v_max, k_s, k_k, v_s, v_k,
    H: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
):  # fmt: skip
    """The sum of the keys of each block and the largest magnitude of each value channel."""
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    K = tl.num_programs(1)
    j, h, w = tl.arange(0, TILE), tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    row = tl.load(rows + number).to(tl.int64) + j
    here = j < tl.load(counts + number)
    keys = tl.load(
        k + row[:, None] * k_s + head * k_k + h[None, :], mask=here[:, None] & (h[None, :] < H), other=0.0
    )
    tl.store(k_sum + (number * K + head) * H + h, tl.sum(keys.to(tl.float32), 0), mask=h < H)
    values = tl.load(
        v + row[:, None] * v_s + head * v_k + w[None, :], mask=here[:, None] & (w[None, :] < V), other=0.0
    )
    tl.store(v_max + (number * K + head) * V + w, tl.max(tl.abs(values.to(tl.float32)), 0), mask=w < V)


@triton.jit
def _conclude(
    k_sum, v_max, first_block, cu_k, mean, v_scale,
    H: tl.constexpr, V: tl.constexpr, STEP: tl.constexpr, H_PAD: tl.constexpr, V_PAD: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """The mean of the keys of each sequence and the scales of its values."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    K = tl.num_programs(1)
    h, w = tl.arange(0, H_PAD), tl.arange(0, V_PAD)
    keys = tl.zeros([H_PAD], tl.float32)
    largest = tl.zeros([V_PAD], tl.float32)
    stop = tl.load(first_block + b + 1)
    for at in range(tl.load(first_block + b), stop, STEP):
        number = at + tl.arange(0, STEP)
        row = (number.to(tl.int64) * K + head)[:, None]
        inside = (number < stop)[:, None]
        keys += tl.sum(tl.load(k_sum + row * H + h[None, :], mask=inside & (h[None, :] < H), other=0.0), 0)
        found = tl.load(v_max + row * V + w[None, :], mask=inside & (w[None, :] < V), other=0.0)
        largest = tl.maximum(largest, tl.max(found, 0))
    length = tl.load(cu_k + b + 1) - tl.load(cu_k + b)
    count = tl.zeros([H_PAD], tl.float32) + tl.maximum(length, 1)
    tl.store(mean + (b * K + head) * H + h, tl.div_rn(keys, count), mask=h < H)
    if not PER_CHANNEL:
        largest = tl.zeros([V_PAD], tl.float32) + tl.max(largest, 0)
    scale = tl.div_rn(largest, tl.zeros([V_PAD], tl.float32) + 127.0)
    tl.store(v_scale + (b * K + head) * V + w, scale, mask=w < V)


@triton.jit
def _encode_keys(
    k, mean, rows, counts, sequences, k8, k_scale, k_s, k_k, S,
    H: tl.constexpr, TILE: tl.constexpr, H_PAD: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    j, h = tl.arange(0, TILE), tl.arange(0, H_PAD)
    row = tl.load(rows + number).to(tl.int64) + j
    here = j < tl.load(counts + number)
    keys = tl.load(
        k + row[:, None] * k_s + head * k_k + h[None, :], mask=here[:, None] & (h[None, :] < H), other=0.0
    )
    keys = keys.to(tl.float32)
    if SMOOTH:
        middle = (tl.load(sequences + number).to(tl.int64) * tl.num_programs(1) + head) * H
        keys = keys - tl.load(mean + middle + h, mask=h < H, other=0.0)[None, :]
    codes, scale = quantize_tile(keys)
    tl.store(k8 + (head * S + row[:, None]) * H_PAD + h[None, :], codes, mask=here[:, None])
    tl.store(k_scale + head * S + row, scale, mask=here)


@triton.jit
def _encode_values(
    v, v_scale, rows, counts, sequences, v8, v_sum, v_s, v_k, M,
    V: tl.constexpr, TILE: tl.constexpr, V_PAD: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    j, w = tl.arange(0, TILE), tl.arange(0, V_PAD)
    row = tl.load(rows + number).to(tl.int64) + j
    here = (j < tl.load(counts + number))[:, None] & (w[None, :] < V)
    values = tl.load(v + row[:, None] * v_s + head * v_k + w[None, :], mask=here, other=0.0).to(tl.float32)
    place = (tl.load(sequences + number).to(tl.int64) * tl.num_programs(1) + head) * V
    scale = tl.load(v_scale + place + w, mask=w < V, other=0.0)
    codes = codes_of(values, scale[None, :] + tl.zeros_like(values))
    at = (head * M + number) * V_PAD + w
    tl.store(v_sum + at, tl.sum(codes.to(tl.int32), 0))
    tl.store(v8 + at[:, None] * TILE + j[None, :], tl.trans(codes))


class Codes(NamedTuple):
    """Quantised keys and, unless they stay floats, values.

    Attributes:
        k8_KSH: int8, rows padded with zeros to the tile's width.
        k_scale_KS: float32.
        k_mean_BKH: float32, what was taken off the keys; None without smoothing.
        v8_KMVJ: int8, channels padded, a block's missing keys 0; None where values stay floats, as the next.
        v_scale_BKV: float32.
        v_sum_KMV: int32, the sum of the codes of each block and channel.
    """

    k8_KSH: Tensor
    k_scale_KS: Tensor
    k_mean_BKH: Tensor | None
    v8_KMVJ: Tensor | None
    v_scale_BKV: Tensor | None
    v_sum_KMV: Tensor | None


def padded(size: int) -> int:
    """The side of a tile that holds `size` numbers: a power of two, at least what int8 products take."""
    return max(32, int(triton.next_power_of_2(size)))


def quantize_keys_and_values(
    k: Tensor, v: Tensor, cu_k: Tensor, blocks: Blocks, *,
    smooth_k: bool, has_codes: bool, per_channel: bool, tile: int,
) -> Codes:  # fmt: skip
    """Codes of keys [S, K, H] and values [S, K, V], whose last dimensions are contiguous."""
    (S, K, H), V = k.shape, v.shape[2]
    B, M, device = cu_k.numel() - 1, blocks.row_M.numel(), k.device
    sizes = {"H": H, "H_PAD": padded(H), "TILE": tile}
    wide = {"V": V, "V_PAD": padded(V), "TILE": tile}
    mean = torch.empty(B, K, H, device=device)
    v_scale = torch.empty(B, K, V, device=device)
    if (smooth_k or has_codes) and B * K:
        k_sum, v_max = (torch.empty(M, K, size, device=device) for size in (H, V))
        if M:
            _survey[(M, K)](
                k, v, blocks.row_M, blocks.count_M, k_sum, v_max,
                k.stride(0), k.stride(1), v.stride(0), v.stride(1), **sizes, V=V, V_PAD=padded(V),
            )  # fmt: skip
        _conclude[(B, K)](
            k_sum, v_max, blocks.first_B, cu_k, mean, v_scale,
            H=H, V=V, STEP=16, H_PAD=padded(H), V_PAD=padded(V), PER_CHANNEL=per_channel,
        )  # fmt: skip
    k8 = torch.empty(K, S, padded(H), dtype=torch.int8, device=device)
    k_scale = torch.empty(K, S, device=device)
    v8 = torch.empty(K, M, padded(V), tile, dtype=torch.int8, device=device) if has_codes else None
    v_sum = torch.empty(K, M, padded(V), dtype=torch.int32, device=device) if has_codes else None
    if M:
        _encode_keys[(M, K)](
            k, mean, blocks.row_M, blocks.count_M, blocks.sequence_M, k8, k_scale,
            k.stride(0), k.stride(1), S, SMOOTH=smooth_k, **sizes,
        )  # fmt: skip
        if has_codes:
            _encode_values[(M, K)](
                v, v_scale, blocks.row_M, blocks.count_M, blocks.sequence_M, v8, v_sum,
                v.stride(0), v.stride(1), M, **wide,
            )  # fmt: skip
    return Codes(k8, k_scale, mean if smooth_k else None, v8, v_scale if has_codes else None, v_sum)
