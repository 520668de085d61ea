"""Weights of eight and four bits: quantisation, and the layout that the kernels read.

Rows come in panels of 16, so that a vector holds one number of every row of a panel; columns come in groups
of 32. Both are padded. Activations are padded with zeros, so it does not matter with what. Shape letters:
F output rows, D input columns, P panels, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sateen.errors import ShapeError

PANEL, GROUP = 16, 32
OFFSET = 128  # of stored int8 codes, which are unsigned
LEVELS_INT8, LEVELS_INT4 = 127, 15
CHUNK = 1 << 19  # weights that are quantised at a time, so that they stay in the cache
SHRINKS = (1.0, 0.92, 0.84)  # of the range of an int4 group, to be tried


@dataclass(frozen=True, eq=False)
class PackedInt8:
    """A matrix of int8 codes with a scale per row and group of 32 columns.

    Attributes:
        codes: uint8 [P, 8 G, 16, 4]; entry [p, q, r, e] is 128 + the code of row 16 p + r, column 4 q + e.
        scales: bfloat16 [P, G, 16], the size of one code.
        out_features, in_features: F and D without padding.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    in_features: int


@dataclass(frozen=True, eq=False)
class PackedInt4:
    """A matrix of codes 0..15 with a step and a minimum per row and group of 32 columns.

    Attributes:
        codes: uint8 [P, G, 4, 16, 4]; the low four bits of entry [p, g, q, r, e] are row 16 p + r, column
            32 g + 4 q + e, the high four bits the column 16 further.
        scales: bfloat16 [P, G, 2, 16]: the steps of a panel's rows, then their minima.
        out_features, in_features: F and D without padding.
    """

    codes: Tensor
    scales: Tensor
    out_features: int
    in_features: int


Packed = PackedInt8 | PackedInt4


@torch.no_grad()
def pack_int8(weight: Tensor) -> PackedInt8:
    """The nearest int8 codes of a matrix, with a scale for each row and group of 32 columns.

    Args:
        weight: [F, D], any float dtype; everything is computed in float32.

    Raises:
        ShapeError: not a float matrix with at least one row and column.

    Numerics: a group's scale is its largest |w| / 127, rounded to bfloat16; its codes are round(w / scale),
    halves to even. A group with a weight that is not finite has a scale that is not finite.
    Source: ours; the format has the information of ggml's Q8_0.
    """
    _check(weight, "pack_int8")
    codes, scales = zip(*(_int8_panels(rows) for rows in _row_blocks(weight)), strict=True)
    return PackedInt8(torch.cat(codes), torch.cat(scales), *weight.shape)


@torch.no_grad()
def pack_int4(weight: Tensor) -> PackedInt4:
    """Codes of four bits, with a step and a minimum for each row and group of 32 columns.

    Args:
        weight: [F, D], any float dtype; everything is computed in float32.

    Raises:
        ShapeError: not a float matrix with at least one row and column.

    Numerics: the first candidate spans a group's range in 15 steps, as GGUF's Q4_1 does, so weights that came
    from such blocks keep their codes; others clip the range to 92 and 84 %. Each is refitted by least squares
    and rounded to bfloat16; the one of the least squared error is kept. A group with a weight that is not
    finite has a scale that is not finite.
    Source: ours; the format has the information of ggml's Q4_1.
    """
    _check(weight, "pack_int4")
    codes, scales = zip(*(_int4_panels(rows) for rows in _row_blocks(weight)), strict=True)
    return PackedInt4(torch.cat(codes), torch.cat(scales), *weight.shape)


def unpack_lowbit(packed: Packed) -> Tensor:
    """The matrix that a packed weight stands for, float32 [F, D].

    Raises:
        ShapeError: the tensors do not have the sizes that the features ask for.
    """
    codes, sizes, minima = parts(packed)
    wide = codes.unflatten(1, (-1, GROUP)) * sizes.unsqueeze(2)
    if minima is not None:
        wide = wide + minima.unsqueeze(2)
    matrix: Tensor = wide.flatten(1)[:, : packed.in_features]
    return matrix


def parts(packed: Packed) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes float32 [F, 32 G], and float32 [F, G] sizes and minima (None for int8) of a packed weight.

    Raises:
        ShapeError: the tensors do not have the sizes that the features ask for.
    """
    check_sizes(packed)
    F, D = packed.out_features, packed.in_features
    P, G = -(-F // PANEL), -(-D // GROUP)
    if isinstance(packed, PackedInt8):
        rows = packed.codes.transpose(1, 2).reshape(P * PANEL, -1)[:F]
        return rows.float() - OFFSET, packed.scales.mT.reshape(P * PANEL, G)[:F].float(), None
    both = packed.codes.permute(0, 3, 1, 2, 4).reshape(P * PANEL, G, 1, PANEL)[:F]
    rows = torch.cat([both & 15, both >> 4], 2).reshape(F, -1)
    sizes, minima = packed.scales.permute(2, 0, 3, 1).reshape(2, P * PANEL, G)[:, :F].float()
    return rows.float(), sizes, minima


def _row_blocks(weight: Tensor) -> Iterator[Tensor]:
    """Whole panels of rows at a time."""
    return iter(weight.split(max(1, CHUNK // weight.shape[1] // PANEL) * PANEL))


def _int8_panels(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = _padded(rows)
    groups = wide.unflatten(1, (-1, GROUP))
    top = groups.abs().amax(2)
    scales = (top / LEVELS_INT8).bfloat16()
    levels = torch.where(top > 0, 1 / scales.float(), 0.0)
    codes = (groups * levels.unsqueeze(2)).round().nan_to_num(0.0).clamp(-LEVELS_INT8, LEVELS_INT8) + OFFSET
    panels = codes.to(torch.uint8).view(-1, PANEL, wide.shape[1] // 4, 4).transpose(1, 2)
    return panels.contiguous(), scales.view(-1, PANEL, top.shape[1]).mT.contiguous()


def _int4_panels(rows: Tensor) -> tuple[Tensor, Tensor]:
    wide = _padded(rows)
    G = wide.shape[1] // GROUP
    codes, step, minimum = _fit_int4(wide.view(-1, GROUP))
    halves = codes.view(-1, PANEL, G, 2, 4, 4)
    both = halves[:, :, :, 0] | halves[:, :, :, 1] << 4  # [P, 16, G, 4, 4]
    scales = torch.stack([step, minimum], 1).view(-1, PANEL, G, 2)
    return both.permute(0, 2, 3, 1, 4).contiguous(), scales.permute(0, 2, 3, 1).contiguous()


def _fit_int4(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, 32], steps and minima bfloat16 [N] of the best candidate of each group."""
    low, high = groups.amin(1), groups.amax(1)
    best: tuple[Tensor, ...] = ()
    for shrink in SHRINKS:
        step = (high - low) * (shrink / LEVELS_INT4)
        found = _refit(groups, step, (low + high) / 2 - step * (LEVELS_INT4 / 2))
        if not best:
            best = found
            continue
        better = found[3] < best[3]
        best = (
            torch.where(better.unsqueeze(1), found[0], best[0]),
            *(torch.where(better, new, old) for new, old in zip(found[1:], best[1:], strict=True)),
        )
    codes, step, minimum, _ = best
    return codes.to(torch.uint8), step, minimum


def _refit(groups: Tensor, step: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of a grid, its least-squares step and minimum in bfloat16, and the squared error."""
    codes = _codes(groups, step, minimum)
    mean_code, mean = codes.mean(1), groups.mean(1)
    centred = codes - mean_code.unsqueeze(1)
    spread = centred.square().sum(1)
    fitted = torch.where(spread > 0, (centred * groups).sum(1) / spread.clamp(min=1e-9), step)
    step_16 = fitted.bfloat16()
    minimum_16 = (mean - step_16.float() * mean_code).bfloat16()
    codes = _codes(groups, step_16.float(), minimum_16.float())
    error = (codes * step_16.float().unsqueeze(1) + minimum_16.float().unsqueeze(1) - groups).square().sum(1)
    return codes, step_16, minimum_16, error


def _codes(groups: Tensor, step: Tensor, minimum: Tensor) -> Tensor:
    levels = torch.where(step != 0, 1 / step, 0.0)
    codes = ((groups - minimum.unsqueeze(1)) * levels.unsqueeze(1)).round()
    return codes.nan_to_num(0.0).clamp(0, LEVELS_INT4)


def _padded(weight: Tensor) -> Tensor:
    """Float32 with whole panels and groups: rows of zeros, and columns like the last, for ranges' sake."""
    F, D = weight.shape
    wide = weight.new_zeros(-(-F // PANEL) * PANEL, -(-D // GROUP) * GROUP, dtype=torch.float32)
    wide[:F, :D] = weight
    wide[:F, D:] = weight[:, -1:]
    return wide


def _check(weight: Tensor, name: str) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise ShapeError(
            f"{name} takes a float weight [F,D], both at least 1; got {weight.dtype} {tuple(weight.shape)}"
        )


def check_sizes(packed: Packed) -> None:
    """Raises `ShapeError` unless the stored tensors have the sizes and dtypes that the features ask for."""
    P, G = -(-packed.out_features // PANEL), -(-packed.in_features // GROUP)
    codes: tuple[int, ...] = (P, GROUP // 4 * G, PANEL, 4)
    scales: tuple[int, ...] = (P, G, PANEL)
    if isinstance(packed, PackedInt4):
        codes, scales = (P, G, 4, PANEL, 4), (P, G, 2, PANEL)
    have = packed.codes.dtype, tuple(packed.codes.shape), packed.scales.dtype, tuple(packed.scales.shape)
    if have != (torch.uint8, codes, torch.bfloat16, scales):
        raise ShapeError(
            f"a packed weight of {packed.out_features} x {packed.in_features} has uint8 codes {codes} and "
            f"bfloat16 scales {scales}; got {have[0]} {have[1]} and {have[2]} {have[3]}"
        )
