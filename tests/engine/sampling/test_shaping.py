"""Penalties and biases against their formulas in float64, alone and at every draft; decoding with them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.engine.sampling.shaping import Shaper, TokenCounts, shape
from sateen.engine.state import Request
from sateen.errors import RequestError

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"
ALL = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "logit_bias": {3: 2.0, 5: -100.0, 8: 0.5},
}
SETTINGS = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.8},
    {"presence_penalty": -1.0},
    {"frequency_penalty": 0.7},
    {"logit_bias": {0: 3.5, 11: -2.0}},
    {"presence_penalty": -2.0, "frequency_penalty": 1.5},  # a token comes twice, then hardly again
    ALL,
]


def request(prompt, output=(), **settings):
    params = SamplingParams(temperature=0, **settings)
    shaper = Shaper.of(params, prompt=prompt, stop_ids=[])
    return Request(0, params, [*prompt, *output], len(prompt), 99, shaper=shaper)


def test_every_row_equals_the_formulas(shaped_by_hand):
    """Requests with and without drafts and settings in one batch; their tokens repeat."""
    generator = torch.Generator().manual_seed(0)
    requests = [request([1, 2, 2, 9], [3, 3, 1, 7], **settings) for settings in SETTINGS]
    requests.insert(2, request([4, 5], [6]))
    drafts = [[], [3, 11], [1, 1], [7, 7, 0], [2], [11, 0], [9], [12, 12, 3]]
    logits = torch.randn(sum(len(d) + 1 for d in drafts), 13, generator=generator) * 3
    before = logits.clone()
    for _ in range(2):  # reading changes no counts
        shaped = shape(logits, requests, drafts)
        row = 0
        for one, ahead in zip(requests, drafts, strict=True):
            for j in range(len(ahead) + 1):
                prompt, output = one.tokens[: one.num_prompt], one.tokens[one.num_prompt :] + ahead[:j]
                expected = shaped_by_hand(before[row], prompt, output, one.params)
                torch.testing.assert_close(shaped[row].double(), expected, rtol=1e-6, atol=2e-6)
                row += 1
    assert torch.equal(logits, before)
    # The counts follow the output, wherever it grows.
    for one in requests:
        one.tokens += [3, 0, 12]
    shaped = shape(logits, requests, drafts)
    one = requests[-1]
    expected = shaped_by_hand(before[-4], [1, 2, 2, 9], [3, 3, 1, 7, 3, 0, 12], one.params)
    torch.testing.assert_close(shaped[-4].double(), expected, rtol=1e-6, atol=2e-6)


def test_the_repetition_penalty_is_that_of_transformers():
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    prompt, output = [4, 9, 9, 30], [8, 8, 9, 0]
    shaped = shape(logits, [request(prompt, output, repetition_penalty=1.7)], [[]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    torch.testing.assert_close(shaped, expected)


def test_nothing_asked_is_nothing_done():
    logits = torch.randn(3, 9, dtype=torch.bfloat16)
    requests = [request([1], [2]), request([3], [3])]
    assert all(one.shaper is None for one in requests)
    assert shape(logits, requests, [[], [4]]) is logits
    assert request([1], repetition_penalty=1.0, presence_penalty=0, logit_bias={}).shaper is None


def test_half_precision_logits_are_shaped_in_float32(shaped_by_hand):
    logits = torch.randn(1, 13, generator=torch.Generator().manual_seed(2)).bfloat16()
    shaped = shape(logits, [request([1, 2], [3, 3], **ALL)], [[]])
    assert shaped.dtype == torch.float32
    expected = shaped_by_hand(logits[0].float(), [1, 2], [3, 3], SamplingParams(**ALL))
    torch.testing.assert_close(shaped[0].double(), expected, rtol=1e-6, atol=2e-6)


def test_removed_tokens_stay_removed():
    logits = torch.full((1, 4), -torch.inf)
    logits[0, 1] = 1.0
    shaped = shape(logits, [request([0, 2], [3], **(ALL | {"logit_bias": {0: 100.0}}))], [[]])
    assert shaped[0].isinf().tolist() == [True, False, True, True]


def test_counts_through_random_pushes_and_pops():
    rng = random.Random(3)
    prompt = [rng.randrange(50) for _ in range(30)]
    counts, stack = TokenCounts(prompt), []
    for _ in range(3000):
        if stack and rng.random() < 0.45:
            counts.pop(stack.pop())
        else:
            stack.append(rng.randrange(90))
            counts.push(stack[-1])
        ids, numbers = counts.read()
        expected = Counter(stack)
        expected.update(dict.fromkeys(prompt, 0))
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected
    assert len(stack) > 100


def decode_by_hand(model, prompt, count, params, shaped_by_hand):
    """Greedy tokens from whole forwards and the formulas, and the least gap between the best two."""
    tokens, gap = list(prompt), float("inf")
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            best = shaped_by_hand(logits, prompt, tokens[len(prompt) :], params).topk(2)
            gap = min(gap, float(best.values[0] - best.values[1]))
            tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], gap


@pytest.mark.parametrize("name", [FLASH, MIMO])
def test_greedy_decoding_with_penalties(
    name, drafting_model, make_prompts, tokens_of, greedy, shaped_by_hand
):
    """With and without drafts, in batches of different settings, through chunks and preemption."""
    model = drafting_model(name, heads=3, noise=0.5, strength=0.3, vocab_size=16)
    prompts = make_prompts([15, 64, 3, 40, 1, 20, 2], vocab_size=16)
    params = [greedy(24, **settings) for settings in SETTINGS]
    by_hand = [
        decode_by_hand(model, prompt, 24, one, shaped_by_hand)
        for prompt, one in zip(prompts, params, strict=True)
    ]
    assert min(gap for _, gap in by_hand) > 1e-5  # no choice hangs on rounding
    expected = [tokens for tokens, _ in by_hand]
    for draft in ("none", "mtp"):
        for settings in (
            {"max_num_seqs": 7},
            {"max_num_seqs": 3, "max_num_batched_tokens": 16, "num_pages": 3, "max_model_len": 100},
        ):
            llm = LLM(model, draft=draft, **settings)
            assert tokens_of(llm, prompts, params) == expected
            assert "num_pages" not in settings or llm.stats()["preemptions"] > 0
            if draft == "mtp":
                assert 0.05 < llm.stats()["acceptance_by_position"][0] < 0.99
    assert tokens_of(LLM(model, draft="none"), prompts, greedy(24)) != expected


def test_a_bias_forces_and_forbids(flash, make_prompts, tokens_of, greedy):
    prompts = make_prompts([7])
    (plain,) = tokens_of(LLM(flash), prompts, greedy(12))
    assert tokens_of(LLM(flash), prompts, greedy(12, logit_bias={5: 100})) == [[5] * 12]
    (without,) = tokens_of(LLM(flash), prompts, greedy(12, logit_bias=dict.fromkeys(plain, -100)))
    assert not {*without} & {*plain}


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_min_tokens(draft, drafting_model, greedy, tokens_of):
    """The model counts by sevens; 35 would end it, but not among the first tokens."""
    llm = LLM(drafting_model(FLASH, heads=3, strength=0.0), draft=draft)
    ends = {"stop_token_ids": (35, 70)}
    assert tokens_of(llm, [[0]], greedy(12, **ends)) == [[7, 14, 21, 28, 35]]
    assert tokens_of(llm, [[0]], greedy(12, **ends, min_tokens=4)) == [[7, 14, 21, 28, 35]]
    (later,) = tokens_of(llm, [[0]], greedy(12, **ends, min_tokens=5))
    assert later[:4] == [7, 14, 21, 28]
    assert 35 not in later[:5]
    (output,) = llm.generate([[28]], greedy(3, **ends, min_tokens=3))
    assert output.outputs[0].finish_reason == "length"
    assert not {35, 70} & {*output.outputs[0].token_ids}
    with pytest.raises(RequestError, match="min_tokens needs a token that is not among stop_token_ids"):
        llm.generate([[1]], greedy(3, stop_token_ids=range(512), min_tokens=1))


def test_an_end_token_that_the_model_has_no_row_for_ends_nothing(random_model):
    llm = LLM(random_model(FLASH, eos_token_id=[3, 512, 100_000]))
    (output,) = llm.generate([[1, 2]], SamplingParams(temperature=0, max_tokens=5, min_tokens=5))
    assert len(output.outputs[0].token_ids) == 5
    assert llm.add([1], SamplingParams()).stop_ids == {3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {512: 1}}, "logit_bias has token id 512, out of the vocabulary; accepted: 0 to 511"),
        (
            {"stop_token_ids": [7, 9999]},
            "stop_token_ids has token id 9999, out of the vocabulary; accepted: 0 to 511",
        ),
    ],
)
def test_unknown_tokens_are_refused(settings, message, flash):
    llm = LLM(flash)
    with pytest.raises(RequestError) as error:
        llm.generate([[1], [2]], SamplingParams(**settings))
    assert str(error.value) == message
    assert not llm.has_work
