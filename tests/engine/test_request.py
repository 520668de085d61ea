"""The sentences users read when they ask for something odd, and the draft counts worked by hand."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from sateen.engine.drafts.stats import DraftStats
from sateen.engine.request import CompletionOutput, Logprob, SamplingParams
from sateen.errors import RequestError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -0.5}, "temperature is -0.5; accepted: a number from 0 on"),
        (
            {"temperature": float("nan")},
            "temperature is nan; accepted: a number from 0 on",
        ),
        ({"temperature": "hot"}, "temperature is 'hot'; accepted: a number from 0 on"),
        ({"top_p": 0}, "top_p is 0; accepted: a number above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; accepted: a number above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p is -0.1; accepted: a number from 0 to 1"),
        (
            {"top_k": -2},
            "top_k is -2; accepted: a whole number from 1 on, or 0 for all tokens",
        ),
        (
            {"top_k": 1.5},
            "top_k is 1.5; accepted: a whole number from 1 on, or 0 for all tokens",
        ),
        ({"max_tokens": 0}, "max_tokens is 0; accepted: a whole number from 1 on"),
        (
            {"max_tokens": True},
            "max_tokens is True; accepted: a whole number from 1 on",
        ),
        ({"seed": -1}, "seed is -1; accepted: a whole number from 0 to 2**63 - 1"),
        ({"logprobs": -1}, "logprobs is -1; accepted: a whole number from 0 on"),
        ({"n": 0}, "n is 0; accepted: a whole number from 1 to 1024"),
        ({"n": 10**9}, "n is 1000000000; accepted: a whole number from 1 to 1024"),
        ({"temperature": 10**400}, f"temperature is 1{'0' * 79}; accepted: a number from 0 on"),
        ({"temperature": False}, "temperature is False; accepted: a number from 0 on"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; accepted: a number from 0.01 to 100"),
        (
            {"repetition_penalty": float("inf")},
            "repetition_penalty is inf; accepted: a number from 0.01 to 100",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; accepted: a number from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'; accepted: a number from -2 to 2"),
        ({"logit_bias": [1]}, "logit_bias is [1]; accepted: a mapping from token ids to numbers"),
        ({"logit_bias": {"1": 2}}, "a token id of logit_bias is '1'; accepted: whole numbers from 0 on"),
        ({"logit_bias": {True: 2}}, "a token id of logit_bias is True; accepted: whole numbers from 0 on"),
        (
            {"logit_bias": {7: float("nan")}},
            "logit_bias of token 7 is nan; accepted: a number from -100 to 100",
        ),
        ({"logit_bias": {7: 101}}, "logit_bias of token 7 is 101; accepted: a number from -100 to 100"),
        ({"min_tokens": 17}, "min_tokens is 17; accepted: a whole number from 0 to max_tokens, 16"),
        ({"min_tokens": -1}, "min_tokens is -1; accepted: a whole number from 0 to max_tokens, 16"),
        ({"prompt_logprobs": True}, "prompt_logprobs is True; accepted: a whole number from 0 on"),
        (
            {"logprobs_mode": "raws"},
            "unknown logprobs_mode 'raws'; did you mean raw? (known: processed, raw)",
        ),
        ({"ignore_eos": "no"}, "ignore_eos is 'no'; accepted: True or False"),
        ({"skip_special_tokens": 1}, "skip_special_tokens is 1; accepted: True or False"),
        ({"stop": 5}, "stop is 5; accepted: strings with at least one character"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; accepted: whole numbers from 0 on"),
        ({"regex": 5}, "regex is 5; accepted: a regular expression as text"),
        (
            {"json_schema": '{"a":'},
            "json_schema is not JSON: Expecting value: line 1 column 6 (char 5); "
            + "give a mapping or its JSON text",
        ),
        (
            {"json_schema": {"a": {1, 2}}},
            "json_schema is not JSON: Object of type set is not JSON serializable; "
            + "give a mapping or its JSON text",
        ),
        ({"json_schema": "[1]"}, 'json_schema is [1]; accepted: an object, such as {"type": "object"}'),
        (
            {"json_schema": {}, "regex": "a"},
            "json_schema and regex both set the form of the output; give one",
        ),
        (
            {"regex": "a", "ignore_eos": True},
            "regex decides where the output ends, so ignore_eos cannot; leave it out",
        ),
        (
            {"json_schema": {}, "min_tokens": 2},
            "json_schema decides where the output ends, so min_tokens cannot; leave it out",
        ),
        (
            {"stop": ["a", ""]},
            "stop is ['a', '']; accepted: strings with at least one character",
        ),
        (
            {"stop": "a", "detokenize": False},
            "stop strings need text; set detokenize=True or use stop_token_ids",
        ),
        (
            {"stop_token_ids": [3, -1]},
            "stop_token_ids is -1; accepted: whole numbers from 0 on",
        ),
    ],
)
def test_sampling_params_are_refused_with_one_sentence(given, message):
    with pytest.raises(RequestError) as error:
        SamplingParams(**given)
    assert str(error.value) == message


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["ab", "c"]).stop_strings == ("ab", "c")


def test_settings_survive_a_copy_through_a_dictionary():
    params = SamplingParams(
        stop="a", logit_bias={3: 1}, json_schema={"b": 1, "a": [2]}, stop_token_ids=(4,), presence_penalty=1
    )
    assert params.json_schema == '{"b":1,"a":[2]}'
    assert SamplingParams(**asdict(params)) == params


def test_tiny_temperatures_are_greedy():
    assert SamplingParams(temperature=0).is_greedy
    assert SamplingParams(temperature=1e-6).is_greedy
    assert not SamplingParams(temperature=1e-4).is_greedy


def test_draft_counts():
    # Three passes: 3 drafts and all kept, 3 drafts and one kept, 1 draft and none kept.
    stats = DraftStats()
    stats.record(3, 3, 4)
    stats.record(3, 1, 2)
    stats.record(1, 0, 1)
    assert (stats.drafted, stats.accepted) == ([3, 2, 2], [2, 1, 1])
    assert stats.acceptance_length == 7 / 3
    assert stats.acceptance_by_position == [2 / 3, 1 / 2, 1 / 2]
    total = DraftStats()
    total.record(1, 1, 2)
    total.add(stats)
    assert (total.rounds, total.emitted) == (4, 9)
    assert (total.drafted, total.accepted) == ([4, 2, 2], [3, 1, 1])
    assert DraftStats().acceptance_length == 1.0


def test_token_logprobs_follow_the_tokens():
    rows = [{5: Logprob(-1.0, 2), 6: Logprob(-0.5, 1)}, {7: Logprob(-0.25, 1)}]
    assert CompletionOutput(0, "", [5, 7], rows, "length").token_logprobs == [
        -1.0,
        -0.25,
    ]
    assert CompletionOutput(0, "", [5, 7], None, "length").token_logprobs is None
