"""Complex products with two-bit weights, conjugate-linear or linear, with int8 or float activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.errors import ShapeError, unknown_name
from sateen.ops.complex_matmul.packing import (
    PackedPhase,
    PhaseWeight,
    pack_phase,
    phase_quantize,
    unpack_phase,
)
from sateen.ops.complex_matmul.reference import OP

__all__ = [
    "OP",
    "PackedPhase",
    "PhaseWeight",
    "complex_matmul",
    "pack_phase",
    "phase_quantize",
    "unpack_phase",
]

Stage = PhaseWeight | PackedPhase


@torch.no_grad()
def complex_matmul(
    x_re: Tensor,
    x_im: Tensor,
    weight: Stage | Sequence[Stage],
    *,
    conjugate: bool = True,
    act: str = "int8",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The real and imaginary part of W·conj(x), or of W·x, for a weight of two-bit phases.

    Args:
        x_re: real part of the activations [..., D].
        x_im: imaginary part, the same shape and dtype.
        weight: W [F, D], packed or as codes; several stages are added up.
        conjugate: W·conj(x), the form of every projection of Fairy±i; otherwise W·x.
        act: `int8` rounds each token to int8, re and im with a scale of their own; `float` rounds nothing.
        backend: `auto`, or one of `OP.backends`.

    Returns:
        (y_re, y_im), [..., F] each, in the activations' dtype; not differentiable.

    Raises:
        ShapeError: parts, stages or settings that do not fit together.
        BackendUnavailable: the named backend cannot run this call.

    Numerics: with `int8` a token's code is round(127 x / max(max|x|, 1e-5)), halves to even; four int32 sums
    per output are exact and are scaled in float32. `float` computes in float32, or float64 where x is.
    Source: Fairy±i, arXiv 2508.05571, and its published code for the conjugate and the int8 codes; Fairy2i,
    arXiv 2512.02901, for W·x and the stages. Ours: the integer form, and int8 activations for Fairy2i, whose
    code keeps them in floating point.
    """
    stages = [weight] if isinstance(weight, (PhaseWeight, PackedPhase)) else list(weight)
    unpacked = tuple(unpack_phase(stage) if isinstance(stage, PackedPhase) else stage for stage in stages)
    _check(x_re, x_im, unpacked, act)
    with torch.autocast(x_re.device.type, enabled=False):
        out: tuple[Tensor, Tensor] = OP(x_re, x_im, unpacked, conjugate=conjugate, act=act, backend=backend)
    return out


def _check(x_re: Tensor, x_im: Tensor, stages: tuple[PhaseWeight, ...], act: str) -> None:
    if act not in ("int8", "float"):
        raise ShapeError(unknown_name("complex_matmul act", act, ("int8", "float")))
    if not stages:
        raise ShapeError("complex_matmul needs at least one stage of the weight; got none")
    shapes = sorted({tuple(stage.codes.shape) for stage in stages})
    if len(shapes) > 1:
        raise ShapeError(f"complex_matmul needs stages of one shape; got {shapes}")
    if x_re.ndim < 1 or x_re.shape != x_im.shape or x_re.dtype != x_im.dtype:
        raise ShapeError(
            f"complex_matmul takes two parts of one shape and dtype; got {x_re.dtype} {tuple(x_re.shape)}, "
            f"{x_im.dtype} {tuple(x_im.shape)}"
        )
    if not x_re.is_floating_point() or x_re.shape[-1] != shapes[0][1] or x_re.shape[-1] == 0:
        raise ShapeError(
            f"complex_matmul takes float activations [...,D] for a weight [F,D], D at least 1; got "
            f"{x_re.dtype} {tuple(x_re.shape)} and {shapes[0]}"
        )
