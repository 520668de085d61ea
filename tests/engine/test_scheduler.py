"""What each step takes: the token budget, the order of arrival, pages, preemption."""

from __future__ import annotations

import itertools
import random

import pytest

from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.request import SamplingParams
from sateen.engine.scheduler import Scheduler
from sateen.engine.state import Request
from sateen.nn.spec import KVLayout


@pytest.fixture
def make():
    def build(num_pages=8, slots=3, budget=32, num_draft=0):
        layouts = ((KVLayout("paged", 1, 2, 2),),)
        cache = KVCache(
            layouts,
            num_trunk_layers=1,
            num_pages=num_pages,
            num_slots=slots,
            max_model_len=512,
            num_draft=num_draft,
        )
        return Scheduler(cache, max_num_seqs=slots, max_num_batched_tokens=budget)

    return build


def request(number, length, max_new=50, drafts=()):
    params = SamplingParams(temperature=0, max_tokens=max_new)
    return Request(number, params, [1] * length, length, max_new, drafts=list(drafts))


def step(scheduler, drafts=()):
    """Plans, pretends to compute and to sample; returns (id, start, count, samples) of each chunk."""
    chunks = scheduler.plan()
    scheduler.cache.forward([c.entry for c in chunks], [c.count for c in chunks])
    for chunk in chunks:
        if chunk.samples:
            chunk.request.tokens.append(2)
            chunk.request.drafts = list(drafts)
            scheduler.cache.truncate(chunk.entry, len(chunk.request.tokens) - 1)
    return [(c.request.request_id, c.start, c.count, c.samples) for c in chunks]


def test_prompts_are_cut_to_the_budget_and_decoding_goes_first(make):
    scheduler = make()
    for number, length in enumerate([10, 50, 5]):
        scheduler.add(request(number, length))
    assert step(scheduler) == [(0, 0, 10, True), (1, 0, 22, False)]
    assert step(scheduler) == [(0, 10, 1, True), (1, 22, 28, True), (2, 0, 3, False)]
    assert step(scheduler) == [(0, 11, 1, True), (1, 50, 1, True), (2, 3, 2, True)]


def test_drafts_ride_along_all_or_none(make):
    scheduler = make(budget=10)
    scheduler.add(request(0, 4))
    scheduler.add(request(1, 4, drafts=[7, 7, 7]))
    # Four tokens and three drafts do not fit the six that are left, so the last token waits with its drafts.
    assert step(scheduler, drafts=[8, 8, 8]) == [(0, 0, 4, True), (1, 0, 3, False)]
    chunks = scheduler.plan()
    assert [(c.start, c.count, c.drafts) for c in chunks] == [
        (4, 4, [8, 8, 8]),
        (3, 4, [7, 7, 7]),
    ]
    assert chunks[1].token_ids() == [1, 7, 7, 7]


def test_drafts_beyond_the_last_token_are_left_out(make):
    scheduler = make()
    scheduler.add(request(0, 4, max_new=3, drafts=[7, 7, 7]))
    (chunk,) = scheduler.plan()
    assert chunk.drafts == [7, 7]


def test_requests_wait_for_pages_in_order(make):
    scheduler = make(num_pages=3, budget=512)
    for number, length in enumerate([100, 70, 10]):
        scheduler.add(request(number, length))
    # The second needs two pages and one is left; the third would fit but does not overtake.
    assert step(scheduler) == [(0, 0, 100, True)]
    assert [r.request_id for r in scheduler.waiting] == [1, 2]
    scheduler.remove(scheduler.running[0])
    assert step(scheduler) == [(1, 0, 70, True), (2, 0, 10, True)]


def test_a_whole_prompt_reserves_its_pages_at_the_start(make):
    scheduler = make(num_pages=4, budget=32)
    scheduler.add(request(0, 130))
    scheduler.add(request(1, 65))
    assert step(scheduler) == [(0, 0, 32, False)]
    assert scheduler.cache.num_free_pages == 1
    assert len(scheduler.waiting) == 1


def test_the_youngest_gives_way_and_returns_first(make):
    scheduler = make(num_pages=3, budget=512)
    scheduler.add(request(0, 63))
    scheduler.add(request(1, 60))
    scheduler.add(request(2, 60))
    assert len(step(scheduler)) == 3
    assert len(step(scheduler)) == 3  # the first fills its page
    # It needs another now; the third gives its own back and goes to the head of the queue.
    assert step(scheduler) == [(0, 64, 1, True), (1, 61, 1, True)]
    assert [r.request_id for r in scheduler.waiting] == [2]
    assert scheduler.num_preemptions == 1
    (waiting,) = scheduler.waiting
    assert waiting.entry is None
    assert len(waiting.tokens) == 62
    scheduler.remove(scheduler.running[1])
    assert step(scheduler) == [(0, 65, 1, True), (2, 0, 62, True)]


def test_a_request_may_have_to_give_way_itself(make):
    scheduler = make(num_pages=2, budget=512)
    scheduler.add(request(0, 30))
    scheduler.add(request(1, 64))
    step(scheduler)
    assert step(scheduler) == [(0, 30, 1, True)]
    assert [r.request_id for r in scheduler.running] == [0]
    assert scheduler.cache.num_free_pages == 1


def test_removed_requests_leave_nothing(make):
    scheduler = make()
    requests = [request(i, 20) for i in range(5)]
    for r in requests:
        scheduler.add(r)
    step(scheduler)
    for r in requests:
        scheduler.remove(r)
    assert scheduler.plan() == []
    assert (scheduler.cache.num_free_pages, scheduler.cache.num_free_slots) == (8, 3)


def work(scheduler, rng):
    """One step in which some drafts are right; finished requests leave. Returns their numbers."""
    chunks = scheduler.plan()
    assert sum(c.count for c in chunks) <= scheduler.max_num_batched_tokens
    assert len({id(c.request) for c in chunks}) == len(chunks)
    scheduler.cache.forward([c.entry for c in chunks], [c.count for c in chunks])
    done = []
    for chunk in chunks:
        r = chunk.request
        if chunk.samples:
            accepted = rng.randint(0, len(chunk.drafts))
            r.tokens += [2] * (accepted + 1)
            r.drafts = [8] * scheduler.cache.num_draft
            scheduler.cache.truncate(chunk.entry, len(r.tokens) - 1)
        assert r.remaining >= 0
    for chunk in chunks:
        if chunk.request.remaining == 0:
            scheduler.remove(chunk.request)
            done.append(chunk.request.request_id)
    return done


def bound(scheduler, ahead):
    """Steps in which requests that are served one after the other, the oldest first, would all be done.

    The oldest is never preempted and reads at least the budget less all that the others can decode.
    """
    least = scheduler.max_num_batched_tokens - (scheduler.max_num_seqs - 1) * (1 + scheduler.cache.num_draft)
    return sum(-(-(r.num_prompt + r.max_new) // least) + r.max_new for r in ahead)


@pytest.mark.parametrize("seed", range(8))
def test_a_wait_is_bounded_by_the_requests_before_it(make, seed):
    """Overload that never ends, few pages, drafts: no request waits for one that came later."""
    rng = random.Random(seed)
    scheduler = make(num_pages=9, slots=4, budget=rng.choice([16, 24, 64]), num_draft=3)
    unfinished, due, finished, numbers = [], {}, 0, itertools.count()
    for steps in range(1, 1501):
        for _ in range(rng.choice([0, 0, 0, 1, 2])):
            length = rng.randint(300, 440) if rng.random() < 0.1 else rng.randint(1, 40)
            new = request(next(numbers), length, max_new=rng.randint(1, 100))
            scheduler.add(new)
            unfinished.append(new)
            due[new.request_id] = steps - 1 + bound(scheduler, unfinished)
        for number in work(scheduler, rng):
            assert steps <= due.pop(number)
            unfinished = [r for r in unfinished if r.request_id != number]
            finished += 1
    assert all(steps <= limit for limit in due.values())
    assert len(scheduler.waiting) > 100  # overloaded indeed
    assert finished > 100
    assert scheduler.num_preemptions > 3


def test_a_long_prompt_is_read_at_the_rate_that_decoding_leaves(make):
    scheduler = make(num_pages=30, slots=4, budget=20)
    for number in range(3):
        scheduler.add(request(number, 1, max_new=10_000))
    long = request(3, 340)
    scheduler.add(long)
    for number in range(4, 400):  # they would fit every gap
        scheduler.add(request(number, 1, max_new=5))
    step(scheduler)
    assert long.entry.length == 17  # of 20 tokens, less 3 that decode
    for _ in range(19):
        step(scheduler)
    assert long.entry.length == 340
    assert long.num_generated == 1


def test_starts_are_in_order_of_arrival_whatever_was_preempted(make):
    rng = random.Random(1)
    scheduler = make(num_pages=8, slots=4, budget=64)
    started = []
    for number in range(60):
        scheduler.add(request(number, rng.randint(1, 200), max_new=rng.randint(1, 80)))
    while scheduler.num_unfinished:
        work(scheduler, rng)
        for r in scheduler.running:
            if r.request_id not in started:
                started.append(r.request_id)
        ids = [r.request_id for r in scheduler.running] + [r.request_id for r in scheduler.waiting]
        assert ids == sorted(ids)
    assert started == list(range(60))
    assert scheduler.num_preemptions > 0


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding", "drafting", "preempted"])
def test_requests_can_be_dropped_at_any_moment(make, when):
    scheduler = make(num_pages=4, slots=2, budget=32, num_draft=3)
    kept, dropped = request(0, 30, max_new=40), request(1, 50, max_new=40)
    if when == "drafting":
        dropped.drafts = [7, 7, 7]
    scheduler.add(kept)
    scheduler.add(dropped)
    if when != "waiting":
        step(scheduler)
        assert dropped.entry.length == 2
    if when in ("decoding", "drafting", "preempted"):
        step(scheduler)
        step(scheduler, drafts=[8, 8, 8] if when == "drafting" else ())
        assert dropped.num_generated >= 1
    if when == "preempted":
        scheduler._preempt(dropped)
        assert next(iter(scheduler.waiting)) is dropped
    scheduler.remove(dropped)
    scheduler.remove(dropped)  # a second time changes nothing
    assert dropped.entry is None
    assert scheduler.cache.num_free_slots == 2 - (kept.entry is not None)
    rng = random.Random(0)
    while scheduler.num_unfinished:
        work(scheduler, rng)
    assert kept.num_generated == 40
    assert (scheduler.cache.num_free_pages, scheduler.cache.num_free_slots) == (4, 2)


def test_adding_and_removing_costs_the_same_in_a_long_queue(make, monkeypatch):
    """No step looks at requests that wait: neither planning nor removal touches more than the first."""
    looked = []
    original = Request.__eq__

    def counting(self, other):
        looked.append(1)
        return original(self, other)

    monkeypatch.setattr(Request, "__eq__", counting)
    monkeypatch.setattr(Request, "__hash__", object.__hash__)
    scheduler = make(slots=3)
    requests = [request(i, 20) for i in range(3000)]
    for r in requests:
        scheduler.add(r)
    for _ in range(10):
        step(scheduler)
    for r in reversed(requests):
        scheduler.remove(r)
    assert scheduler.num_unfinished == 0
    assert len(looked) < 100  # a list would have compared millions
