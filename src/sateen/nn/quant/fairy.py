"""Complex two-bit weights: Fairy±i's phases, and Fairy2i's widely-linear form of a real matrix.

A real matrix R [2F, 2D] in blocks by halves acts on [re | im] vectors as y = U·x + W·conj(x); Fairy2i
quantises U and W in stages. Sources: Fairy±i, arXiv 2508.05571; Fairy2i, arXiv 2512.02901, and its published
code (PKULab1806/Fairy2i-W2). Shape letters: F output rows, D input columns of a complex matrix, T stages.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sateen import ops
from sateen.nn.complex import ComplexLinear, complex_linear
from sateen.nn.quant.rounding import PackedLinear, QuantLinear, round_activations, straight_through
from sateen.nn.spec import QuantSpec
from sateen.ops import PackedPhase, PhaseWeight

FAIRY2I_FLOOR = 1e-6  # the least scale in the published code of Fairy2i


class WidelyLinear(NamedTuple):
    """The complex matrices U and W of y = U·x + W·conj(x), [F, D] each."""

    u_re: Tensor
    u_im: Tensor
    w_re: Tensor
    w_im: Tensor


def widely_linear(matrix: Tensor) -> WidelyLinear:
    """U and W of a real matrix [2F, 2D]; lossless up to rounding. Source: Fairy2i §3 (arXiv 2512.02901)."""
    (r11, r12), (r21, r22) = (rows.chunk(2, dim=1) for rows in matrix.chunk(2, dim=0))
    return WidelyLinear((r11 + r22) / 2, (r21 - r12) / 2, (r11 - r22) / 2, (r12 + r21) / 2)


def real_matrix(parts: WidelyLinear) -> Tensor:
    """The real matrix [2F, 2D] of U and W: the inverse of `widely_linear`."""
    u_re, u_im, w_re, w_im = parts
    upper, lower = torch.cat([u_re + w_re, w_im - u_im], 1), torch.cat([w_im + u_im, u_re - w_re], 1)
    return torch.cat([upper, lower])


@torch.no_grad()
def residual_phases(w_re: Tensor, w_im: Tensor, stages: int, floor: float) -> list[PhaseWeight]:
    """T phase weights whose sum approximates a complex matrix: each quantises what the others left over."""
    re, im = w_re.float(), w_im.float()
    found = []
    for _ in range(stages):
        found.append(ops.phase_quantize(re, im, floor=floor))
        q_re, q_im = found[-1].dense()
        re, im = re - q_re, im - q_im
    return found


def _sum(stages: list[PhaseWeight]) -> tuple[Tensor, Tensor]:
    dense = [stage.dense() for stage in stages]
    return torch.stack([re for re, _ in dense]).sum(0), torch.stack([im for _, im in dense]).sum(0)


class PhaseLinear(ComplexLinear, QuantLinear):
    """A complex layer whose masters become phases in every forward, as Fairy±i trains from its first step."""

    def __init__(self, linear: ComplexLinear, quant: QuantSpec):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, conjugate=linear.conjugate)
        self.weight_real, self.weight_imag = linear.weight_real, linear.weight_imag
        self.quant = quant

    def quantized_parts(self) -> tuple[Tensor, Tensor]:
        """Re and Im [F, D], each with its master's gradient."""
        re, im = ops.phase_quantize(self.weight_real, self.weight_imag).dense()
        return straight_through(self.weight_real, re), straight_through(self.weight_imag, im)

    def quantized_weight(self) -> Tensor:
        """[2F, 2D], see `real_matrix`."""
        return _block_matrix(*self.quantized_parts(), self.conjugate)

    def forward(self, x: Tensor) -> Tensor:
        x = round_activations(x, self.quant.act, 2)
        return complex_linear(x, *self.quantized_parts(), conjugate=self.conjugate)

    def pack(self) -> PackedPhaseLinear:
        """The same layer without its masters."""
        packed = PackedPhaseLinear(self, replace(self.quant, packed=True))
        stored = ops.pack_phase(ops.phase_quantize(self.weight_real, self.weight_imag))
        packed.codes, packed.scales = stored.packed, torch.stack([stored.s_re, stored.s_im])
        return packed


class PackedPhaseLinear(PackedLinear):
    """Stored phases: `codes` [rows, columns / 4], `scales` [2] of the real and the imaginary axis."""

    def __init__(self, linear: ComplexLinear, quant: QuantSpec):
        shape = linear.out_features, linear.in_features
        super().__init__(quant, shape, (), 2, None, linear.weight_real.device)
        self.conjugate = linear.conjugate
        self.num_weights = 2 * self.out_features * self.in_features

    def stored(self) -> PackedPhase:
        """The weight in the form that `ops.complex_matmul` takes."""
        s_re, s_im = self.scales
        return PackedPhase(self.codes, s_re, s_im, self.out_features, self.in_features)

    def quantized_parts(self) -> tuple[Tensor, Tensor]:
        """Re and Im, float32 [F, D] each."""
        return ops.unpack_phase(self.stored()).dense()

    def quantized_weight(self) -> Tensor:
        """Float32 [2F, 2D]."""
        return _block_matrix(*self.quantized_parts(), self.conjugate)

    def forward(self, x: Tensor) -> Tensor:
        re, im = x.chunk(2, dim=-1)
        y = ops.complex_matmul(re, im, self.stored(), conjugate=self.conjugate, act=self.quant.act)
        return torch.cat(y, dim=-1)


class Fairy2iLinear(nn.Linear, QuantLinear):
    """A real layer whose master [2F, 2D] is rebuilt from the quantised U and W in every forward.

    The master stays the real matrix, as in the published code. U and W are linear in it, so straight-through
    gradients of both are that of the matrix, and a checkpoint without its `quantization_config` is the model
    it came from.
    """

    def __init__(self, linear: nn.Linear, quant: QuantSpec):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.bias = linear.weight, linear.bias
        self.quant = quant

    def stages(self) -> tuple[list[PhaseWeight], list[PhaseWeight]]:
        """The T stages of U and of W."""
        parts = widely_linear(self.weight.detach().float())
        T = self.quant.stages
        return (
            residual_phases(parts.u_re, parts.u_im, T, FAIRY2I_FLOOR),
            residual_phases(parts.w_re, parts.w_im, T, FAIRY2I_FLOOR),
        )

    def quantized_weight(self) -> Tensor:
        """[2F, 2D], with the master's gradient."""
        u, w = self.stages()
        return straight_through(self.weight, real_matrix(WidelyLinear(*_sum(u), *_sum(w))))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(round_activations(x, self.quant.act, 2), self.quantized_weight(), self.bias)

    def pack(self) -> PackedFairy2iLinear:
        """The same layer without its master."""
        packed = PackedFairy2iLinear(self, replace(self.quant, packed=True))
        stored = [[ops.pack_phase(stage) for stage in stages] for stages in self.stages()]
        packed.codes = torch.stack([torch.stack([s.packed for s in stages]) for stages in stored])
        scales = [torch.stack([s.s_re, s.s_im]) for stages in stored for s in stages]
        packed.scales = torch.stack(scales).view(2, self.quant.stages, 2)
        return packed


class PackedFairy2iLinear(PackedLinear):
    """Stored stages: `codes` [2, T, rows, columns / 4] and `scales` [2, T, 2], U before W.

    With int8 activations each half of a token has a scale of its own (source: ours; the published code keeps
    activations in floating point).
    """

    def __init__(self, linear: nn.Linear, quant: QuantSpec):
        shape = linear.out_features // 2, linear.in_features // 2
        super().__init__(quant, shape, (2, quant.stages), 2, linear.bias, linear.weight.device)
        self.num_weights = 4 * self.out_features * self.in_features

    def stored(self, which: int) -> list[PackedPhase]:
        """The stages of U (0) or W (1) in the form that `ops.complex_matmul` takes."""
        return [
            PackedPhase(codes, s_re, s_im, self.out_features, self.in_features)
            for codes, (s_re, s_im) in zip(self.codes[which], self.scales[which], strict=True)
        ]

    def quantized_weight(self) -> Tensor:
        """Float32 [2F, 2D]."""
        u, w = (_sum([ops.unpack_phase(stage) for stage in self.stored(which)]) for which in (0, 1))
        return real_matrix(WidelyLinear(*u, *w))

    def forward(self, x: Tensor) -> Tensor:
        (re, im), act = x.chunk(2, dim=-1), self.quant.act
        u_re, u_im = ops.complex_matmul(re, im, self.stored(0), conjugate=False, act=act)
        w_re, w_im = ops.complex_matmul(re, im, self.stored(1), conjugate=True, act=act)
        y = torch.cat([u_re + w_re, u_im + w_im], dim=-1)
        return y if self.bias is None else (y + self.bias).to(x.dtype)


def _block_matrix(w_re: Tensor, w_im: Tensor, conjugate: bool) -> Tensor:
    """The real matrix [2F, 2D] of W·conj(x), or of W·x."""
    zeros = torch.zeros_like(w_re)
    parts = (zeros, zeros, w_re, w_im) if conjugate else (w_re, w_im, zeros, zeros)
    return real_matrix(WidelyLinear(*parts))
