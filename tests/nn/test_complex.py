"""Complex layers against torch's complex128 arithmetic and formulas written out here."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest
import torch

from sateen.nn.attention import Attention, LayerLinks, Sequences
from sateen.nn.attention.complex import join_heads, split_heads
from sateen.nn.complex import ComplexLinear, ComplexReLU2GLU, ComplexRMSNorm, complex_relu2
from sateen.nn.rotary import apply_rotary, rotary_tables
from sateen.nn.spec import LayerSpec


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_complex(x):
    """[..., 2h] of [re | im] -> complex [..., h]."""
    re, im = np.split(x.detach().double().numpy(), 2, axis=-1)
    return re + 1j * im


def as_real(z):
    return torch.from_numpy(np.concatenate([z.real, z.imag], axis=-1))


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def fill(module, seed=1):
    """Random parameters in float64; norms around one."""
    module.double()
    with torch.no_grad():
        for i, (name, parameter) in enumerate(module.named_parameters()):
            centre = 1.0 if "norm" in name or parameter.ndim == 1 else 0.0
            parameter.copy_(centre + 0.5 * randn(*parameter.shape, seed=seed + i))
    return module


def matrix(layer):
    """The complex matrix of a ComplexLinear."""
    return layer.weight_real.detach().double().numpy() + 1j * layer.weight_imag.detach().double().numpy()


def test_the_projection_conjugates_its_input():
    # By hand: W = 1 + 2i, x = 3 + 5i. W·conj(x) = (1 + 2i)(3 - 5i) = 13 + i; W·x = -7 + 11i.
    for conjugate, want in ((True, [13.0, 1.0]), (False, [-7.0, 11.0])):
        layer = ComplexLinear(1, 1, conjugate=conjugate)
        with torch.no_grad():
            layer.weight_real.fill_(1.0)
            layer.weight_imag.fill_(2.0)
        assert layer(torch.tensor([3.0, 5.0])).tolist() == want


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 3, 7), (0, 7)])
def test_the_projection_is_the_complex_product(conjugate, shape):
    layer = fill(ComplexLinear(7, 4, conjugate=conjugate))
    x = randn(*shape[:-1], 14, seed=9)
    z = as_complex(x)
    want = (z.conj() if conjugate else z) @ matrix(layer).T
    out = layer(x)
    assert out.shape == (*shape[:-1], 8)
    close(out, as_real(want))


def test_gradients_of_the_projection_are_those_of_complex_autograd():
    layer, x = fill(ComplexLinear(5, 3)), randn(4, 10, seed=2).requires_grad_()
    target = randn(4, 6, seed=3)
    (layer(x) * target).sum().backward()

    w = torch.complex(layer.weight_real.detach(), layer.weight_imag.detach()).requires_grad_()
    z = torch.complex(x.detach()[:, :5], x.detach()[:, 5:]).requires_grad_()
    y = z.conj() @ w.T
    (y.real * target[:, :3] + y.imag * target[:, 3:]).sum().backward()
    close(layer.weight_real.grad, w.grad.real)
    close(layer.weight_imag.grad, w.grad.imag)
    close(x.grad, torch.cat([z.grad.real, z.grad.imag], dim=-1))


def test_the_norm_takes_its_mean_over_complex_entries():
    norm = fill(ComplexRMSNorm(12, 1e-3))
    x = 0.05 * randn(4, 12)  # small, so that epsilon counts
    z, gains = as_complex(x), norm.weight.detach().numpy()
    # Over 6 complex entries; a mean over 12 real ones would be half of it.
    r = 1 / np.sqrt((np.abs(z) ** 2).mean(-1, keepdims=True) + 1e-3)
    close(norm(x), as_real(z.real * r * gains[:6] + 1j * z.imag * r * gains[6:]))
    close(ComplexRMSNorm(2, 0.0)(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]), 1e-6)


def test_the_norm_of_bfloat16_has_a_float32_statistic():
    x = (300 * randn(3, 64)).to(torch.bfloat16)
    got = ComplexRMSNorm(64, 1e-5).to(torch.bfloat16)(x)
    assert got.dtype == torch.bfloat16
    z = as_complex(x)
    want = as_real(z / np.sqrt((np.abs(z) ** 2).mean(-1, keepdims=True) + 1e-5))
    assert torch.equal(got, want.to(torch.bfloat16))  # the statistic adds no error: one rounding at the end


def test_complex_relu2_in_the_four_quadrants():
    re = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0, -2.0, -0.0])
    im = torch.tensor([3.0, 3.0, -3.0, -3.0, -3.0, 0.0, -3.0])
    got = complex_relu2(torch.cat([re, im])).view(2, -1)
    assert got.tolist() == [[4, 4, 4, 0, 0, 4, 0], [9, 9, 9, 0, 9, 0, 9]]


def test_the_mlp_is_its_formula():
    mlp = fill(ComplexReLU2GLU(8, 5, 1e-5))
    x = randn(6, 8)
    z = as_complex(x)
    g, u = (z.conj() @ matrix(layer).T for layer in (mlp.gate_proj, mlp.up_proj))
    both = (g.real < 0) & (g.imag < 0)
    assert both.any()
    assert not both.all()
    g = np.where(both, 0, g)
    product = (g.real**2 - 1j * g.imag**2) * u  # conj(a)·u, each part of a squared on its own
    r = 1 / np.sqrt((np.abs(product) ** 2).mean(-1, keepdims=True) + 1e-5)
    gains = mlp.ffn_layernorm.weight.detach().numpy()
    normed = product.real * r * gains[:5] + 1j * product.imag * r * gains[5:]
    close(mlp(x), as_real(normed.conj() @ matrix(mlp.down_proj).T))


@pytest.mark.parametrize("theta", [10000.0, 7.0])
@pytest.mark.parametrize(
    ("positions", "tolerance"),
    [(torch.tensor([0, 1, 5, 33]), 1e-5), (torch.tensor([1000, 1, 2, 2047]), 5e-4)],
)
def test_one_angle_per_complex_channel(theta, positions, tolerance):
    """Angles are float32 numbers: those of thousands of radians are exact to some 1e-4."""
    channels = 6
    x = randn(4, 3, 2 * channels)
    got = apply_rotary(x, rotary_tables(positions, theta, 2 * channels))
    j = np.arange(channels)
    angles = positions.numpy()[:, None] * theta ** (-j / channels)  # j / head_dim, not 2j / head_dim
    want = as_complex(x) * np.exp(1j * angles)[:, None]
    close(got, as_real(want), tolerance)


def test_heads_keep_their_real_and_imaginary_parts_together():
    T, N, c = 2, 3, 4
    z = np.arange(T * N * c).reshape(T, N * c) * (1 + 100j)
    heads = split_heads(as_real(z), N)
    assert heads.shape == (T, N, 2 * c)
    assert np.array_equal(as_complex(heads), z.reshape(T, N, c))
    assert torch.equal(join_heads(heads), as_real(z))


def test_the_joined_dot_product_is_the_real_part_of_the_hermitian_one():
    q, k = randn(10), randn(10, seed=1)
    want = (as_complex(q) * as_complex(k).conj()).sum().real
    close(q @ k, torch.tensor(want))


def attention_by_formula(layer, spec, x, scale):
    """Complex attention, one query at a time, from the equations."""
    z, (N, K), c = as_complex(x), (spec.num_attention_heads, spec.num_key_value_heads), spec.head_dim // 2
    T = len(z)

    def heads(projection, count):
        return (z.conj() @ matrix(projection).T).reshape(T, count, -1)

    angles = np.arange(T)[:, None] * spec.rope_theta ** (-np.arange(c) / c)
    turn = np.exp(1j * angles)[:, None]
    q, k, v = heads(layer.q_proj, N) * turn, heads(layer.k_proj, K) * turn, heads(layer.v_proj, K)
    out = np.zeros((T, N, v.shape[-1]), dtype=complex)
    for t in range(T):
        for n in range(N):
            group = n // (N // K)
            scores = scale * (q[t, n] * k[: t + 1, group].conj()).sum(-1).real
            weights = np.exp(scores - scores.max())
            out[t, n] = (weights / weights.sum()) @ v[: t + 1, group]
    out = out.reshape(T, -1)
    r = 1 / np.sqrt((np.abs(out) ** 2).mean(-1, keepdims=True) + 1e-5)
    gains, width = layer.attn_layernorm.weight.detach().numpy(), out.shape[1]
    out = out.real * r * gains[:width] + 1j * out.imag * r * gains[width:]
    return as_real(out.conj() @ matrix(layer.o_proj).T)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.9])
def test_attention_is_its_formula(kv_heads, scale):
    options = {} if scale is None else {"scale": scale}
    spec = LayerSpec(
        index=0, attention="complex_attention", num_attention_heads=4, num_key_value_heads=kv_heads,
        head_dim=10, v_head_dim=6, rope_theta=50.0, rotary_dim=10, options=MappingProxyType(options),
    )  # fmt: skip
    layer = fill(Attention.kinds[spec.attention](12, spec, 1e-5))
    x = randn(9, 12)
    got = layer(x, Sequences.of_lengths([9]), None, LayerLinks())
    want = attention_by_formula(layer, spec, x, 10**-0.5 if scale is None else scale)
    close(got, want, 1e-5)  # the rotary table is float32
