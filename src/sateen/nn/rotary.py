"""Rotary position embedding, half-split (NeoX) form, on the leading `rotary_dim` channels of each head."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_frequencies(theta: float, dim: int, device: torch.device) -> Tensor:
    """What a position is multiplied by, float32 [dim / 2]."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def rotary_tables(position_ids_T: Tensor, theta: float, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, dim] in float32, each angle repeated in both halves.

    Source: Su et al. 2021, "RoFormer"; angle j of dim/2 is position * theta^(-2j/dim).
    """
    frequencies = rotary_frequencies(theta, dim, position_ids_T.device)
    angles = position_ids_T.to(torch.float32)[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x_TNH: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """`x` with its leading channels rotated; the rest, and the dtype, unchanged."""
    cos, sin = (table[:, None, :].to(x_TNH.dtype) for table in tables)
    dim = cos.shape[-1]
    rotated, passed = (x_TNH, None) if dim == x_TNH.shape[-1] else (x_TNH[..., :dim], x_TNH[..., dim:])
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat([-second, first], dim=-1) * sin
    return rotated if passed is None else torch.cat([rotated, passed], dim=-1)
