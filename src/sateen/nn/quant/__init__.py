"""Linear layers with two-bit weights: complex phases, the widely-linear form, ternary and int2."""

from sateen.nn.quant.fairy import (
    Fairy2iLinear,
    PackedFairy2iLinear,
    PackedPhaseLinear,
    PhaseLinear,
    WidelyLinear,
    real_matrix,
    residual_phases,
    widely_linear,
)
from sateen.nn.quant.lowbit import LowbitLinear, LowbitWeight, PackedLowbitLinear, lowbit_quantize
from sateen.nn.quant.replace import METHODS, quantize_linears
from sateen.nn.quant.rounding import PackedLinear, QuantLinear, round_activations, straight_through

__all__ = [
    "METHODS",
    "Fairy2iLinear",
    "LowbitLinear",
    "LowbitWeight",
    "PackedFairy2iLinear",
    "PackedLinear",
    "PackedLowbitLinear",
    "PackedPhaseLinear",
    "PhaseLinear",
    "QuantLinear",
    "WidelyLinear",
    "lowbit_quantize",
    "quantize_linears",
    "real_matrix",
    "residual_phases",
    "round_activations",
    "straight_through",
    "widely_linear",
]
