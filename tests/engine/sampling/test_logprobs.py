"""Log-probabilities of completions and prompts against softmaxes in float64 and whole forwards."""

from __future__ import annotations

import math

import pytest
import torch

from sateen.engine.contract import WeightUpdate
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.engine.sampling.logprobs import ranked_logprobs

MIMO = "mimo-7b-tiny"
PROBS = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor([[math.log(p) for p in PROBS]])


def test_ranked_logprobs_with_ranks():
    (row,) = ranked_logprobs(LOGITS + 3.0, [2], 2)
    assert list(row) == [2, 1, 3]
    assert [entry.rank for entry in row.values()] == [3, 1, 2]
    assert [entry.logprob for entry in row.values()] == pytest.approx([math.log(p) for p in (0.2, 0.4, 0.3)])
    (only,) = ranked_logprobs(LOGITS, [0], 0)
    assert list(only) == [0]
    assert only[0].rank == 4


@pytest.mark.parametrize("draft", ["none", "mtp"])
def test_processed_logprobs_are_of_what_was_sampled_from(draft, drafting_model, make_prompts, shaped_by_hand):
    """Raw and processed requests side by side; the truth is worked from whole forwards in float64."""
    model = drafting_model(MIMO, heads=3, noise=0.3, strength=0.2, vocab_size=40)
    prompts = make_prompts([20, 9, 14], vocab_size=40)
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {4: 1.0}}
    settings = [
        {"temperature": 0.7, "top_k": 5, "seed": 3, "logprobs": 7, "logprobs_mode": "processed"},
        {"temperature": 0.7, "top_k": 5, "seed": 3, "logprobs": 2},
        {"temperature": 0.0, "logprobs": 2, "logprobs_mode": "processed"},
    ]
    params = [SamplingParams(max_tokens=20, ignore_eos=True, **penalties, **one) for one in settings]
    llm = LLM(model, draft=draft)
    for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
        completion, one = output.outputs[0], params[output.request_id - 1]
        ids = completion.token_ids
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        for t, row in enumerate(logits):
            x = row.double()
            if one.logprobs_mode == "processed":
                x = shaped_by_hand(row, prompt, ids[:t], one)
            if one.logprobs_mode == "processed" and one.temperature:
                x = x / one.temperature
                x[x < x.topk(5).values[-1]] = -math.inf
            expected = x - x.logsumexp(-1)
            entry = completion.logprobs[t]
            assert next(iter(entry)) == ids[t]
            assert len(entry) in (one.logprobs, one.logprobs + 1)
            assert math.isfinite(entry[ids[t]].logprob)
            for token, value in entry.items():
                assert value.logprob == pytest.approx(float(expected[token]), abs=1e-4)
            if one.logprobs == 7:  # more than the cut leaves
                assert sum(value.logprob == -math.inf for value in entry.values()) == 2
    assert draft == "none" or 0 < llm.stats()["acceptance_by_position"][0] < 1


def prompt_logprobs_by_hand(model, prompt):
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(("draft", "num_rows"), [("none", 1), ("mtp", 7)])
def test_prompt_logprobs(draft, num_rows, flash, make_prompts, monkeypatch):
    """Through chunks, slices of few rows, preemption while prompts are read, and prompts seen before."""
    monkeypatch.setattr("sateen.engine.sampling.logprobs.SLICE_NUMBERS", 512 * num_rows)
    prompts = make_prompts([70, 1, 2, 90, 60, 65])
    prompts += [prompts[0], [*prompts[4], 5, 6]]
    params = [
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=k % 3) for k in range(8)
    ]
    llm = LLM(flash, draft=draft, max_num_seqs=4, max_num_batched_tokens=24, num_pages=5, max_model_len=160)
    asked = llm.generate(prompts, params)
    assert llm.stats()["preemptions"] > 0
    again = llm.generate(prompts, params)
    plain = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
    for outputs in (asked, again):
        for output, without, one in zip(outputs, plain, params, strict=True):
            assert output.outputs[0].token_ids == without.outputs[0].token_ids
            assert without.prompt_logprobs is None
            assert output.prompt_logprobs[0] is None
            prompt = output.prompt_token_ids
            rows = prompt_logprobs_by_hand(flash, prompt)
            assert len(output.prompt_logprobs) == len(prompt) == len(rows) + 1
            for token, row, entry in zip(prompt[1:], rows, output.prompt_logprobs[1:], strict=True):
                assert next(iter(entry)) == token
                assert len(entry) in (one.prompt_logprobs, one.prompt_logprobs + 1)
                for key, value in entry.items():
                    assert value.logprob == pytest.approx(float(row[key]), abs=1e-5)
                    assert value.rank == int((row > row[key]).sum()) + 1


def test_prompt_logprobs_survive_new_weights_and_preemption(random_model, make_prompts):
    """Each row is computed once: what the old weights said stays."""
    (prompt,) = make_prompts([60])
    old = prompt_logprobs_by_hand(random_model(MIMO, seed=0), prompt)
    new = prompt_logprobs_by_hand(random_model(MIMO, seed=1), prompt)
    llm = LLM(random_model(MIMO, seed=0), max_num_batched_tokens=25)
    request = llm.add(prompt, SamplingParams(max_tokens=3, prompt_logprobs=0))
    llm.step()
    assert len(request.prompt_logprobs) == 26
    llm.update_weights(WeightUpdate(1, random_model(MIMO, seed=1).state_dict()))
    while llm.has_work:
        llm.step()
    found = request.output().prompt_logprobs
    for t, token in enumerate(prompt[1:]):
        expected = (old if t < 25 else new)[t, token]
        assert found[t + 1][token].logprob == pytest.approx(float(expected), abs=1e-5)
