"""Several completions of a prompt, their seeds, and where a text ends when drafts run past its end."""

from __future__ import annotations

import itertools

import pytest

from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams

FLASH = "mimo-v2-flash-tiny"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["assistant user system "] * 20, 262)


def along(path, size):
    """A successor for every token: the next one on the path, which no other token shares."""
    chain = dict(itertools.pairwise(path))
    free = sorted({*range(size)} - {*chain.values()})
    return chain | dict(zip((token for token in range(size) if token not in chain), free, strict=True))


@pytest.fixture(scope="module")
def speller(drafting_model, tokenizer):
    """Says the alphabet from any letter on, then `猫🐈`, byte by byte; its heads are always right."""
    ids = [tokenizer.token_id(c) for c in ALPHABET] + tokenizer.encode("猫🐈")
    assert len(ids) == 26 + 3 + 4
    assert len(set(ids)) == len(ids)
    model = drafting_model(FLASH, strength=0.0, vocab_size=264, successors=along(ids, 264))

    def make(draft):
        return LLM(model, tokenizer=tokenizer, draft=draft)

    return make


def completion(llm, prompt, **settings):
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=30, logprobs=0, **settings))
    found = output.outputs[0]
    assert len(found.token_ids) == len(found.logprobs)
    return found.text, len(found.token_ids), found.finish_reason, found.stop_reason


@pytest.mark.parametrize("draft", ["none", "mtp"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"stop": ["fgh"]}, ("bcde", 7, "stop", "fgh")),
        ({"stop": ["fgh"], "include_stop_str_in_output": True}, ("bcdefgh", 7, "stop", "fgh")),
        ({"stop": ["g", "fgh"]}, ("bcdef", 6, "stop", "g")),
        ({"stop": ["cd", "st"], "min_tokens": 4}, ("bcdefghijklmnopqr", 19, "stop", "st")),
        ({"stop": ["cd", "st"], "min_tokens": 2}, ("b", 3, "stop", "cd")),
        ({"stop": ["猫"]}, ("bcdefghijklmnopqrstuvwxyz", 28, "stop", "猫")),
        ({"stop": ["z猫"], "include_stop_str_in_output": True}, (ALPHABET[1:] + "猫", 28, "stop", "z猫")),
        ({}, (ALPHABET[1:] + "猫\ufffd", 30, "length", None)),
    ],
)
def test_stop_strings_that_drafts_overshoot(draft, settings, expected, speller):
    """Passes of four tokens end in the middle; text, tokens and log-probabilities end with the stop."""
    llm = speller(draft)
    assert completion(llm, "a", **settings) == expected
    stream = llm.generate_stream(["a"], SamplingParams(temperature=0, max_tokens=30, **settings))
    assert "".join(news.text for news in stream) == expected[0]
    assert draft == "none" or llm.stats()["acceptance_length"] > 1.9


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_stop_tokens_that_drafts_overshoot(draft, speller, tokenizer):
    llm = speller(draft)
    k = tokenizer.token_id("k")
    assert completion(llm, "a", stop_token_ids=[k]) == ("bcdefghij", 10, "stop", k)
    assert completion(llm, "a", stop_token_ids=[k], include_stop_str_in_output=True) == (
        "bcdefghijk", 10, "stop", k,
    )  # fmt: skip
    assert completion(llm, "a", stop_token_ids=[k], stop=["ij"]) == ("bcdefgh", 9, "stop", "ij")


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_the_models_end_token_and_special_tokens(draft, drafting_model, tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    path = [*tokenizer.encode("abc"), tokenizer.token_id("<|im_start|>"), tokenizer.token_id("d"), end]
    model = drafting_model(FLASH, strength=0.0, vocab_size=264, successors=along(path, 264))
    llm = LLM(model, tokenizer=tokenizer, draft=draft)
    assert completion(llm, "a") == ("bcd", 5, "stop", None)
    assert completion(llm, "a", skip_special_tokens=False) == ("bc<|im_start|>d", 5, "stop", None)
    assert completion(llm, "a", skip_special_tokens=False, include_stop_str_in_output=True) == (
        "bc<|im_start|>d<|im_end|>", 5, "stop", None,
    )  # fmt: skip


def sampled(llm, prompts, **settings):
    params = SamplingParams(max_tokens=8, ignore_eos=True, **settings)
    return [[c.token_ids for c in output.outputs] for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_several_completions(draft, flash, make_prompts):
    prompts = make_prompts([20, 70])
    llm = LLM(flash, draft=draft, max_num_seqs=3)
    params = SamplingParams(max_tokens=8, ignore_eos=True, n=5, seed=7, prompt_logprobs=0)
    outputs = llm.generate(prompts, params)
    assert not llm.has_work
    for prompt, output in zip(prompts, outputs, strict=True):
        assert [c.index for c in output.outputs] == [0, 1, 2, 3, 4]
        assert output.finished
        assert output.prompt_token_ids == prompt
        assert len(output.prompt_logprobs) == len(prompt)
        assert len({tuple(c.token_ids) for c in output.outputs}) == 5
    assert llm.stats()["prompt_tokens"] == 90
    # The same again, whatever else is in the batch; the first is the one of a single completion.
    five = sampled(LLM(flash, draft=draft, max_num_seqs=8), prompts[:1], seed=7, n=5)[0]
    assert five == [c.token_ids for c in outputs[0].outputs]
    assert sampled(LLM(flash, draft=draft), prompts[:1], seed=7) == [five[:1]]
    assert sampled(LLM(flash, draft=draft), prompts[:1], seed=7, n=3) == [five[:3]]
    assert sampled(LLM(flash, draft=draft), prompts[:1], seed=8, n=3) != [five[:3]]
    # Neighbouring seeds share no completion.
    assert not {*map(tuple, sampled(LLM(flash), prompts[:1], seed=8, n=5)[0])} & {*map(tuple, five)}


def test_unseeded_completions_differ_and_greedy_ones_do_not(flash):
    llm = LLM(flash)
    (several,) = sampled(llm, [[1, 2, 3]], n=4)
    assert len({*map(tuple, several)}) == 4
    (same,) = sampled(llm, [[1, 2, 3]], n=3, temperature=0)
    assert same[0] == same[1] == same[2]


def test_streams_of_several_completions_add_up(speller):
    llm = speller("mtp")
    params = SamplingParams(max_tokens=9, n=3, seed=2, temperature=3.0, ignore_eos=True)
    outputs = llm.generate(["a", "k"], params)
    texts = [[""] * 3 for _ in outputs]
    ends = 0
    for news in llm.generate_stream(["a", "k"], params):
        texts[news.index][news.completion] += news.text
        ends += news.finished
    assert texts == [[c.text for c in output.outputs] for output in outputs]
    assert ends == 6


def test_a_request_shows_all_its_completions_at_any_time(flash):
    llm = LLM(flash, max_num_seqs=2)
    request = llm.add([1, 2, 3], SamplingParams(n=3, max_tokens=4, ignore_eos=True))
    assert [r.index for r in request.siblings] == [0, 1, 2]
    llm.step()
    early = request.output()
    assert not early.finished
    assert [bool(c.token_ids) for c in early.outputs] == [True, True, False]
    while llm.has_work:
        llm.step()
    late = request.siblings[2].output()
    assert late.finished
    assert late.request_id == request.request_id
    assert [len(c.token_ids) for c in late.outputs] == [4, 4, 4]
