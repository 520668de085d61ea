"""The bfloat16 way for CPUs without bfloat16 instructions against torch's own autocast."""

import pytest
import torch
from torch import nn

from sateen.train import precision
from sateen.train.precision import matmul_dtype


def results(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float().square().sum()).backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("is_native", [False, True])
def test_values_and_gradients_match_autocast(is_native, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16_matmul", lambda: is_native)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.SiLU(), nn.Linear(65, 7, bias=False))
    x = torch.randn(5, 9, 33)
    with torch.autocast("cpu", torch.bfloat16):
        want = results(model, x)
    with matmul_dtype("cpu", torch.bfloat16):
        got = results(model, x)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        # One unit in the last place of bfloat16 is 2^-8; sums in another order may cross one rounding.
        assert float((a - b).float().norm() / b.float().norm()) < 4e-3


def test_operands_are_rounded_and_products_exact():
    """1 + 2^-9 rounds to 1 in bfloat16; 257 needs nine bits and rounds to 256 on the way out."""
    linear = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        linear.weight.fill_(1 + 2**-9)
    with matmul_dtype("cpu", torch.bfloat16):
        assert linear(torch.ones(1, 1)).item() == 1.0
    linear = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[256.0, 1.0]]))
    with matmul_dtype("cpu", torch.bfloat16):
        assert linear(torch.ones(1, 2)).item() == 256.0


def test_float32_changes_nothing():
    linear = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    want = linear(x)
    with matmul_dtype("cpu", torch.float32):
        assert torch.equal(linear(x), want)
    assert not torch.is_autocast_enabled("cpu")
