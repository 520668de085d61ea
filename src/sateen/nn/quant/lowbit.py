"""Real two-bit weights, the baselines of the complex ones: BitNet b1.58's ternary, and codes from -2 to 1.

One scale per matrix. Shape letters: F output rows, D input columns.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.nn.quant.rounding import PackedLinear, QuantLinear, round_activations, straight_through
from sateen.nn.spec import QuantSpec
from sateen.ops.complex_matmul.packing import SCALE_FLOOR, pack_codes, unpack_codes
from sateen.ops.complex_matmul.reference import activation_codes
from sateen.ops.int8_attention.quantize import LEVELS, integer_matmul

# Method -> its smallest and largest level; a stored code is the level less the smallest.
LEVELS_OF = {"ternary": (-1, 1), "int2": (-2, 1)}


class LowbitWeight(NamedTuple):
    """A matrix of small integers times one scale.

    Attributes:
        levels: int8 [F, D].
        scale: float32 scalar.
    """

    levels: Tensor
    scale: Tensor

    def dense(self) -> Tensor:
        """The matrix, float32 [F, D]."""
        return self.levels * self.scale


@torch.no_grad()
def lowbit_quantize(weight: Tensor, quant: QuantSpec) -> LowbitWeight:
    """The nearest level of each entry, halves to even, in float32.

    The scale is the mean |w| for `ternary` (BitNet b1.58, arXiv 2402.17764 eq. 1-3) and `int2_ratio` times it
    for `int2`, whose levels are those of Fairy±i's baseline (arXiv 2508.05571); at least 1e-5.
    """
    low, high = LEVELS_OF[quant.method]
    wide = weight.float()
    ratio = quant.int2_ratio if quant.method == "int2" else 1.0
    scale = (wide.abs().mean() * ratio).clamp(min=SCALE_FLOOR)
    return LowbitWeight((wide / scale).round().clamp(low, high).to(torch.int8), scale)


class LowbitLinear(nn.Linear, QuantLinear):
    """A linear layer whose master weight is quantised in every forward; tensors as before."""

    def __init__(self, linear: nn.Linear, quant: QuantSpec):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight, self.bias = linear.weight, linear.bias
        self.quant = quant

    def quantized_weight(self) -> Tensor:
        """[F, D], with the master's gradient."""
        return straight_through(self.weight, lowbit_quantize(self.weight, self.quant).dense())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(round_activations(x, self.quant.act), self.quantized_weight(), self.bias)

    def pack(self) -> PackedLowbitLinear:
        """The same layer without its master."""
        packed = PackedLowbitLinear(self, replace(self.quant, packed=True))
        weight = lowbit_quantize(self.weight, self.quant)
        packed.codes = pack_codes((weight.levels - LEVELS_OF[self.quant.method][0]).to(torch.uint8))
        packed.scales = weight.scale.reshape(1)
        return packed


class PackedLowbitLinear(PackedLinear):
    """Stored levels and one scale; with int8 activations the product is an exact integer sum, scaled once."""

    def __init__(self, linear: nn.Linear, quant: QuantSpec):
        shape = linear.out_features, linear.in_features
        super().__init__(quant, shape, (), 1, linear.bias, linear.weight.device)
        self.num_weights = self.out_features * self.in_features

    def _levels(self) -> Tensor:
        codes = unpack_codes(self.codes, self.out_features, self.in_features)
        return codes.to(torch.int8) + LEVELS_OF[self.quant.method][0]

    def quantized_weight(self) -> Tensor:
        """Float32 [F, D]."""
        return self._levels() * self.scales

    def forward(self, x: Tensor) -> Tensor:
        if self.quant.act == "float":
            return F.linear(x, self.quantized_weight().to(x.dtype), self.bias)
        codes, size = activation_codes(x)
        # The largest product is that of -128 and -2.
        sums = integer_matmul(codes, self._levels().mT, 2 * (LEVELS + 1) * self.in_features)
        y = sums * size * self.scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)
