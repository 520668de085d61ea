"""The experiment with int4 queries and keys: its algorithm in NumPy, and the gate every call has to pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import AccuracyError, BackendUnavailable, ShapeError
from sateen.ops.int8_attention import int4


def rounded(x):
    """What 4-bit codes with a scale per 16 numbers of the last dimension stand for, in float64."""
    runs = x.double().numpy().reshape(*x.shape[:-1], -1, 16)
    scale = np.abs(runs).max(-1, keepdims=True) / 7
    codes = np.rint(runs / np.where(scale > 0, scale, 1))
    assert np.abs(codes).max() == 7
    return (codes * scale).reshape(x.shape)


def softmax_values(q, k, v, seen, sink=None):
    """Float64 attention [T, N, V] of [T, N, H], [S, K, H], [S, K, V]."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(q.shape[-1])
    shares = np.exp(np.where(seen, scores, -np.inf))
    total = shares.sum(-1, keepdims=True)
    if sink is not None:
        total = total + np.exp(sink)[:, None, None]
    return np.einsum("nts,snv->tnv", shares / total, v)


def tensors(T=40, S=56, N=4, K=2, H=32, V=24, spread="normal"):
    generator = torch.Generator().manual_seed(0)
    make = (
        torch.randn
        if spread == "normal"
        else lambda *size, generator: torch.rand(*size, generator=generator) - 0.5
    )
    return [make(*size, generator=generator) for size in ((T, N, H), (S, K, H), (S, K, V))]


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("has_sink", [False, True])
def test_the_form_with_float_values_is_attention_over_rounded_queries_and_keys(window, has_sink):
    q, k, v = tensors()
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0]) if has_sink else None
    T, S = len(q), len(k)
    place, key = np.arange(T)[:, None] + S - T, np.arange(S)
    seen = (key <= place) & (key > place - (window or S))
    mean = k.mean(0, keepdim=True)
    smoothed = rounded(k - mean)
    # The mean goes back for the sink alone: it adds the same to all scores of a query.
    group = np.repeat(mean.double().numpy(), 2, axis=1)
    lift = np.einsum("tnh,snh->nts", q.double().numpy(), group) / np.sqrt(32)
    q4 = rounded(q)
    want = softmax_values(q4, smoothed, v.double().numpy(), seen)
    if has_sink:
        keys = np.repeat(smoothed, 2, axis=1)
        scores = np.einsum("tnh,snh->nts", q4, keys) / np.sqrt(32) + lift
        total = np.exp(np.where(seen, scores, -np.inf)).sum(-1)
        want = want * (total / (total + np.exp(sink.double().numpy())[:, None])).T[..., None]
    got = ops.int8_attention(
        q, k, v, cu_seqlens_q=torch.tensor([0, T]), cu_seqlens_k=torch.tensor([0, S]), window=window,
        sink_N=sink, qk="int4", pv="float", max_error=1.0,
    )  # fmt: skip
    assert np.abs(got.numpy() - want).max() < 1e-5


def test_a_scale_per_16_channels_errs_less_than_one_per_token():
    q, k, v = (x[None].transpose(1, 2) for x in tensors(256, 256, 2, 2, 64, 64))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    got = ops.int8_sdpa(q, k, v, qk="int4", pv="float", max_error=1.0)
    error = float((got - exact).norm() / exact.norm())

    def per_token(x):
        scale = x.abs().amax(-1, keepdim=True) / 7
        return (x / scale).round() * scale

    coarse = torch.nn.functional.scaled_dot_product_attention(
        per_token(q), per_token(k - k.mean(2, keepdim=True)), v
    )
    assert 0.05 < error < 0.9 * float((coarse - exact).norm() / exact.norm())


def test_the_gate_refuses_what_it_measures_to_be_too_wrong():
    q, k, v = tensors(64, 64, H=64)  # no more queries than the gate looks at: its figure is the whole error
    offsets = torch.tensor([0, 64])
    got = ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4", max_error=1.0)
    seen = np.tril(np.ones((64, 64), bool))
    exact = softmax_values(*(x.double().numpy() for x in (q, k, v)), seen)
    error = np.linalg.norm(got.numpy() - exact) / np.linalg.norm(exact)
    assert 0.03 < error < 0.5
    with pytest.raises(AccuracyError, match=f"sampled queries is {error:.2%}, accepted is 2.50%"):
        ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4")
    ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4", max_error=error * 1.001)
    with pytest.raises(AccuracyError):
        ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4", max_error=error * 0.999)
    assert AccuracyError.exit_code == 3


def test_numbers_in_a_narrow_range_pass():
    q, k, v = (x[None].transpose(1, 2) for x in tensors(300, 300, H=64, spread="uniform"))
    for causal in (False, True):
        out, lse = ops.int8_sdpa(q, k, v, causal=causal, return_lse=True, qk="int4")
        assert out.shape == (1, 4, 300, 24)
        assert lse.shape == (1, 4, 300)


def test_every_sequence_is_sampled():
    q, k, v = tensors(300, 300, H=64, spread="uniform")
    k[290:] *= 400  # the second, short sequence alone is too sharp for four bits
    offsets = torch.tensor([0, 290, 300])
    with pytest.raises(AccuracyError):
        ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4")
    ops.int8_attention(q[:290], k[:290], v[:290], cu_seqlens_q=offsets[:2], qk="int4")


def test_not_a_number_is_refused_and_nothing_to_do_is_fine():
    q, k, v = tensors(8, 8)
    q[3] = torch.nan
    with pytest.raises(AccuracyError):
        ops.int8_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 8]), qk="int4", max_error=1.0)
    with pytest.raises(AccuracyError):  # no query is left whose exact output is more than zeros
        ops.int8_attention(q * torch.nan, k, v, cu_seqlens_q=torch.tensor([0, 8]), qk="int4", max_error=1.0)
    zeros = ops.int8_attention(k.repeat(1, 2, 1), k, v * 0, cu_seqlens_q=torch.tensor([0, 8]), qk="int4")
    assert not zeros.any()
    empty = ops.int8_attention(q[:0], k[:0], v[:0], cu_seqlens_q=torch.tensor([0, 0]), qk="int4")
    assert empty.shape == (0, 4, 24)


def test_what_does_not_fit_is_refused():
    q, k, v = tensors(8, 8, H=24)
    offsets = torch.tensor([0, 8])
    with pytest.raises(ShapeError, match="multiple of 16 channels; got 24"):
        ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4")
    with pytest.raises(ShapeError, match="unknown int8_attention qk 'int2'"):
        ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int2")
    q, k, v = tensors(8, 8)
    with pytest.raises(BackendUnavailable, match="an experiment of the reference"):
        ops.int8_attention(q, k, v, cu_seqlens_q=offsets, qk="int4", backend="native")


def test_the_sample_is_spread_over_the_queries(monkeypatch):
    q, k, v = tensors(200, 200, H=64, spread="uniform")
    k[:20] *= 400
    monkeypatch.setattr(int4, "SAMPLE", 1)  # the first query alone, which sees one key and is exact
    ops.int8_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 200]), qk="int4")
    monkeypatch.setattr(int4, "SAMPLE", 64)
    with pytest.raises(AccuracyError):
        ops.int8_attention(q, k, v, cu_seqlens_q=torch.tensor([0, 200]), qk="int4")
