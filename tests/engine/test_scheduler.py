"""What each step takes: the token budget, the order of arrival, pages, preemption."""

from __future__ import annotations

import pytest

from sateen.engine.cache import KVCache
from sateen.engine.request import SamplingParams
from sateen.engine.scheduler import Scheduler
from sateen.engine.state import Request
from sateen.nn.spec import KVLayout


@pytest.fixture
def make():
    def build(num_pages=8, slots=3, budget=32):
        layouts = ((KVLayout("paged", 1, 2, 2),),)
        cache = KVCache(
            layouts,
            num_trunk_layers=1,
            num_pages=num_pages,
            num_slots=slots,
            max_model_len=512,
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
    assert scheduler.waiting[0].entry is None
    assert len(scheduler.waiting[0].tokens) == 62
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
