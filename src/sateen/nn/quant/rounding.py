"""What every two-bit layer shares: straight-through gradients, int8 activations, and the packed base class.

Masters are full-precision parameters; each forward quantises them and the gradient passes as if it had not.
Shape letters: F output rows, D input columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sateen.errors import ConfigError
from sateen.nn.spec import QuantSpec
from sateen.ops.complex_matmul.packing import packed_shape
from sateen.ops.complex_matmul.reference import activation_codes


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, master: Tensor, quantized: Tensor) -> Tensor:
        return quantized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(master: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, in the master's dtype, with the gradient of the master as it is."""
    out: Tensor = _StraightThrough.apply(master, quantized.to(master.dtype))  # type: ignore[no-untyped-call]
    return out


def round_activations(x: Tensor, act: str, parts: int = 1) -> Tensor:
    """The input as a layer of `act` sees it: int8 codes times their size, or `x` itself for `float`.

    Args:
        x: [..., parts * D]; each part of a token has a scale of its own.
        act: `int8` or `float`.
        parts: 2 for [re | im] inputs.

    Numerics: code = round(127 x / max(max|x|, 1e-5)), halves to even; the gradient is the identity.
    Source: Fairy±i's published code.
    """
    if act == "float":
        return x
    codes, size = activation_codes(x.detach().unflatten(-1, (parts, -1)))
    return straight_through(x, (codes * size).flatten(-2))


class QuantLinear(nn.Module):
    """The base of every layer with two-bit weights, masters and packed ones alike.

    Attributes:
        quant: how it quantises.
    """

    quant: QuantSpec

    def quantized_weight(self) -> Tensor:
        """The real matrix that the layer multiplies by, as large as its input and output are wide."""
        raise NotImplementedError


class PackedLinear(QuantLinear):
    """Codes and scales without masters: serves, and does not train.

    Attributes:
        out_features, in_features: F and D of one stored matrix.
        codes: uint8 [..., rows, columns / 4], each matrix as `PackedPhase` lays it out.
        scales: float32 [..., S].
        bias: as the layer's before packing, or None.
        num_weights: real parameters that the layer stands for, bias excluded.
    """

    codes: Tensor
    scales: Tensor
    num_weights: int

    def __init__(
        self,
        quant: QuantSpec,
        shape: tuple[int, int],
        stack: tuple[int, ...],
        num_scales: int,
        bias: nn.Parameter | None,
        device: torch.device,
    ):
        super().__init__()
        self.quant = quant
        self.out_features, self.in_features = shape
        self.register_buffer(
            "codes", torch.zeros(*stack, *packed_shape(*shape), dtype=torch.uint8, device=device)
        )
        self.register_buffer("scales", torch.zeros(*stack, num_scales, dtype=torch.float32, device=device))
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """`quantized_weight()`: what other layers call their weight."""
        return self.quantized_weight()

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales, padding included."""
        return sum(t.numel() * t.element_size() for t in (self.codes, self.scales))

    def train(self, mode: bool = True) -> PackedLinear:
        """Refuses training: there is nothing a gradient could move.

        Raises:
            ConfigError: always, when `mode` is true.
        """
        if mode:
            raise ConfigError(
                "packed two-bit weights do not train; use the model they were packed from, or unpack with "
                "`sateen convert SRC DST --weights float`"
            )
        super().train(False)
        return self

    def extra_repr(self) -> str:
        return f"{self.quant.method}, out_features={self.out_features}, in_features={self.in_features}"
