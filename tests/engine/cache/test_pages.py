"""The allocator against a plain model of it: 10^5 random operations, every count and every owner compared."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sateen.engine.cache.kv_cache import PAGE, KVCache
from sateen.engine.cache.pages import Pages
from sateen.engine.cache.prefix import PrefixCache
from sateen.engine.request import SamplingParams
from sateen.engine.state import Request
from sateen.nn.spec import KVLayout

PAGED, RING = KVLayout("paged", 1, 1, 1), KVLayout("ring", 1, 1, 1, window=9)


def test_pages_go_from_free_to_used_to_cached_and_back():
    pages, evicted = Pages(4), []
    pages.on_evict = evicted.append
    assert pages.take(3) == [0, 1, 2]
    assert pages.publish(0, b"a")
    assert pages.publish(1, b"b")
    assert not pages.publish(2, b"a")  # another page says the same
    assert (pages.num_used, pages.num_cached, pages.num_free) == (3, 0, 1)
    pages.release([0, 1, 2])
    assert (pages.num_used, pages.num_cached, pages.num_free) == (0, 2, 2)
    assert (pages.find(b"a"), pages.find(b"b"), pages.find(b"c")) == (0, 1, None)
    pages.hold(0)
    pages.hold(0)
    assert (pages.num_used, pages.num_cached) == (1, 1)
    assert pages.take(2) == [2, 3]  # free pages come before cached ones
    assert evicted == []
    assert pages.take(1) == [1]
    assert evicted == [b"b"]
    assert pages.find(b"b") is None
    pages.release([0])
    assert pages.num_used == 4  # somebody still reads it
    pages.release([0])
    assert (pages.num_used, pages.num_cached, pages.peak_used) == (3, 1, 4)
    pages.forget()
    assert (pages.num_cached, pages.num_free) == (0, 1)


def test_the_end_of_a_sequence_is_taken_back_before_its_beginning():
    pages, evicted = Pages(4), []
    pages.on_evict = evicted.append
    for page, key in zip(pages.take(2), (b"a0", b"a1"), strict=True):
        pages.publish(page, key)
    pages.release([0, 1])
    for page, key in zip(pages.take(2), (b"b0", b"b1"), strict=True):
        pages.publish(page, key)
    pages.release([2, 3])
    pages.hold(pages.find(b"a0"))  # used again, so newer than b
    pages.release([0])
    for _ in range(4):
        pages.take(1)
    assert evicted == [b"a1", b"b1", b"b0", b"a0"]


class Model:
    """What each sequence holds, as lists; who owns a page is counted afresh whenever it is asked."""

    def __init__(self):
        self.entries = {}
        self.requests = {}

    def owners(self):
        held = {}
        for entry in self.entries.values():
            for place, page in enumerate(entry.pages):
                held.setdefault(page, []).append((entry, place))
        return held


def check(cache, prefix, model, contents):
    """No leak, no aliasing, exact counts; every shared page says the same in all that hold it."""
    held = model.owners()
    pages = cache.pages
    assert [len(held.get(page, ())) for page in range(cache.num_pages)] == pages.refs
    assert pages.num_used == len(held)
    assert pages.num_used + pages.num_cached + pages.num_free == cache.num_pages
    for owners in held.values():
        if len(owners) > 1:
            assert all(place < entry.num_fixed for entry, place in owners)
            assert len({place for _, place in owners}) == 1
    slots = [entry.slot for entry in model.entries.values()]
    assert len(set(slots)) == len(slots) == cache.num_slots - cache.num_free_slots
    for key, entry in model.entries.items():
        tokens = model.requests[key].tokens
        rows = entry.rows[: entry.length]
        assert np.array_equal(contents[rows], tokens[: entry.length])
        assert len(entry.pages) == -(-max(entry.length, 0) // PAGE) or len(entry.rows) >= entry.length
        assert entry.num_fixed * PAGE <= entry.length
    assert prefix.anchor_bytes == sum(anchor.num_bytes for anchor in prefix.anchors.values())
    assert prefix.anchor_bytes <= prefix.max_anchor_bytes
    assert all(pages.find(key) is not None for key in prefix.anchors)


@pytest.mark.parametrize(
    ("layouts", "num_draft", "operations"),
    [(((PAGED,),), 0, 20_000), (((PAGED,), (RING,)), 3, 100_000)],
)
def test_random_operations_leave_nothing_behind(layouts, num_draft, operations):
    """`contents` is what a row was last written with, so an alias or a stale share shows as a wrong token."""
    rng = random.Random(num_draft)
    cache = KVCache(
        layouts, num_trunk_layers=len(layouts), num_pages=16, num_slots=6, max_model_len=600,
        num_draft=num_draft,
    )  # fmt: skip
    # The heads of this cache have no layers, so only their look-ahead takes part.
    prefix = PrefixCache(cache, max_anchor_bytes=40 * 64)
    model = Model()
    contents = np.full(16 * PAGE, -1)
    starts = [[rng.randrange(1000) for _ in range(300)] for _ in range(3)]
    names = ["open", "extend", "truncate", "free", "preempt", "refused", "hit", "clear", "evicted"]
    counts = dict.fromkeys(names, 0)
    forget_anchors = cache.pages.on_evict

    def on_evict(key):
        counts["evicted"] += 1
        forget_anchors(key)

    cache.pages.on_evict = on_evict
    number = 0
    for operation in range(operations):
        draw = rng.random()
        if draw < 0.15 and cache.num_free_slots:
            number += 1
            start = rng.choice(starts)
            tokens = start[: rng.randint(64, 300)] + [rng.randrange(1000) for _ in range(rng.randint(1, 30))]
            request = Request(number, SamplingParams(), tokens, len(tokens), 200)
            hit = prefix.match(request)
            entry = request.entry = cache.open()
            prefix.begin(request, entry, hit)
            counts["hit"] += bool(hit.pages)
            model.entries[number], model.requests[number] = entry, request
            counts["open"] += 1
        elif draw < 0.28 and model.entries:
            key = rng.choice(list(model.entries))
            entry, request = model.entries.pop(key), model.requests.pop(key)
            prefix.end(entry)
            cache.free(entry)
            if draw < 0.21 and cache.num_free_slots:  # it waits and comes back with what it had
                request.entry = entry = cache.open()
                prefix.begin(request, entry, prefix.match(request))
                model.entries[key], model.requests[key] = entry, request
                counts["preempt"] += 1
            else:
                counts["free"] += 1
        elif draw < 0.2803:
            for key in list(model.entries):
                entry = model.entries.pop(key)
                del model.requests[key]
                prefix.end(entry)
                cache.free(entry)
            prefix.clear()
            assert cache.pages.num_free == 16
            counts["clear"] += 1
        elif model.entries:
            key = rng.choice(list(model.entries))
            entry, request = model.entries[key], model.requests[key]
            missing = len(request.tokens) - entry.length
            count = prefix.room(entry, min(missing, rng.choice([1, 7, 64, 200])))
            drafts = rng.randint(0, num_draft) if count == missing else 0
            if len(request.tokens) + drafts >= 600:
                continue
            before = cache.num_free_pages, len(entry.pages)
            if not cache.reserve(entry, entry.length + count + drafts):
                assert cache.pages_for(entry.length + count + drafts) - before[1] > before[0]
                assert (cache.num_free_pages, len(entry.pages)) == before
                counts["refused"] += 1
                continue
            at = entry.length
            written = request.tokens[at : at + count] + [-2] * drafts
            cache.forward([entry], [len(written)])
            contents[entry.rows[at : at + len(written)]] = written
            if num_draft:
                entry.head_length = max(0, min(entry.length, len(request.tokens) - num_draft))
            counts["extend"] += 1
            if count == missing:  # some drafts are right, and a token comes on top
                accepted = rng.randint(0, drafts)
                new = [rng.randrange(1000) for _ in range(accepted + 1)]
                contents[entry.rows[at + count : at + count + accepted]] = new[:accepted]
                request.tokens += new
                cache.truncate(entry, len(request.tokens) - 1)
                counts["truncate"] += accepted < drafts
                if num_draft:
                    entry.head_length = max(0, len(request.tokens) - num_draft)
            prefix.advance(request, entry, at + max(len(written), num_draft), samples=count == missing)
        if operation % 10 == 0:
            check(cache, prefix, model, contents)
    for key, entry in model.entries.items():
        prefix.end(entry)
        cache.free(entry)
        model.requests[key].entry = None
    assert not cache.pages.num_used
    assert not any(cache.pages.refs)
    prefix.clear()
    assert (cache.pages.num_free, cache.num_free_slots, prefix.anchor_bytes) == (16, 6, 0)
    least = operations // 400
    wanted = [name for name in names if name != "clear" and (num_draft or name != "truncate")]
    assert min(counts[name] for name in wanted) > least, counts
    assert counts["clear"] > 0
