"""`ops.grouped_matmul` against products written out row by row."""

from __future__ import annotations

import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ShapeError
from sateen.ops.grouped_matmul import OP

TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}  # relative RMS error
COUNTS = [[1], [0, 3, 0], [65, 1, 0, 63], [0, 0], [7, 64, 5]]


def by_rows(x, w, counts, grad):
    """Output and gradients in float64, one row at a time."""
    x, w, grad = x.detach().double(), w.detach().double(), grad.double()
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out = torch.zeros(len(owners), w.shape[2], dtype=torch.float64)
    d_x, d_w = torch.zeros_like(x), torch.zeros_like(w)
    for t, expert in enumerate(owners):
        for f in range(w.shape[2]):
            out[t, f] = (x[t] * w[expert, :, f]).sum()
        d_x[t] = (w[expert] * grad[t]).sum(-1)
        d_w[expert] += torch.outer(x[t], grad[t])
    return out, d_x, d_w


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("backend", list(OP.backends))
@pytest.mark.usefixtures("poisoned_memory")
def test_values_and_gradients(backend, counts, dtype):
    generator = torch.Generator().manual_seed(0)
    T, D, F = sum(counts), 9, 5
    x = torch.randn(T, D, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(len(counts), D, F, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(T, F, generator=generator).to(dtype)
    counts_E = torch.tensor(counts)
    out = ops.grouped_matmul(x, w, counts_E, backend=backend)
    out.backward(grad)
    assert out.dtype == dtype
    for got, want in zip((out, x.grad, w.grad), by_rows(x, w, counts, grad), strict=True):
        assert got.shape == want.shape
        gap = (got.detach().double() - want).square().sum().sqrt()
        assert float(gap) <= TOLERANCES[dtype] * float(want.square().sum().sqrt())


@pytest.mark.parametrize("backend", list(OP.backends))
def test_transposed_weights_need_no_copy(backend):
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(6, 4, generator=generator), torch.randn(2, 3, 4, generator=generator)
    out = ops.grouped_matmul(x, w.transpose(1, 2), torch.tensor([2, 4]), backend=backend)
    want = torch.stack([w[0 if t < 2 else 1] @ x[t] for t in range(6)])
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", list(OP.backends))
def test_autocast_sets_the_dtype(backend):
    x, w = torch.ones(3, 4), torch.ones(2, 4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.grouped_matmul(x, w, torch.tensor([1, 2]), backend=backend)
    assert out.dtype == torch.bfloat16
    assert out.eq(4).all()


def test_shape_errors_print_the_shapes():
    x, w = torch.zeros(4, 3), torch.zeros(2, 3, 5)
    with pytest.raises(
        ShapeError, match=r"takes x \[T,D\], w \[E,D,F\], counts \[E\]; got \(4, 2\), \(2, 3, 5\), \(2,\)"
    ):
        ops.grouped_matmul(x[:, :2], w, torch.tensor([2, 2]))
    with pytest.raises(ShapeError, match=r"got \(4, 3\), \(2, 3, 5\), \(3,\)"):
        ops.grouped_matmul(x, w, torch.tensor([2, 1, 1]))
    with pytest.raises(ShapeError, match="counts add up to 3 for 4 rows"):
        ops.grouped_matmul(x, w, torch.tensor([2, 1]))


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendUnavailable, match="unknown grouped_matmul backend 'cutlass'"):
        ops.grouped_matmul(torch.zeros(1, 1), torch.zeros(1, 1, 1), torch.tensor([1]), backend="cutlass")
