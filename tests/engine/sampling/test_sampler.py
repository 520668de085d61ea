"""Distributions worked by hand, and draws against them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sateen.engine.request import SamplingParams
from sateen.engine.sampling.sampler import choose, cut, distribution, draw, mask_padding
from sateen.engine.state import Request

PROBS = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor([[math.log(p) for p in PROBS]])


def one(**params):
    return distribution(LOGITS, [SamplingParams(**params)])[0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": -1}, PROBS),
        ({"top_k": 9}, PROBS),
        ({"top_p": 0.65}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"min_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        # Top-k first leaves 4/7 and 3/7, of which top-p 0.5 keeps the first alone.
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        # At temperature 0.5 the ratios are squared: 0.09/0.16 = 0.5625 stays and 0.04/0.16 goes.
        ({"temperature": 0.5, "min_p": 0.5}, [0, 16 / 25, 0, 9 / 25]),
    ],
)
def test_processed_distribution(params, expected):
    torch.testing.assert_close(
        one(**params), torch.tensor(expected, dtype=torch.float32), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_cuts_are_those_of_transformers(seed):
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(seed)) * 3
    params = SamplingParams(
        temperature=0.7 + 0.3 * seed, min_p=0.01, top_k=40 - 9 * seed, top_p=0.6 + 0.1 * seed
    )
    x = logits.clone()
    for warper in (
        TemperatureLogitsWarper(params.temperature),
        MinPLogitsWarper(params.min_p),
        TopKLogitsWarper(params.top_k),
        TopPLogitsWarper(params.top_p),
    ):
        x = warper(None, x)
    got = cut(logits, [params] * 5)
    assert torch.equal(got.isinf(), x.isinf())
    torch.testing.assert_close(got, x)


def kept_by_hand(logits, params):
    """Which tokens the cuts keep of a row, sorted whole in float64, equal logits by their ids."""
    x = logits.astype(np.float64) / params.temperature
    order = np.argsort(-x, kind="stable")
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = np.exp(x[order] - x.max())
    before = np.cumsum(weights) - weights
    return {*order[before < params.top_p * weights.sum()].tolist()} if params.top_p < 1 else {*order.tolist()}


@pytest.mark.parametrize("scale", [0.3, 2.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts_of_large_vocabularies(scale, dtype):
    """Nuclei of a few and of thousands of tokens in one batch, with the many equal logits of bfloat16."""
    settings = [
        {"top_p": 0.9}, {"top_p": 0.3}, {"top_k": 40}, {"top_k": 300, "top_p": 0.95}, {}, {"top_k": 5999},
        {"top_p": 0.999, "temperature": 0.5}, {"top_k": 257}, {"top_k": 256}, {"top_k": 1},
    ]  # fmt: skip
    params = [SamplingParams(**one) for one in settings]
    generator = torch.Generator().manual_seed(int(scale * 10))
    logits = (torch.randn(len(params), 6000, generator=generator) * scale).to(dtype)
    ties = 0
    for some in (params, params[2:4], params[:1]):
        rows = logits[: len(some)]
        for got, row, one in zip(cut(rows, some), rows, some, strict=True):
            expected = kept_by_hand(row.float().numpy(), one)
            kept = set(got.isfinite().nonzero().flatten().tolist())
            assert kept == expected
            least = got[list(kept)].min()
            ties += int((row.float() / one.temperature == least).sum()) > int((got == least).sum())
    assert (ties > 0) == (dtype == torch.bfloat16)


def test_settings_beyond_float32_are_uniform():
    params = SamplingParams(temperature=1e300, top_k=10**300)
    masked = mask_padding(LOGITS, 3)
    torch.testing.assert_close(distribution(masked, [params])[0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_rows_are_processed_by_their_own_settings():
    params = [
        SamplingParams(top_k=1),
        SamplingParams(),
        SamplingParams(top_p=0.65, temperature=2.0),
    ]
    together = distribution(LOGITS.expand(3, -1), params)
    for row, p in zip(together, params, strict=True):
        torch.testing.assert_close(row, distribution(LOGITS, [p])[0])


def test_ties_at_a_cut_keep_the_lower_index():
    even = torch.zeros(1, 4)
    assert distribution(even, [SamplingParams(top_k=2)])[0].tolist() == [0.5, 0.5, 0, 0]
    assert distribution(even, [SamplingParams(top_p=0.5)])[0].tolist() == [
        0.5,
        0.5,
        0,
        0,
    ]


def test_draw_inverts_the_distribution():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    at = [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7499, 3), (0.75, 4), (1 - 2**-53, 4)]
    for u, token in at:
        assert draw(probs, torch.tensor([u], dtype=torch.float64)).tolist() == [token]
    assert draw(probs * 1e-30, torch.tensor([0.3], dtype=torch.float64)).tolist() == [3]


def test_greedy_takes_the_lower_of_equal_logits():
    request = Request(0, SamplingParams(temperature=0), [1], 1, 5)
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert choose(logits, [request])[0].tolist() == [1]


def test_a_seed_fixes_the_draws_whoever_shares_the_batch():
    def request(seed, **params):
        generator = torch.Generator().manual_seed(seed)
        return Request(seed, SamplingParams(**params), [1], 1, 5, generator=generator)

    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    alone = request(7)
    drawn_alone = [choose(logits[1:2], [alone])[0].item() for _ in range(20)]
    crowd = [
        request(1, temperature=3.0),
        request(7),
        Request(2, SamplingParams(temperature=0), [1], 1, 5),
    ]
    rows = [choose(logits, crowd)[0].tolist() for _ in range(20)]
    assert [row[1] for row in rows] == drawn_alone
    assert len(set(drawn_alone)) > 5
    assert {row[2] for row in rows} == {int(logits[2].argmax())}


def test_padding_rows_have_no_probability():
    masked = mask_padding(LOGITS, 3)
    torch.testing.assert_close(masked.softmax(-1)[0], torch.tensor([1 / 7, 4 / 7, 2 / 7, 0]))
    assert mask_padding(LOGITS, 4) is LOGITS
    assert torch.isfinite(LOGITS).all()
