"""Products of complex activations with two-bit phases: integer sums for int8, dense products for floats.

Shape letters: F output rows, D input columns; activations are [..., D].
"""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.ops.complex_matmul.packing import PhaseWeight, signs
from sateen.ops.int8_attention.quantize import LEVELS, integer_matmul
from sateen.ops.op import Op

ACTIVATION_FLOOR = 1e-5  # the least maximum of a token: smaller ones use fewer codes


def complex_matmul_reference(
    x_re: Tensor, x_im: Tensor, stages: tuple[PhaseWeight, ...], *, conjugate: bool, act: str
) -> tuple[Tensor, Tensor]:
    """See `sateen.ops.complex_matmul`; the stages are unpacked."""
    product = _integers if act == "int8" else _floats
    # With a conjugated input the imaginary part of x changes its sign.
    y_re, y_im = product(x_re, x_im, stages, -1 if conjugate else 1)
    return y_re.to(x_re.dtype), y_im.to(x_re.dtype)


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes of each row of one part, and the float32 size [..., 1] of one code; halves go to even."""
    x = x.float()
    levels = LEVELS / x.abs().amax(-1, keepdim=True).clamp(min=ACTIVATION_FLOOR)
    return (x * levels).round().clamp(-LEVELS - 1, LEVELS).to(torch.int8), 1 / levels


def _integers(
    x_re: Tensor, x_im: Tensor, stages: tuple[PhaseWeight, ...], turn: int
) -> tuple[Tensor, Tensor]:
    # Four sums, not two: the two scales of the weight and the two of the token differ.
    (r8, alpha), (i8, beta) = activation_codes(x_re), activation_codes(x_im)
    bound = LEVELS * x_re.shape[-1]
    y_re, y_im = _zeros(x_re, stages)
    for codes, s_re, s_im in stages:
        c_re, c_im = signs(codes)
        a, b = integer_matmul(r8, c_re.mT, bound), integer_matmul(i8, c_im.mT, bound)
        c, d = integer_matmul(r8, c_im.mT, bound), integer_matmul(i8, c_re.mT, bound)
        y_re = y_re + (s_re * alpha * a - turn * s_im * beta * b)
        y_im = y_im + (s_im * alpha * c + turn * s_re * beta * d)
    return y_re, y_im


def _floats(x_re: Tensor, x_im: Tensor, stages: tuple[PhaseWeight, ...], turn: int) -> tuple[Tensor, Tensor]:
    y_re, y_im = _zeros(x_re, stages)
    r, i = x_re.to(y_re.dtype), x_im.to(y_re.dtype) * turn
    for stage in stages:
        w_re, w_im = (part.to(y_re.dtype).mT for part in stage.dense())
        y_re = y_re + (r @ w_re - i @ w_im)
        y_im = y_im + (r @ w_im + i @ w_re)
    return y_re, y_im


def _zeros(x: Tensor, stages: tuple[PhaseWeight, ...]) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    zeros = torch.zeros(*x.shape[:-1], stages[0].codes.shape[0], dtype=dtype, device=x.device)
    return zeros, zeros


OP = Op("complex_matmul", complex_matmul_reference)
