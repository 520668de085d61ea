"""Layers whose numbers are complex: linear map, norm, gated MLP.

A complex vector of h entries is one real vector [re | im] of width 2h, so that the residual stream, caches
and the optimizers see real tensors only. Rotating complex queries and keys needs nothing here: one angle per
complex channel is the half-split rotary embedding of `sateen.nn.rotary` over the width 2 * head_dim. Source:
Fairy±i, arXiv 2508.05571, and its published code (PKULab1806/Fairy-plus-minus-i).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def complex_linear(x: Tensor, weight_real: Tensor, weight_imag: Tensor, *, conjugate: bool) -> Tensor:
    """W·conj(x), or W·x, of [re | im] vectors.

    Args:
        x: [..., 2 * D].
        weight_real: real part [F, D] of W.
        weight_imag: imaginary part, the same shape.
        conjugate: conjugate x before the product.

    Returns:
        [..., 2 * F], differentiable in x and in both parts of W.
    """
    parts = x.unflatten(-1, (2, weight_real.shape[1]))
    # Both parts of x share one product with each part of W, so no block matrix is ever written.
    by_real, by_imag = F.linear(parts, weight_real), F.linear(parts, weight_imag)
    turn = -1 if conjugate else 1
    re = by_real[..., 0, :] - turn * by_imag[..., 1, :]
    im = by_imag[..., 0, :] + turn * by_real[..., 1, :]
    return torch.cat([re, im], dim=-1)


class ComplexLinear(nn.Module):
    """A complex matrix without bias, W·conj(x) as in every projection of Fairy±i, or W·x.

    Attributes:
        in_features: complex entries D of the input, which is [..., 2 * D].
        out_features: complex entries F of the output, which is [..., 2 * F].
        conjugate: conjugate the input before the product.
        weight_real: real part [F, D].
        weight_imag: imaginary part [F, D].
    """

    def __init__(self, in_features: int, out_features: int, *, conjugate: bool = True):
        super().__init__()
        self.in_features, self.out_features, self.conjugate = in_features, out_features, conjugate
        self.weight_real = nn.Parameter(torch.empty(out_features, in_features))
        self.weight_imag = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return complex_linear(x, self.weight_real, self.weight_imag, conjugate=self.conjugate)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, conjugate={self.conjugate}"


class ComplexRMSNorm(nn.Module):
    """`x / sqrt(mean |x_j|^2 + eps) * weight`, the mean over complex entries, in float32 whatever x's dtype.

    The gains of real and imaginary parts are independent real numbers, not a complex product.

    Attributes:
        weight: gains [2h] of [re | im].

    Source: Fairy±i's published code, whose cast to float32 has no effect; computing in float32 is ours.
    """

    def __init__(self, size: int, eps: float):
        """`size` is the real width 2h."""
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        # The mean over 2h real numbers is half of that over h complex ones: hence eps / 2 and sqrt(1/2).
        size, eps, factor = self.weight.shape, self.eps / 2, math.sqrt(0.5)
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, size, self.weight * factor, eps)
        normed = F.rms_norm(x.float(), size, None, eps) * factor
        return normed.to(x.dtype) * self.weight.to(x.dtype)


def complex_relu2(x: Tensor) -> Tensor:
    """Each part squared on its own, and both zero where both are negative; [re | im] in and out.

    Source: Fairy±i's published code.
    """
    re, im = x.chunk(2, dim=-1)
    keep = ((re >= 0) | (im >= 0)).to(x.dtype)
    return x.square() * torch.cat([keep, keep], dim=-1)


class ComplexReLU2GLU(nn.Module):
    """`down(norm(conj(relu2(gate(x))) * up(x)))` over [re | im] vectors.

    Source: Fairy±i's published code.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float):
        """`hidden_size` is the real width 2h, `intermediate_size` the number of complex entries inside."""
        super().__init__()
        self.gate_proj = ComplexLinear(hidden_size // 2, intermediate_size)
        self.up_proj = ComplexLinear(hidden_size // 2, intermediate_size)
        self.ffn_layernorm = ComplexRMSNorm(2 * intermediate_size, eps)
        self.down_proj = ComplexLinear(intermediate_size, hidden_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        a_re, a_im = complex_relu2(self.gate_proj(x)).chunk(2, dim=-1)
        u_re, u_im = self.up_proj(x).chunk(2, dim=-1)
        product = torch.cat([a_re * u_re + a_im * u_im, a_re * u_im - a_im * u_re], dim=-1)
        out: Tensor = self.down_proj(self.ffn_layernorm(product))
        return out
