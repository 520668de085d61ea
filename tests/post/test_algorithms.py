"""GRPO and MOPD against hand-worked values, autograd through the printed formulas, and exact enumeration."""

import math

import pytest
import torch

from sateen.data.packing import IGNORE
from sateen.post.algorithms import GRPO, MOPD, group_advantages
from sateen.post.types import Rollout, pack_rollouts
from sateen.train.objective import signal_losses


def rollout(completion, logprobs, *, prompt=(1, 2), teacher=None, **rest) -> Rollout:
    return Rollout(list(prompt), list(completion), list(logprobs), teacher_logprobs=teacher, **rest)


def gradient(algorithm, batches, logprobs) -> list[torch.Tensor]:
    """d loss / d logprob per batch, as the one training step computes it."""
    algorithm.begin_step(batches)
    out = []
    for batch, logprobs_T in zip(batches, logprobs, strict=True):
        leaf = logprobs_T.clone().requires_grad_()
        loss = sum(signal_losses(algorithm.signals(batch, leaf.detach()), leaf).values())
        out.append(torch.autograd.grad(loss, leaf)[0])
    return out


def on_rows(batch, values) -> torch.Tensor:
    """Completion values at the rows of their labels."""
    row = torch.zeros(batch.num_tokens)
    row[batch.labels != IGNORE] = torch.tensor([x for v in values for x in v])
    return row


def test_packing_puts_loss_on_completion_tokens_only():
    batch = pack_rollouts([rollout([5, 6], [-0.5, -1.0]), rollout([7], [-2.0], prompt=(3,))], [1.0, -1.0])
    assert batch.input_ids.tolist() == [1, 2, 5, 6, 3, 7]
    assert batch.labels.tolist() == [IGNORE, 5, 6, IGNORE, 7, IGNORE]
    assert batch.old_logprobs.tolist() == [0, -0.5, -1.0, 0, -2.0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1]


def test_advantages_by_hand():
    a = group_advantages([0, 0, 1, 1, 1], [1.0, 0.0, 1.0, 1.0, 1.0], eps=0.0 + 1e-12)
    assert a == pytest.approx([1.0, -1.0, 0.0, 0.0, 0.0])
    b = group_advantages([4, 4, 4, 4], [1.0, 0.0, 0.0, 0.0])
    std = math.sqrt(3) / 4
    assert b == pytest.approx([0.75 / (std + 1e-6), *[-0.25 / (std + 1e-6)] * 3])


def test_grpo_gradient_equals_autograd_of_the_clipped_objective():
    torch.manual_seed(0)
    old = [[-1.0, -0.7, -2.0], [-0.3], [-1.5, -0.2]]
    batch = pack_rollouts([rollout(range(10, 10 + len(o)), o) for o in old], [1.3, -0.8, -0.4])
    rows = batch.labels != IGNORE
    for scale in (0.0, 0.1, 0.5):
        new = batch.old_logprobs + scale * torch.randn(batch.num_tokens) * rows
        leaf = new.clone().requires_grad_()
        advantage = torch.tensor([1.3] * 5 + [-0.8] * 3 + [-0.4] * 4)
        ratio = (leaf - batch.old_logprobs).exp()
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        expected = torch.autograd.grad(-(surrogate * rows).sum() / 6, leaf)[0]
        torch.testing.assert_close(gradient(GRPO(), [batch], [new])[0], expected)


def test_grpo_normalises_over_the_step_not_the_micro_batch():
    one = pack_rollouts([rollout([5, 6, 7], [-1.0] * 3)], [1.0])
    two = pack_rollouts([rollout([5], [-1.0])], [1.0])
    a, b = gradient(GRPO(), [one, two], [one.old_logprobs, two.old_logprobs])
    assert a.sum().item() == pytest.approx(-0.75)
    assert b.sum().item() == pytest.approx(-0.25)


def mopd_batch(teacher, old=((-1.0, -0.5), (-0.25,)), advantages=(0.0, 0.0)):
    rollouts = [
        rollout([5, 6], old[0], teacher=list(teacher[0])),
        rollout([7], old[1], teacher=list(teacher[1])),
    ]
    return pack_rollouts(rollouts, advantages)


def test_mopd_equal_teacher_has_no_gradient():
    batch = mopd_batch(((-1.0, -0.5), (-0.25,)))
    (g,) = gradient(MOPD(outcome_weight=0.0), [batch], [batch.old_logprobs])
    assert g.abs().max().item() == 0.0


def test_mopd_normalises_per_response_then_over_responses():
    batch = mopd_batch(((-0.6, -0.6), (-0.5,)))
    (g,) = gradient(MOPD(outcome_weight=0.0), [batch], [batch.old_logprobs])
    expected = on_rows(batch, [(-0.4 / 2 / 2, 0.1 / 2 / 2), (0.25 / 2,)])
    torch.testing.assert_close(g, expected)


def test_mopd_expectation_is_the_gradient_of_the_reverse_kl():
    """All answers of length one over a toy vocabulary, each weighted by its probability."""
    torch.manual_seed(1)
    logits, teacher = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64).log_softmax(0)
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(0)
    kl = (logp.exp() * (logp - teacher)).sum()
    expected = torch.autograd.grad(kl, leaf)[0]
    total = torch.zeros_like(leaf)
    algorithm = MOPD(outcome_weight=0.0)
    for token in range(6):
        leaf = logits.clone().requires_grad_()
        logp = leaf.log_softmax(0)[token]
        batch = pack_rollouts([rollout([token], [logp.item()], teacher=[teacher[token].item()])], [0.0])
        algorithm.begin_step([batch])
        row = torch.zeros(3)
        row[1] = logp.detach()
        weight = algorithm.signals(batch, row).policy_T[1]
        total += torch.autograd.grad(-weight.double() * logp, leaf)[0] * logp.detach().exp()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ratio", "kept"), [(6.0, 0.0), (4.9, 4.9), (0.4, 0.0), (0.6, 0.6), (1.0, 1.0)])
def test_mopd_drops_tokens_outside_the_band_and_leaves_the_others(ratio, kept):
    batch = mopd_batch(((-0.1, -0.1), (-0.1,)))
    new = batch.old_logprobs.clone()
    row = int((batch.labels == 5).nonzero())
    new[row] += math.log(ratio)
    (g,) = gradient(MOPD(outcome_weight=0.0), [batch], [new])
    d = -0.1 - new[row].item()
    assert g[row].item() == pytest.approx(-kept * d / 4, abs=1e-6)
    (plain,) = gradient(MOPD(outcome_weight=0.0), [batch], [batch.old_logprobs])
    others = torch.arange(batch.num_tokens) != row
    assert torch.equal(g[others], plain[others])


def test_mopd_outcome_weight():
    teacher = ((-0.6, -0.6), (-0.5,))
    plain = mopd_batch(teacher)
    (a,) = gradient(MOPD(outcome_weight=0.0), [plain], [plain.old_logprobs])
    (b,) = gradient(MOPD(outcome_weight=0.3), [plain], [plain.old_logprobs])
    assert torch.equal(a, b)
    scored = mopd_batch(teacher, advantages=(2.0, -1.0))
    (c,) = gradient(MOPD(outcome_weight=0.3), [scored], [scored.old_logprobs])
    torch.testing.assert_close(c, a - on_rows(scored, [(0.6 / 4, 0.6 / 4), (-0.3 / 2,)]))


def test_mopd_other_teacher_changes_only_its_rows():
    one, two = mopd_batch(((-0.6, -0.6), (-0.5,))), mopd_batch(((-0.6, -0.6), (-3.0,)))
    (a,) = gradient(MOPD(), [one], [one.old_logprobs])
    (b,) = gradient(MOPD(), [two], [two.old_logprobs])
    changed = (a != b).nonzero().flatten().tolist()
    assert changed == [int((one.labels == 7).nonzero())]


def test_mopd_prompts_never_train():
    batch = mopd_batch(((-0.6, -0.6), (-0.5,)), advantages=(5.0, 5.0))
    (g,) = gradient(MOPD(), [batch], [batch.old_logprobs])
    assert g[batch.labels == IGNORE].abs().max().item() == 0.0


def test_mopd_sign_a_step_raises_what_the_teacher_prefers():
    logits = torch.zeros(4, requires_grad=True)
    logp = logits.log_softmax(0)
    batch = pack_rollouts([rollout([2], [logp[2].item()], teacher=[-0.1])], [0.0])
    algorithm = MOPD()
    algorithm.begin_step([batch])
    row = torch.tensor([0.0, logp[2].item(), 0.0])
    loss = -algorithm.signals(batch, row).policy_T[1] * logp[2]
    (g,) = torch.autograd.grad(loss, logits)
    after = (logits - 0.5 * g).detach().log_softmax(0)
    assert after[2] > logp[2]
