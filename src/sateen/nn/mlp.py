"""The dense feed-forward block, and its kinds by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from sateen.nn.complex import ComplexReLU2GLU


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


# Kind -> the block of a width of the residual stream, a width inside and an epsilon.
MLPS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "swiglu": lambda hidden_size, intermediate_size, eps: SwiGLU(hidden_size, intermediate_size),
    "complex_relu2": ComplexReLU2GLU,
}
