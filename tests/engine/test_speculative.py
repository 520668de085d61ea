"""Drafts against heads run without caches; verification against the target's own distribution."""

from __future__ import annotations

import itertools

import pytest
import torch

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.engine.speculative import accept, accept_greedy
from sateen.nn.attention import Sequences

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"
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


def drafts_without_caches(model, tokens):
    """The heads over the whole sequence at once, as the module's docstring defines them."""
    n = len(tokens) - 1
    seq = Sequences.of_lengths([n])
    hidden = model.trunk(torch.tensor(tokens[:n]), seq)
    known = list(tokens)
    for k in range(model.num_mtp_heads):
        hidden, out = model.mtp(k, hidden, torch.tensor(known[k + 1 : k + 1 + n]), Sequences.of_lengths([n]))
        known.append(int(model.logits(out[-1:]).argmax()))
    return known[n + 1 :]


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("name", [FLASH, MIMO])
@torch.inference_mode()
def test_drafts_equal_heads_without_caches(name, heads, drafting_model, make_prompts, greedy):
    """At every step, through chunked prompts, rejections, acceptances and a preemption."""
    model = drafting_model(name, heads=heads, noise=0.15, strength=0.05)
    llm = LLM(model, max_num_seqs=3, max_num_batched_tokens=24, num_pages=4, max_model_len=160)
    requests = [llm.add(prompt, greedy(60)) for prompt in make_prompts([1, 2, 47, 90, 64])]
    compared = 0
    while llm.has_work:
        for request in llm.step():
            if request.drafts and request.finish_reason is None:
                assert request.drafts == drafts_without_caches(model, request.tokens)
                compared += 1
    stats = llm.stats()
    assert compared > 60
    assert stats["preemptions"] > 0
    assert 0.2 < stats["acceptance_by_position"][0] < 0.99
    assert all(len(request.tokens) == request.num_prompt + 60 for request in requests)


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("name", [FLASH, MIMO])
def test_greedy_tokens_are_those_of_plain_decoding(
    name,
    heads,
    random_model,
    drafting_model,
    make_prompts,
    tokens_of,
    greedy,
    greedy_by_hand,
):
    prompts = make_prompts([1, 15, 64, 3, 100, 31])
    for model in (
        random_model(name, heads=heads),
        drafting_model(name, heads=heads, noise=0.1, strength=0.05),
    ):
        plain = tokens_of(LLM(model, draft="none"), prompts, greedy(24))
        assert plain[1] == greedy_by_hand(model, prompts[1], 24)
        for num_seqs, budget in ((3, 16), (6, 1024)):
            llm = LLM(model, draft="mtp", max_num_seqs=num_seqs, max_num_batched_tokens=budget)
            assert tokens_of(llm, prompts, greedy(24)) == plain


@pytest.mark.parametrize("name", [FLASH, MIMO])
def test_perfect_heads_are_always_accepted(name, drafting_model, make_prompts, greedy):
    model = drafting_model(name, heads=3, strength=0.0)
    llm = LLM(model, max_num_seqs=2)
    outputs = llm.generate(make_prompts([5, 70]), greedy(41))
    for output in outputs:
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        assert completion.token_ids == [(prompt[-1] + 7 * i) % 512 for i in range(1, 42)]
        # One token comes with the prompt, then ten passes of four.
        assert (completion.draft.rounds, completion.draft.emitted) == (10, 40)
        assert completion.draft.accepted == completion.draft.drafted == [10, 10, 10]
    assert llm.stats()["acceptance_length"] == 4.0


def test_sampled_drafts_of_perfect_heads_are_accepted_too(drafting_model, make_prompts):
    llm = LLM(drafting_model(FLASH, heads=3, strength=0.0))
    params = SamplingParams(temperature=1.0, max_tokens=41, seed=4, ignore_eos=True)
    (output,) = llm.generate(make_prompts([9]), params)
    # Heads and trunk compute the same distribution up to rounding, so p/q is 1 up to rounding.
    assert output.outputs[0].draft.acceptance_length > 3.8


def joint(model, prompt, params, length):
    """The target's probability of every continuation of `length` tokens, from whole forwards."""
    from sateen.engine.sampler import distribution

    V = model.config.vocab_size
    cells = list(itertools.product(range(V), repeat=length))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *cell[:-1]] for cell in cells])).logits[:, len(prompt) - 1 :]
        probs = distribution(logits.flatten(0, 1), [params] * (len(cells) * length)).view(
            len(cells), length, V
        )
        picked = probs.gather(-1, torch.tensor(cells)[:, :, None]).squeeze(-1).double().prod(-1)
    return dict(zip(cells, picked.tolist(), strict=True))


def chi_square(counts, expected, total):
    """The statistic and its degrees of freedom; cells that expect fewer than five are put together."""
    rest_seen = rest_expected = statistic = 0.0
    df = -1
    for cell, p in expected.items():
        if total * p < 5:
            rest_seen, rest_expected = (
                rest_seen + counts.get(cell, 0),
                rest_expected + total * p,
            )
        else:
            statistic += (counts.get(cell, 0) - total * p) ** 2 / (total * p)
            df += 1
    if rest_expected > 0.5:
        statistic, df = (
            statistic + (rest_seen - rest_expected) ** 2 / rest_expected,
            df + 1,
        )
    return statistic, df


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (FLASH, {"temperature": 0.8}),
        (MIMO, {"temperature": 1.3, "top_p": 0.9}),
        (FLASH, {"top_k": 4, "min_p": 0.05}),
    ],
)
def test_sampled_tokens_have_the_target_distribution(name, settings, random_model):
    """4000 continuations of three tokens over a vocabulary of six; the heads' distribution is far away."""
    small = {
        "vocab_size": 6,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 2,
        "initializer_range": 0.3,
    }
    if name == FLASH:
        small |= {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 0]}
    model = random_model(name, seed=1, **small)
    params = SamplingParams(max_tokens=3, ignore_eos=True, **settings)
    prompt, total = [1, 4, 2], 4000
    llm = LLM(model, max_num_seqs=250, max_num_batched_tokens=2000, max_model_len=64, seed=11)
    outputs = llm.generate([prompt] * total, params)
    expected = joint(model, prompt, params, 3)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-4)
    counts: dict[tuple[int, ...], int] = {}
    for output in outputs:
        cell = tuple(output.outputs[0].token_ids)
        counts[cell] = counts.get(cell, 0) + 1
    assert all(expected[cell] > 0 for cell in counts)
    statistic, df = chi_square(counts, expected, total)
    assert df > 10
    assert statistic < df + 4 * (2 * df) ** 0.5  # four standard deviations
    # Both outcomes of the verification took place, and the test can tell distributions this far apart.
    by_position = llm.stats()["acceptance_by_position"]
    assert 0.2 < by_position[0] < 0.95
    uniform = dict.fromkeys(expected, 1 / len(expected))
    statistic, df = chi_square(counts, uniform, total)
    assert statistic > df + 40 * (2 * df) ** 0.5
