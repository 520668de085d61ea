"""Complex weights as two-bit phases: quantisation to powers of i, and the layout they are stored in.

Code k stands for i^k: 0 is +1, 1 is +i, 2 is -1, 3 is -i. A matrix has one scale for the entries on the real
axis and one for those on the imaginary axis. Shape letters: F output rows, D input columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sateen.errors import ShapeError

SCALE_FLOOR = 1e-5
ROW_BLOCK, COLUMN_BLOCK = 64, 256  # rows and columns are padded to multiples of these
CODES_PER_BYTE = 4


class PhaseWeight(NamedTuple):
    """A complex matrix whose entries are s_re * (+1 | -1) or s_im * (+i | -i).

    Attributes:
        codes: uint8 [F, D], 0..3; entry k stands for i^k.
        s_re: float32 scalar, the size of entries with an even code.
        s_im: float32 scalar, the size of entries with an odd code.
    """

    codes: Tensor
    s_re: Tensor
    s_im: Tensor

    def dense(self) -> tuple[Tensor, Tensor]:
        """The real and the imaginary part, float32 [F, D] each."""
        c_re, c_im = signs(self.codes)
        return c_re * self.s_re, c_im * self.s_im


@dataclass(frozen=True, eq=False)
class PackedPhase:
    """A `PhaseWeight` in its stored layout: row-major bytes of four codes, the first column lowest.

    Attributes:
        packed: uint8 [rows, columns / 4]; column 4q + e sits in bits 2e and 2e + 1 of byte q.
        s_re, s_im: float32 scalars, as in `PhaseWeight`.
        out_features, in_features: F and D without padding. Rows are padded to a multiple of 64, columns of
            256; what the padding holds is never read.
    """

    packed: Tensor
    s_re: Tensor
    s_im: Tensor
    out_features: int
    in_features: int


@torch.no_grad()
def phase_quantize(w_re: Tensor, w_im: Tensor, *, floor: float = SCALE_FLOOR) -> PhaseWeight:
    """The nearest power of i of each entry, and the mean size of the entries on either axis.

    Args:
        w_re: real part [F, D], any float dtype; everything is computed in float32.
        w_im: imaginary part, the same shape.
        floor: the least scale, and that of an axis without entries.

    Returns:
        A `PhaseWeight`: s_re is the mean of |w_re| over the entries on the real axis, s_im that of |w_im|
        over those on the imaginary axis. Both are the least-squares scales of the codes. A weight that is not
        finite makes a scale that is not finite.

    Raises:
        ShapeError: the parts differ in shape, or are not matrices.

    Numerics: an angle in [-pi/4, pi/4) becomes +1, and each quarter turn on the next power of i, so a
    diagonal goes to the axis counter-clockwise of it; zero becomes +1. On Gaussian weights the relative
    squared error is 1 - 2/pi.
    Source: Fairy±i, arXiv 2508.05571, and its published code (PKULab1806/Fairy-plus-minus-i), whose floor is
    1e-5; Fairy2i's (PKULab1806/Fairy2i-W2) is 1e-6. Ours: comparisons instead of angles, and the floor for an
    empty axis, where the first code divides by zero.
    """
    if w_re.ndim != 2 or w_re.shape != w_im.shape:
        raise ShapeError(
            f"phase_quantize takes two [F,D] parts of one shape; got {tuple(w_re.shape)}, {tuple(w_im.shape)}"
        )
    re, im = w_re.float(), w_im.float()
    size_re, size_im = re.abs(), im.abs()
    # On a diagonal, equal signs turn to the imaginary axis, opposite ones to the real axis.
    is_diagonal = size_re == size_im
    is_real = (size_re > size_im) | (is_diagonal & (re.sign() * im.sign() <= 0))
    is_real |= re.isnan()  # compares as false: without this it would leave no trace in either scale
    codes = torch.where(is_real, torch.where(re < 0, 2, 0), torch.where(im < 0, 3, 1))
    return PhaseWeight(codes.to(torch.uint8), _mean(size_re, is_real, floor), _mean(size_im, ~is_real, floor))


def pack_phase(weight: PhaseWeight) -> PackedPhase:
    """The stored layout of a weight: four codes a byte, padded with code 0.

    Raises:
        ShapeError: the codes are not a uint8 matrix of 0..3.
    """
    codes = weight.codes
    if codes.ndim != 2 or codes.dtype != torch.uint8 or (codes.numel() and int(codes.max()) > 3):
        raise ShapeError(
            f"pack_phase takes uint8 codes [F,D] of 0..3; got {codes.dtype} {tuple(codes.shape)}"
            + (f" up to {int(codes.max())}" if codes.numel() else "")
        )
    return PackedPhase(pack_codes(codes), weight.s_re, weight.s_im, *codes.shape)


def unpack_phase(stored: PackedPhase) -> PhaseWeight:
    """The codes and scales of a stored weight, without its padding.

    Raises:
        ShapeError: the bytes do not have the size that the features ask for.
    """
    codes = unpack_codes(stored.packed, stored.out_features, stored.in_features)
    return PhaseWeight(codes, stored.s_re, stored.s_im)


def pack_codes(codes: Tensor) -> Tensor:
    """The bytes [rows, columns / 4] of uint8 codes [F, D] of 0..3, padded with code 0; see `PackedPhase`."""
    F, D = codes.shape
    rows, quads = packed_shape(F, D)
    whole = codes.new_zeros(rows, quads * CODES_PER_BYTE)
    whole[:F, :D] = codes
    parts = whole.view(rows, quads, CODES_PER_BYTE)
    return parts[..., 0] | parts[..., 1] << 2 | parts[..., 2] << 4 | parts[..., 3] << 6


def unpack_codes(packed: Tensor, out_features: int, in_features: int) -> Tensor:
    """The uint8 codes [F, D] of their bytes.

    Raises:
        ShapeError: the bytes do not have the size that the features ask for.
    """
    shape = packed_shape(out_features, in_features)
    if packed.dtype != torch.uint8 or packed.shape != shape:
        raise ShapeError(
            f"unpack_phase needs uint8 {shape} for {out_features} rows of {in_features} columns; got "
            f"{packed.dtype} {tuple(packed.shape)}"
        )
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts & 3).flatten(1)
    return codes[:out_features, :in_features].contiguous()


def packed_shape(out_features: int, in_features: int) -> tuple[int, int]:
    """Rows and bytes per row of a stored matrix."""
    rows = -(-out_features // ROW_BLOCK) * ROW_BLOCK
    return rows, -(-in_features // COLUMN_BLOCK) * COLUMN_BLOCK // CODES_PER_BYTE


def signs(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Re and Im of i^code as int8: (+1, 0, -1, 0) and (0, +1, 0, -1)."""
    table = torch.tensor([[1, 0, -1, 0], [0, 1, 0, -1]], dtype=torch.int8, device=codes.device)
    index = codes.long()
    return table[0][index], table[1][index]


def _mean(size: Tensor, chosen: Tensor, floor: float) -> Tensor:
    # `where`, not a product: an infinite weight of the other axis must not turn into NaN here.
    total = torch.where(chosen, size, 0.0).sum()
    return (total / chosen.sum().clamp(min=1)).clamp(min=floor)
