"""Drafts against heads run without caches; what the engine emits against the target's own distribution."""

from __future__ import annotations

import itertools

import pytest
import torch

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.nn.attention import Sequences

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"


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
    llm = LLM(model, draft="mtp", max_num_seqs=3, max_num_batched_tokens=24, num_pages=4, max_model_len=160)
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
    llm = LLM(model, draft="mtp", max_num_seqs=2)
    outputs = llm.generate(make_prompts([5, 70]), greedy(41))
    for output in outputs:
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        assert completion.token_ids == [(prompt[-1] + 7 * i) % 512 for i in range(1, 42)]
        # One token comes with the prompt, then ten passes of four.
        assert (completion.draft.rounds, completion.draft.emitted) == (10, 40)
        assert completion.draft.accepted == completion.draft.drafted == [10, 10, 10]
    assert llm.stats()["acceptance_length"] == 4.0


def test_sampled_drafts_of_perfect_heads_are_accepted_too(drafting_model, make_prompts):
    llm = LLM(drafting_model(FLASH, heads=3, strength=0.0), draft="mtp")
    params = SamplingParams(temperature=1.0, max_tokens=41, seed=4, ignore_eos=True)
    (output,) = llm.generate(make_prompts([9]), params)
    # Heads and trunk compute the same distribution up to rounding, so p/q is 1 up to rounding.
    assert output.outputs[0].draft.acceptance_length > 3.8


def joint(model, prompt, params, length, shaped_by_hand):
    """The target's probability of every continuation of `length` tokens, from whole forwards.

    Each token's logits are shaped by the definitions, from the tokens of its own continuation.
    """
    from sateen.engine.sampling.sampler import distribution

    V = model.config.vocab_size
    cells = list(itertools.product(range(V), repeat=length))
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *cell[:-1]] for cell in cells])).logits[:, len(prompt) - 1 :]
        shaped = [
            shaped_by_hand(row, prompt, cell[:t], params)
            for cell, rows in zip(cells, logits, strict=True)
            for t, row in enumerate(rows)
        ]
        probs = distribution(torch.stack(shaped).float(), [params] * (len(cells) * length)).view(
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
        (MIMO, {"repetition_penalty": 1.6, "presence_penalty": 0.4, "frequency_penalty": 0.5}),
        (FLASH, {"temperature": 0.7, "frequency_penalty": -0.6, "logit_bias": {2: -1.5, 0: 1.0}, "top_k": 5}),
    ],
)
def test_sampled_tokens_have_the_target_distribution(name, settings, random_model, shaped_by_hand):
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
    llm = LLM(model, draft="mtp", max_num_seqs=250, max_num_batched_tokens=2000, max_model_len=64, seed=11)
    outputs = llm.generate([prompt] * total, params)
    expected = joint(model, prompt, params, 3, shaped_by_hand)
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
    if params.has_penalties:  # nor would it pass without them
        plain = SamplingParams(
            temperature=params.temperature, top_k=params.top_k, logit_bias=params.logit_bias
        )
        statistic, df = chi_square(counts, joint(model, prompt, plain, 3, shaped_by_hand), total)
        assert statistic > df + 10 * (2 * df) ** 0.5
