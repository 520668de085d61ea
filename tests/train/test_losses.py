"""Values and gradients of the chunked losses against plain log_softmax in float64."""

import math

import pytest
import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.train.losses import soft_cross_entropy, token_logprobs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def problem(T: int, D: int, V: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, ids with every third row ignored, and an upstream gradient; all float64."""
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(T, D, generator=g, dtype=torch.float64)
    w = torch.randn(V, D, generator=g, dtype=torch.float64)
    ids = torch.randint(0, V, (T,), generator=g)
    ids[1::3] = -100
    return h, w, ids, torch.randn(T, generator=g, dtype=torch.float64)


def truth(h: Tensor, w: Tensor, ids: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    logprobs = torch.log_softmax(h @ w.T, -1).gather(1, ids.clamp(min=0)[:, None])[:, 0] * (ids >= 0)
    (logprobs * up).sum().backward()
    assert h.grad is not None
    assert w.grad is not None
    return logprobs.detach(), h.grad, w.grad


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want).norm() / want.norm())


@pytest.mark.parametrize("keep_bytes", [0, 2**30], ids=["recompute", "keep"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("T", "chunk"), [(1, 4), (7, 3), (8, 4), (9, 4), (5, None)])
def test_values_and_gradients_match_log_softmax(T, chunk, dtype, keep_bytes):
    h, w, ids, up = problem(T, 6, 11)
    want, want_dh, want_dw = truth(h, w, ids, up)
    h2, w2 = (x.to(dtype).requires_grad_() for x in (h, w))
    got = token_logprobs(h2, w2, ids, chunk_rows=chunk, keep_bytes=keep_bytes).logprobs_T
    (got * up.to(dtype)).sum().backward()
    assert got.dtype == dtype
    for a, b in ((got, want), (h2.grad, want_dh), (w2.grad, want_dw)):
        assert relative_error(a, b) < TOLERANCE[dtype]


def test_ignored_rows_give_zero_and_no_gradient():
    h, w, ids, _ = problem(6, 4, 5)
    h.requires_grad_()
    got = token_logprobs(h, w, ids).logprobs_T
    got.sum().backward()
    assert torch.equal(got[1::3], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(h.grad[1::3], torch.zeros(2, 4, dtype=torch.float64))
    assert (h.grad[0::3] != 0).any()


def test_all_rows_ignored_gives_zeros_and_zero_gradients():
    h, w, _, _ = problem(3, 4, 5)
    h.requires_grad_()
    w.requires_grad_()
    token_logprobs(h, w, torch.full((3,), -100)).logprobs_T.sum().backward()
    assert torch.equal(h.grad, torch.zeros_like(h))
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_uniform_logits_by_hand():
    result = token_logprobs(torch.zeros(2, 3), torch.ones(8, 3), torch.tensor([0, 7]), with_entropy=True)
    assert result.logprobs_T.tolist() == pytest.approx([-math.log(8)] * 2)
    assert result.entropy_T.tolist() == pytest.approx([math.log(8)] * 2)


def test_entropy_matches_the_definition():
    h, w, _, _ = problem(5, 6, 11)
    got = token_logprobs(h, w, torch.zeros(5, dtype=torch.int64), with_entropy=True).entropy_T
    logp = torch.log_softmax(h @ w.T, -1)
    torch.testing.assert_close(got, -(logp.exp() * logp).sum(-1), rtol=1e-12, atol=1e-12)


def test_improbable_tokens_keep_their_logprob():
    """A probability of e^-300 underflows in float32; its logarithm must not."""
    h, w = torch.tensor([[300.0]]), torch.tensor([[1.0], [0.0]])
    assert token_logprobs(h, w, torch.tensor([1])).logprobs_T.item() == pytest.approx(-300.0)


def test_confident_tokens_keep_their_gradient_in_bfloat16():
    """p = 1 - e^-8 rounds to 1 in bfloat16; the gradient 1 - p = 3.35e-4 must survive."""
    h = torch.tensor([[8.0]], dtype=torch.bfloat16, requires_grad=True)
    w = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    token_logprobs(h, w, torch.tensor([0])).logprobs_T.sum().backward()
    assert h.grad.item() == pytest.approx(1 / (1 + math.exp(8)), rel=1e-2)


@pytest.mark.parametrize("keep_bytes", [0, 2**30], ids=["recompute", "keep"])
def test_bfloat16_autocast_stays_near_float64(keep_bytes):
    h, w, ids, up = problem(40, 64, 33)
    w = w / 8
    want, want_dh, want_dw = truth(h, w, ids, up)
    h2, w2 = (x.float().requires_grad_() for x in (h, w))
    with torch.autocast("cpu", torch.bfloat16):
        got = token_logprobs(h2, w2, ids, chunk_rows=16, keep_bytes=keep_bytes).logprobs_T
    (got * up.float()).sum().backward()
    assert got.dtype == h2.grad.dtype == w2.grad.dtype == torch.float32
    for a, b in ((got, want), (h2.grad, want_dh), (w2.grad, want_dw)):
        assert relative_error(a, b) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("K", [1, 3])
def test_soft_targets_match_log_softmax(K, dtype):
    h, w, _, _ = problem(9, 6, 11)
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (9, K), generator=g)
    weights = torch.rand(9, K, generator=g, dtype=torch.float64)
    ids[2, 0] = -100
    weights[5] = 0
    h64, w64 = h.clone().requires_grad_(), w.clone().requires_grad_()
    logp = torch.log_softmax(h64 @ w64.T, -1).gather(1, ids.clamp(min=0))
    want = -(logp * weights * (ids >= 0)).sum()
    (3 * want).backward()
    h2, w2 = (x.to(dtype).requires_grad_() for x in (h, w))
    got = soft_cross_entropy(h2, w2, ids, weights.to(dtype), chunk_rows=4)
    (3 * got).backward()
    for a, b in ((got, want.detach()), (h2.grad, h64.grad), (w2.grad, w64.grad)):
        assert relative_error(a, b) < TOLERANCE[dtype]


def test_a_soft_target_equal_to_the_model_has_no_gradient():
    h, w, _, _ = problem(4, 6, 5)
    h.requires_grad_()
    target = torch.softmax(h.detach() @ w.T, -1)
    soft_cross_entropy(h, w, torch.arange(5).expand(4, 5), target).backward()
    assert h.grad.abs().max() < 1e-14


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"\[4, 6\].*\[5, 7\].*\[4\]"):
        token_logprobs(torch.zeros(4, 6), torch.zeros(5, 7), torch.zeros(4, dtype=torch.int64))
