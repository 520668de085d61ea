"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen.nn.complex import ComplexRMSNorm


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`, the statistic in float32 whatever the dtype of `x`.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        normed = F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype)
        return normed * self.weight.to(x.dtype)


# Kind -> class, made of the width of the residual stream and epsilon.
NORMS: dict[str, type[RMSNorm] | type[ComplexRMSNorm]] = {"rms": RMSNorm, "complex_rms": ComplexRMSNorm}
