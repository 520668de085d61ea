"""Which drafts stand, against probabilities worked by hand."""

from __future__ import annotations

import pytest
import torch

from sateen.engine.sampling.verification import accept, accept_greedy

P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
Q = torch.tensor([[0.2, 0.2, 0.3, 0.3], [0.4, 0.3, 0.2, 0.1]])


def grid(first, last, drafts, num_drafts, steps=40):
    """`accept` on a midpoint grid over its random numbers: exact for rules that are piecewise constant."""
    u = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    cells = torch.cartesian_prod(*[u] * (len(drafts) + 1)).view(-1, len(drafts) + 1)
    n = len(cells)
    return accept(
        first.expand(n, -1, -1), last.expand(n, -1, -1), torch.tensor([drafts] * n),
        torch.full((n,), num_drafts), cells,
    )  # fmt: skip


def test_one_draft_is_kept_with_min_1_p_over_q():
    for draft, expected in enumerate([1.0, 1.0, 2 / 3, 0.0]):
        accepted, _ = grid(P[:2], Q[:1], [draft], 1, steps=300)
        assert accepted.double().mean().item() == pytest.approx(expected, abs=1e-9)


def test_a_rejected_draft_is_replaced_from_what_the_target_has_more_of():
    # max(0, p - q) = (0.3, 0.1, 0, 0) and its sum is 0.4.
    accepted, token = grid(P[:2], Q[:1], [3], 1, steps=200)
    assert accepted.max() == 0
    counts = torch.bincount(token, minlength=4) / len(token)
    torch.testing.assert_close(counts, torch.tensor([0.75, 0.25, 0.0, 0.0]))


def test_the_bonus_token_comes_from_the_last_row():
    accepted, token = grid(P[1:], P[1:2], [3], 1, steps=200)  # p equals q: always kept
    assert accepted.min() == 1
    torch.testing.assert_close(torch.bincount(token, minlength=4) / len(token), P[2])


def test_padding_drafts_are_never_kept():
    accepted, token = grid(P, torch.ones(2, 4) / 4, [0, 0], 0, steps=50)
    assert accepted.max() == 0
    torch.testing.assert_close(torch.bincount(token, minlength=4) / len(token), P[0])


def test_emitted_tokens_have_the_target_distribution_exactly():
    """Sums over drafts from q and a grid of random numbers: the first two tokens' joint law is the target's.

    The target's second row must depend on the first token for this to be a joint law, so it is checked per
    first draft, as the engine would see it.
    """
    total = torch.zeros(4)
    for draft in range(4):
        accepted, token = grid(P[:2], Q[:1], [draft], 1, steps=120)
        first = torch.where(accepted > 0, draft, token)
        total += Q[0, draft] * torch.bincount(first, minlength=4) / len(first)
    torch.testing.assert_close(total, P[0], atol=0.005, rtol=0)


def test_greedy_accepts_while_the_draft_is_the_argmax():
    logits = torch.zeros(4, 3, 5)
    logits[:, 0, 1], logits[:, 1, 2], logits[:, 2, 3] = 1.0, 1.0, 1.0
    drafts = torch.tensor([[1, 2], [1, 4], [0, 2], [1, 2]])
    accepted, token = accept_greedy(logits, drafts, torch.tensor([2, 2, 2, 1]))
    assert accepted.tolist() == [2, 1, 0, 1]
    assert token.tolist() == [3, 2, 1, 2]
