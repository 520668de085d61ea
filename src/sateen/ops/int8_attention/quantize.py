"""Symmetric int8 rows, and integer matrix products that are exact whatever computes them.

Shape letters: S key tokens, K key/value heads, H and V head sizes, B sequences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEVELS = 127  # codes run from -127 to 127; -128 is not used, so that the scale has no zero point
LEVELS_INT4 = 7


class Int8Rows(NamedTuple):
    """Cached keys and values of packed sequences, quantised token by token.

    Attributes:
        k_SKH: int8 codes of the keys, less the mean of their sequence.
        k_scale_SK: float32; a key is code * scale + mean.
        v_SKV: int8 codes of the values.
        v_scale_SK: float32; a value is code * scale.
        k_mean_BKH: float32, what was taken off the keys of each sequence; zeros where nothing was.
    """

    k_SKH: Tensor
    k_scale_SK: Tensor
    v_SKV: Tensor
    v_scale_SK: Tensor
    k_mean_BKH: Tensor

    def floats(self, cu_seqlens_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys [S, K, H] and values [S, K, V] that the codes stand for."""
        mean = self.k_mean_BKH.repeat_interleave(cu_seqlens_k.diff(), dim=0, output_size=len(self.k_SKH))
        k = self.k_SKH * self.k_scale_SK.unsqueeze(-1) + mean
        return k.to(dtype), (self.v_SKV * self.v_scale_SK.unsqueeze(-1)).to(dtype)


def quantize_rows(k_SKH: Tensor, v_SKV: Tensor, cu_seqlens_k: Tensor) -> Int8Rows:
    """The rows that a cache would hold, keys less the mean of all keys of their sequence."""
    counts = cu_seqlens_k.diff().long()
    k = k_SKH.float()
    owners = torch.arange(len(counts), device=k.device).repeat_interleave(counts, output_size=len(k))
    sums = k.new_zeros(len(counts), *k.shape[1:]).index_add_(0, owners, k)
    mean = sums / counts.clamp(min=1).view(-1, 1, 1)
    (k8, k_scale), (v8, v_scale) = quantize_int8(k - mean.index_select(0, owners)), quantize_int8(v_SKV)
    return Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean)


def quantize_int8(x: Tensor, dim: int | tuple[int, ...] = -1) -> tuple[Tensor, Tensor]:
    """Int8 codes in [-127, 127] and the float32 scales of what lies along `dim`, which stays with size 1.

    Half-way cases go to the even code. A slice of zeros gets scale 0 and codes 0.
    """
    return _quantize(x, dim, LEVELS)


def quantize_int4(x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Codes in [-7, 7], held as int8 [..., C, `channels`], and float32 scales [..., C, 1].

    Every run of `channels` numbers along the last dimension has a scale of its own.
    """
    return _quantize(x.unflatten(-1, (-1, channels)), -1, LEVELS_INT4)


def _quantize(x: Tensor, dim: int | tuple[int, ...], levels: int) -> tuple[Tensor, Tensor]:
    x = x.float()
    scale = x.abs().amax(dim, keepdim=True) / levels
    # Numbers so small that their scale is 0 are zeros; subnormal scales can push a ratio past the last code.
    ratio = x / torch.where(scale > 0, scale, 1.0)
    return ratio.round().clamp(-levels, levels).to(torch.int8), scale


def integer_matmul(a: Tensor, b: Tensor, bound: int) -> Tensor:
    """The exact product of two integer tensors, int32 [..., M, N].

    Args:
        a: integers [..., M, L].
        b: integers [..., L, N].
        bound: no sum of |a| * |b| along L exceeds it.

    Floats compute it: integers below 2^24 (2^53) are exact in float32 (float64), and so is every partial sum,
    in any order. Integer products of torch are slow on the CPU and missing on CUDA, where float32 products
    may also round their inputs.
    """
    assert bound < 2**31
    exact = torch.float32 if bound < 2**24 and a.device.type == "cpu" else torch.float64
    return (a.to(exact) @ b.to(exact)).to(torch.int32)
