"""Deadlines, cancellation and a bounded queue, at the engine's face and with a clock that the test turns."""

from __future__ import annotations

import math

import pytest

from sateen.engine.engine import LLM
from sateen.engine.limits import Deadlines, Pace
from sateen.engine.request import SamplingParams
from sateen.engine.state import Request
from sateen.errors import ConfigError, QueueFull, RequestError

FLASH = "mimo-v2-flash-tiny"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(flash, clock):
    def build(**settings):
        return LLM(flash, clock=clock, max_model_len=256, **({"max_num_seqs": 2} | settings))

    return build


def drain(llm):
    while llm.has_work:
        llm.step()


def is_empty(llm):
    cache = llm.stats()["cache"]
    return (cache["used_pages"], cache["used_slots"]) == (0, 0)


def test_expired_requests_keep_what_they_had(make, clock, make_prompts, greedy, tokens_of):
    llm = make()
    prompts = make_prompts([20, 30, 25, 40])
    running = llm.add(prompts[0], greedy(20), deadline_s=5.0)
    reading = llm.add(prompts[1], greedy(20))
    waiting = llm.add(prompts[2], greedy(20), deadline_s=5.0)
    patient = llm.add(prompts[3], greedy(20), deadline_s=500.0)
    for _ in range(4):
        llm.step()
    clock.now += 4.9
    llm.step()
    assert (running.finish_reason, waiting.finish_reason) == (None, None)
    kept = running.num_generated
    assert 5 <= kept < 20
    clock.now += 0.1
    news = llm.step()
    for request, count in ((running, kept), (waiting, 0)):
        assert request in news
        completion = request.output().outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("abort", "deadline")
        assert len(completion.token_ids) == count
        assert request.entry is None
    assert patient.entry is not None  # the free place was filled in the very same step
    drain(llm)
    assert [reading.finish_reason, patient.finish_reason] == ["length", "length"]
    alone = tokens_of(make(), prompts, greedy(20))
    assert running.output().outputs[0].token_ids == alone[0][:kept]
    assert [reading.output().outputs[0].token_ids, patient.output().outputs[0].token_ids] == alone[1::2]
    assert llm.stats()["aborted"] == 2
    assert is_empty(llm)


def test_all_completions_of_a_prompt_expire(make, clock, make_prompts):
    llm = make()
    params = SamplingParams(max_tokens=50, n=3, ignore_eos=True)
    request = llm.add(make_prompts([20])[0], params, deadline_s=1)
    llm.step()
    clock.now += 1
    news = llm.step()
    assert [sibling.stop_reason for sibling in request.siblings] == ["deadline"] * 3
    assert all(sibling in news for sibling in request.siblings)
    assert request.output().finished
    assert not llm.has_work
    assert is_empty(llm)


@pytest.mark.parametrize("deadline_s", [0, -1.0, math.nan, math.inf, True, "5"])
def test_impossible_deadlines_are_refused(make, deadline_s):
    llm = make()
    with pytest.raises(RequestError, match="accepted: a finite number of seconds above 0"):
        llm.add([1, 2], deadline_s=deadline_s)
    assert not llm.has_work


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_cancellation_frees_rows_at_once_and_disturbs_nobody(
    steps, drafting_model, make_prompts, greedy, tokens_of
):
    """Dropped while waiting, in the middle of the prompt, with drafts and decoding; others do not notice."""
    model = drafting_model(FLASH, heads=3, noise=0.1, strength=0.05)
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 24, "max_model_len": 256}
    llm = LLM(model, **settings)
    prompts = make_prompts([30, 40, 25])
    alone = [tokens_of(LLM(model, **settings), [prompt], greedy(20))[0] for prompt in prompts]
    first, dropped, last = (llm.add(prompt, greedy(20)) for prompt in prompts)
    for _ in range(steps):
        llm.step()
    tokens = list(dropped.tokens)
    llm.abort(dropped)
    assert dropped.entry is None
    assert llm.stats()["cache"]["used_slots"] == (steps > 0)
    news = llm.step()
    assert dropped in news
    assert dropped.output().outputs[0].finish_reason == "abort"
    assert dropped.output().outputs[0].stop_reason is None
    llm.abort(dropped)  # a second time says and does nothing
    assert dropped not in llm.step()
    drain(llm)
    assert dropped.tokens == tokens
    assert first.output().outputs[0].token_ids == alone[0]
    assert last.output().outputs[0].token_ids == alone[2]
    llm.abort(first)
    assert first.finish_reason == "length"
    assert is_empty(llm)


def test_a_batch_ends_although_some_of_it_is_dropped(make, make_prompts, greedy):
    llm = make()
    seen = []
    for request in llm._work.run(llm._intake.requests(make_prompts([10, 12, 14]), greedy(8))):
        seen.append(request)
        if len(seen) == 1:
            llm.abort(next(iter(llm.scheduler.waiting)))
            llm.abort(llm.scheduler.running[-1])
    assert sorted(r.finish_reason for r in {id(r): r for r in seen}.values()) == ["abort", "abort", "length"]


def test_a_full_queue_says_when_to_come_back(make, clock, make_prompts, greedy):
    llm = make(max_waiting=2, draft="none")
    (prompt,) = make_prompts([10])
    requests = [llm.add(prompt, greedy(10)) for _ in range(4)]  # two of them will run, two may wait
    with pytest.raises(QueueFull, match="2 may; try again in") as error:
        llm.add(prompt, greedy(10))
    assert isinstance(error.value, RequestError)
    assert error.value.retry_after_s == 1.0  # nothing is measured yet
    assert llm.stats()["prompt_tokens"] == 40
    while not any(request.finish_reason for request in requests):
        llm.step()
        clock.now += 0.5
    # The first two ended together with their tenth token, half a second ago.
    llm.add(prompt, greedy(10))
    llm.add(prompt, greedy(10))
    with pytest.raises(QueueFull) as error:
        llm.add(prompt, greedy(10))
    assert error.value.retry_after_s == pytest.approx(0.5 / 2)
    assert len(llm.generate([prompt] * 6, greedy(2))) == 6  # whoever waits for the answers is not refused
    drain(llm)
    with pytest.raises(RequestError, match="n is 5, but at most 4 requests can run and wait"):
        llm.add(prompt, SamplingParams(n=5))
    llm.add(prompt, SamplingParams(n=4, max_tokens=2))
    with pytest.raises(QueueFull):
        llm.add(prompt, SamplingParams(n=2))
    with pytest.raises(ConfigError, match="max_waiting is -1"):
        make(max_waiting=-1)


def test_no_place_to_wait_still_serves(make, make_prompts, greedy):
    llm = make(max_waiting=0)
    (prompt,) = make_prompts([10])
    first, _ = llm.add(prompt, greedy(3)), llm.add(prompt, greedy(3))
    with pytest.raises(QueueFull):
        llm.add(prompt, greedy(3))
    drain(llm)
    assert first.finish_reason == "length"
    llm.add(prompt, greedy(3))


def request(number, max_new=10, deadline=None):
    return Request(number, SamplingParams(), [1] * 5, 5, max_new, deadline=deadline)


def test_the_pace_is_the_mean_distance_of_ends():
    pace = Pace()
    assert pace.retry_after_s(0.0, [], 0.0) == 1.0
    # Two run at 4 tokens a second together, so the nearer end is 6 / 2 seconds off.
    assert pace.retry_after_s(0.0, [request(1), request(2, max_new=6)], 4.0) == 3.0
    pace.ended(10.0)
    assert pace.retry_after_s(11.0, [request(1), request(2, max_new=6)], 4.0) == 3.0
    for now in (12.0, 16.0):
        pace.ended(now)
    assert pace.retry_after_s(16.0, [], 4.0) == 2.0
    assert pace.retry_after_s(40.0, [], 4.0) == 10.0  # nothing has ended for long
    for i in range(100):
        pace.ended(50.0 + 0.25 * i)
    assert pace.retry_after_s(75.0, [], 4.0) == pytest.approx((75 - 67) / 32)  # the newest 32 count


def test_deadlines_forget_finished_requests():
    deadlines = Deadlines()
    requests = [request(i, deadline=1000.0 - i) for i in range(500)]
    for one in requests:
        deadlines.add(one)
    assert deadlines.expired(500.0) == []
    for one in requests[:490]:
        one.finish_reason = "stop"
        deadlines.sweep(10)
    assert len(deadlines._heap) < 60
    assert deadlines.expired(505.0) == [
        requests[499],
        requests[498],
        requests[497],
        requests[496],
        requests[495],
    ]
    assert deadlines.expired(2000.0) == requests[494:489:-1]
    assert deadlines.expired(2000.0) == []
