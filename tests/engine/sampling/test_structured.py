"""Outputs of a given form: read by `json` and `re`, equal with drafts, distributed as the definition says."""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys

import pytest
import torch

from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import RequestError

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "kind": {"enum": ["cat", "the mat", None, "naïve 猫"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(['the cat sat on the mat, {"name": "the", "age": 1}'] * 50, 280)


@pytest.fixture(scope="module")
def model(random_model):
    """Random weights: nothing but the grammar makes it write JSON. More rows than tokens."""
    return random_model(FLASH, vocab_size=320, heads=2)


def is_person(text):
    value = json.loads(text)
    assert list(value) == ["name", "age", "kind", "tags"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 6
    assert type(value["age"]) is int
    assert 0 <= value["age"] <= 130
    assert value["kind"] in ("cat", "the mat", None, "naïve 猫")
    assert 1 <= len(value["tags"]) <= 3
    assert all(type(tag) is bool for tag in value["tags"])
    return value


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_random_weights_write_what_the_schema_says(draft, model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer, draft=draft, max_num_seqs=8, max_num_batched_tokens=64)
    params = [SamplingParams(max_tokens=200, seed=i, json_schema=PERSON) for i in range(12)]
    params += [SamplingParams(max_tokens=5, seed=99)]  # a neighbour without a grammar
    outputs = llm.generate(["the cat"] * 13, params)
    values = [is_person(output.outputs[0].text) for output in outputs[:12]]
    assert len({json.dumps(value) for value in values}) == 12
    for output in outputs[:12]:
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].token_ids[-1] in tokenizer.stop_ids
    assert outputs[12].outputs[0].finish_reason == "length"
    assert len(llm._intake._grammars._compiled) == 1  # one schema is compiled once


def test_a_schema_may_be_text_and_keeps_its_order(model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer)
    schema = '{"type":"object","properties":{"b":{"const":1},"a":{"const":2}},"required":["b","a"]'
    (output,) = llm.generate(
        ["x"], SamplingParams(seed=1, max_tokens=60, json_schema=schema + ',"additionalProperties":false}')
    )
    assert list(json.loads(output.outputs[0].text).items()) == [("b", 1), ("a", 2)]


@pytest.mark.parametrize("pattern", ["[0-9]{2}-(x|yz)+-猫{2,3}", "(the cat|sat) on [a-f]{5}", "a?"])
def test_expressions_match_the_whole_output(pattern, model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer)
    for output in llm.generate(["the"] * 6, SamplingParams(max_tokens=200, regex=pattern)):
        assert output.outputs[0].finish_reason == "stop"
        assert re.fullmatch(pattern, output.outputs[0].text)


def test_a_cut_output_is_a_beginning(model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer)
    (output,) = llm.generate(["the"], SamplingParams(seed=0, max_tokens=7, regex="[a-z]{50}"))
    assert output.outputs[0].finish_reason == "length"
    assert re.fullmatch("[a-z]{7,}", output.outputs[0].text)


def by_mask(model, prompt, count, fits, tokenizer):
    """Greedy tokens from whole forwards: the best of those after which the text still fits."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([tokens])).logits[0, -1, : tokenizer.vocab_size]
            said = tokens[len(prompt) :]
            for token in logits.argsort(descending=True).tolist():
                if fits(said, token):
                    tokens.append(token)
                    break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("last", ["z", "m"])
def test_greedy_with_drafts_is_greedy_without(last, drafting_model, tokenizer, tokens_of, make_prompts):
    """The model says the alphabet and its heads guess well; behind `last` the expression has its way."""
    letters = [tokenizer.token_id(c) for c in "abcdefghijklmnopqrstuvwxyz"]
    successors = dict(itertools.pairwise(letters))
    model = drafting_model(MIMO, heads=3, noise=0.15, strength=0.02, vocab_size=320, successors=successors)
    allowed = letters[: "abcdefghijklmnopqrstuvwxyz".index(last) + 1]
    prompts = [[letters[i]] for i in (0, 5, 11)] + make_prompts([50, 70], vocab_size=280)
    params = SamplingParams(temperature=0, max_tokens=24, regex=f"[a-{last}]{{23}}")
    runs = []
    for settings in (
        {"draft": "none"},
        {"draft": "mtp"},
        {
            "draft": "mtp",
            "max_num_seqs": 3,
            "max_num_batched_tokens": 16,
            "num_pages": 3,
            "max_model_len": 100,
        },
    ):
        llm = LLM(model, tokenizer=tokenizer, **settings)
        runs.append(tokens_of(llm, prompts, params))
    assert runs[0] == runs[1] == runs[2]
    assert llm.stats()["preemptions"] > 0
    assert 0.1 < llm.stats()["acceptance_by_position"][0] < 0.99
    single = {
        i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) in [chr(c) for c in range(97, 123)]
    }
    assert single >= {*letters}
    for prompt, tokens in zip(prompts, runs[0], strict=True):
        assert len(tokens) <= 24
        assert tokens[-1] in tokenizer.stop_ids

        def fits(said, token):
            text = tokenizer.decode([*said, token])
            return token not in tokenizer.stop_ids and bool(re.fullmatch(f"[a-{last}]{{1,23}}", text))

        expected = by_mask(model, prompt, len(tokens) - 1, fits, tokenizer)
        assert tokens[:-1] == expected
    # As far as the expression allows, the first one says the alphabet.
    assert runs[0][0][:23][: len(allowed) - 1] == allowed[1:24]


def test_sampling_has_the_renormalised_distribution(random_model, tokenizer):
    """Three letters of two: eight outputs, whose probabilities come from whole forwards by hand."""
    model = random_model(FLASH, seed=1, heads=2, vocab_size=280, initializer_range=0.2)
    a, b = tokenizer.token_id("a"), tokenizer.token_id("b")
    assert not any(set(tokenizer.decode([i])) <= {*"ab"} for i in range(3, 280) if i not in (a, b))
    prompt, total, temperature = [5, 77, 130], 1200, 1.4
    expected = {}
    with torch.inference_mode():
        for cell in itertools.product((a, b), repeat=3):
            logits = model(torch.tensor([[*prompt, *cell[:-1]]])).logits[0, len(prompt) - 1 :].double()
            pair = (logits[:, [a, b]] / temperature).softmax(-1)
            expected[cell] = float(pair[range(3), [(a, b).index(t) for t in cell]].prod())
    assert sum(expected.values()) == pytest.approx(1)
    llm = LLM(model, tokenizer=tokenizer, max_num_seqs=200, max_num_batched_tokens=800, max_model_len=64)
    params = SamplingParams(max_tokens=9, temperature=temperature, regex="[ab]{3}")
    counts = dict.fromkeys(expected, 0)
    for output in llm.generate([prompt] * total, params):
        counts[tuple(output.outputs[0].token_ids[:-1])] += 1
    statistic = sum((counts[c] - total * p) ** 2 / (total * p) for c, p in expected.items())
    assert min(expected.values()) * total > 5
    assert statistic < 7 + 4 * 14**0.5
    even = sum((counts[c] - total / 8) ** 2 / (total / 8) for c in expected)
    assert even > 7 + 40 * 14**0.5
    assert 0.2 < llm.stats()["acceptance_by_position"][0] < 0.99


def test_logprobs_and_penalties_go_with_a_grammar(model, tokenizer):
    settings = {"repetition_penalty": 1.5, "logit_bias": {tokenizer.token_id("c"): -100}, "seed": 5}
    params = SamplingParams(
        max_tokens=20, regex="[a-d]{6}", logprobs=5, logprobs_mode="processed", **settings
    )
    (output,) = LLM(model, tokenizer=tokenizer).generate(["the"], params)
    completion = output.outputs[0]
    assert re.fullmatch("[abd]{6}", completion.text)
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        total = sum(2.718281828459045**value.logprob for value in entry.values())
        assert total == pytest.approx(1, abs=1e-4)  # at most four letters and two ends are left
        assert entry[token].logprob > -100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"json_schema": {"type": "objec"}}, "json_schema is not accepted: Invalid type: objec"),
        (
            {"json_schema": {"type": "array", "uniqueItems": True}},
            'json_schema is not accepted: Unimplemented keys: ["uniqueItems"]',
        ),
        (
            {"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}},
            "json_schema is not accepted: Unsatisfiable schema: minimum (5) is greater than maximum (3)",
        ),
        ({"regex": "(ab"}, "regex is not accepted: .* unclosed group"),
        ({"regex": "a(?=b)"}, "regex is not accepted: .* look-ahead and look-behind, is not supported"),
        ({"regex": "\ud800"}, "regex is not accepted: .*surrogates not allowed"),
    ],
)
def test_what_cannot_be_a_grammar_is_refused(settings, message, model, tokenizer):
    llm = LLM(model, tokenizer=tokenizer)
    with pytest.raises(RequestError) as error:
        llm.generate(["a", "b"], SamplingParams(**settings))
    assert re.match(
        message.replace("(5)", r"\(5\)").replace("(3)", r"\(3\)").replace('["', r'\["'), str(error.value)
    )
    assert "\n" not in str(error.value)
    assert not llm.has_work


def test_what_is_missing_is_named(model, tokenizer, flash, monkeypatch):
    params = SamplingParams(regex="a")
    with pytest.raises(RequestError, match="regex needs a tokenizer and this model has none"):
        LLM(flash).generate([[1]], params)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"regex needs llguidance: pip install 'sateen\[structured\]'"):
        LLM(model, tokenizer=tokenizer).generate(["a"], params)


def test_a_grammar_beyond_its_limits_ends_its_request_alone(model, tokenizer, monkeypatch, caplog):
    import llguidance

    tight = functools.partial(llguidance.LLParserLimits, step_lexer_fuel=10)
    monkeypatch.setattr(llguidance, "LLParserLimits", tight)
    llm = LLM(model, tokenizer=tokenizer)
    beyond = SamplingParams(max_tokens=9, regex="[xy]{3}(a|b)*c{3,400}[a-z]{0,3000}")
    ended, other = (
        output.outputs[0] for output in llm.generate(["a", "b"], [beyond, SamplingParams(max_tokens=9)])
    )
    assert re.match("[xy]{1,3}$", ended.text)
    reason = "lexer error: too many expressions constructed"
    assert (ended.finish_reason, ended.stop_reason) == ("abort", reason)
    assert other.finish_reason == "length"
    assert f"a grammar cannot go on, its request ends: {reason}" in caplog.text
    with pytest.raises(RequestError, match=f"regex is not accepted: {reason}"):
        llm.generate(["a"], SamplingParams(regex="(a|b)*c{3,400}[a-z]{0,3000}"))
