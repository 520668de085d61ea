"""Many clients at once, some of whom hang up: nothing stays held, answers are those of each prompt alone."""

from __future__ import annotations

import random

import engine_load as load
import pytest

from sateen.engine.engine import LLM

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"


@pytest.mark.parametrize(("name", "count"), [(FLASH, 60), (MIMO, 60)])
def test_mixed_load_leaves_nothing_behind_and_changes_no_answer(name, count, drafting_model):
    """`sateen bench engine-load` is the same with 1,000 requests."""
    model = drafting_model(name, heads=3, noise=0.15, strength=0.05)
    clients = 32
    llm = LLM(model, **load.engine_settings(clients))
    calls = load.random_calls(count, model.config.vocab_size, random.Random(7))
    refused = load.drive(llm, calls, clients)
    found = load.compare(model, calls)
    stats = llm.stats()
    assert load.leaks(llm) == {}
    assert found["different"] == 0
    assert found["ties"] <= load.ALLOWED_TIES
    assert found["completed"] + stats["aborted"] == count
    assert found["compared"] > count // 2
    # All that this is about took place.
    assert refused > 0
    assert stats["aborted"] > 3
    assert stats["preemptions"] > 0
    assert stats["prefix"]["hit_tokens"] > 500
    assert 0.1 < stats["acceptance_by_position"][0] < 0.98


def test_ties_and_leaks_are_told_from_the_rest(flash, make_prompts, greedy):
    llm = LLM(flash, max_num_seqs=2, max_model_len=320)
    (prompt,) = make_prompts([30])
    call = load.Call(prompt, greedy(4), None, llm.add(prompt, greedy(4)))
    llm.step()
    assert load.leaks(llm) == {
        "used_pages": 1,
        "used_slots": 1,
        "references": 1,
        "lost_pages": 1,
        "running": 1,
    }
    while llm.has_work:
        llm.step()
    assert load.leaks(llm) == {}
    assert load.compare(flash, [call]) | {"ties": 0} == {
        "requests": 1, "completed": 1, "compared": 1, "different": 0, "ties": 0,
    }  # fmt: skip
    call.request.tokens[-1] ^= 1
    assert load.compare(flash, [call])["different"] == 1
