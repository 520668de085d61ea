"""Pages and rings against a plain list per sequence: every row read back, nothing leaked or shared."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

from sateen.engine.cache.kv_cache import PAGE, KVCache, page_bytes
from sateen.engine.engine import LLM
from sateen.nn.spec import KVLayout

WINDOW, DRAFT = 9, 3
PAGED = KVLayout("paged", 1, 1, 2)
RING = KVLayout("ring", 1, 2, 1, window=WINDOW)


def make(num_pages=12, num_slots=5, layouts=((PAGED,), (RING,)), **changes):
    settings = {
        "num_trunk_layers": 2,
        "max_model_len": 400,
        "num_draft": DRAFT,
    } | changes
    cache = KVCache(layouts, num_pages=num_pages, num_slots=num_slots, **settings)
    for pool in cache.pools.values():  # a row that was never written must never be read
        pool.k_RKH.fill_(torch.nan)
        pool.v_RKV.fill_(torch.nan)
    return cache


def rows_of(values, layout):
    rows = torch.tensor(values, dtype=torch.float32)[:, None, None]
    return rows.expand(-1, 1, layout.head_dim), -rows.expand(-1, 1, layout.v_head_dim)


@pytest.mark.parametrize("seed", range(3))
def test_random_operations_against_lists(seed):
    rng = random.Random(seed)
    cache = make()
    truth: dict[int, list[float]] = {}
    entries = {}
    longest: dict[int, int] = {}
    counter, operations = 0.0, 0
    while operations < 4000:
        operations += 1
        action = rng.random()
        if action < 0.12 and cache.num_free_slots:
            entry = cache.open()
            key = operations
            entries[key], truth[key], longest[key] = entry, [], 0
        elif action < 0.18 and entries:
            key = rng.choice(list(entries))
            cache.free(entries.pop(key))
            del truth[key]
        elif action < 0.45 and entries:
            key = rng.choice(list(entries))
            least = min(len(truth[key]), max(0, longest[key] - DRAFT))
            cut = rng.randint(least, len(truth[key]))
            cache.truncate(entries[key], cut)
            del truth[key][cut:]
        elif entries:
            keys = rng.sample(list(entries), rng.randint(1, len(entries)))
            small = rng.random() < 0.6
            batch, counts = [], []
            for key in keys:
                count = rng.randint(1, DRAFT + 1 if small else 90)
                length = len(truth[key]) + count
                free_before, missing = (
                    cache.num_free_pages,
                    -(-length // PAGE) - len(entries[key].pages),
                )
                if length > cache.max_model_len or not cache.reserve(entries[key], length):
                    assert length > cache.max_model_len or missing > free_before
                    assert cache.num_free_pages == free_before
                    continue
                batch.append(key)
                counts.append(count)
            if not batch:
                continue
            new = []
            for key, count in zip(batch, counts, strict=True):
                values = [counter + i for i in range(count)]
                counter += count
                truth[key] += values
                longest[key] = max(longest[key], len(truth[key]))
                new += values
            view = cache.forward([entries[key] for key in batch], counts)
            for index, layout in enumerate((PAGED, RING)):
                k, v, cu = view.layer(index).extend(*rows_of(new, layout))
                expected = []
                for key, count in zip(batch, counts, strict=True):
                    oldest = 0 if layout is PAGED else max(0, len(truth[key]) - count - WINDOW + 1)
                    expected.append(truth[key][oldest:])
                assert cu.tolist() == [sum(map(len, expected[:i])) for i in range(len(expected) + 1)]
                wanted_k, wanted_v = rows_of([x for part in expected for x in part], layout)
                assert torch.equal(k, wanted_k)
                assert torch.equal(v, wanted_v)
        held = [page for entry in entries.values() for page in entry.pages]
        assert len(set(held)) == len(held)
        assert len(held) + cache.num_free_pages == cache.num_pages
        slots = [entry.slot for entry in entries.values()]
        assert len(set(slots)) == len(slots)
        assert len(slots) + cache.num_free_slots == cache.num_slots
    for entry in entries.values():
        cache.free(entry)
    assert (cache.num_free_pages, cache.num_free_slots) == (12, 5)


def test_heads_have_their_own_length_and_deeper_rings():
    cache = make(layouts=((RING,), (RING,)), num_trunk_layers=1)
    assert [pool.ring_rows for pool in cache.pools.values()] == [
        WINDOW + DRAFT,
        WINDOW + 2 * DRAFT,
    ]
    entry = cache.open()
    cache.forward([entry], [20]).layer(0).extend(*rows_of(range(20), RING))
    k, _, _ = cache.forward([entry], [15], heads=True).layer(1).extend(*rows_of(range(100, 115), RING))
    assert (entry.length, entry.head_length) == (20, 15)
    assert k[:, 0, 0].tolist() == list(range(100, 115))
    entry.head_length = 12  # the last rows leaned on drafts and are done again
    k, _, _ = cache.forward([entry], [2], heads=True).layer(1).extend(*rows_of([7, 8], RING))
    assert k[:, 0, 0].tolist() == [104, 105, 106, 107, 108, 109, 110, 111, 7, 8]


def test_shared_layers_read_what_their_source_appended():
    shared = KVLayout("shared", 1, 1, 2, source=0)
    cache = make(layouts=((PAGED,), (shared, RING)))
    entry = cache.open()
    cache.reserve(entry, 5)
    view = cache.forward([entry], [5])
    k, v, cu = view.layer(0).extend(*rows_of(range(5), PAGED))
    got = view.layer(1).read()
    assert all(torch.equal(a, b) for a, b in zip(got, (k, v, cu), strict=True))
    assert cache.allocated_bytes_by_layer() == [
        12 * PAGE * 3 * 4,
        5 * (WINDOW + DRAFT) * 3 * 4,
    ]


def test_bytes_are_what_was_allocated():
    wide = KVLayout("paged", 2, 24, 16)
    ring = KVLayout("ring", 4, 8, 8, window=10)
    cache = make(
        layouts=((wide,), (ring,), (ring,)),
        num_pages=7,
        num_slots=3,
        dtype=torch.bfloat16,
    )
    # paged: 7 pages * 64 rows * 2 heads * (24 + 16) * 2 bytes; a ring: 3 slots * 13 rows * 4 heads * 16 * 2
    # bytes, and the last layer is a head with 16 rows.
    assert cache.allocated_bytes() == {
        "paged": 71680,
        "ring": 3 * 13 * 128 + 3 * 16 * 128,
    }
    assert cache.allocated_bytes_by_layer() == [71680, 3 * 13 * 128, 3 * 16 * 128]
    held = sum(pool.k_RKH.nbytes + pool.v_RKV.nbytes for pool in cache.pools.values())
    assert sum(cache.allocated_bytes().values()) == held
    assert cache.kv_bytes(64)["paged"] == 64 * 160
    assert cache.kv_bytes(65) == {"paged": 2 * 64 * 160, "ring": 13 * 128 + 16 * 128}
    assert page_bytes(cache.layouts, torch.bfloat16) == 64 * 160


def test_without_drafts_a_ring_holds_the_window_and_no_row_more():
    cache = make(layouts=((RING,),), num_draft=0, num_trunk_layers=1)
    assert cache.pools[0, "kv"].k_RKH.shape == (5 * WINDOW, 1, 2)
    assert not cache.has_pages
    assert cache.pages_for(1000) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_are_rounded_the_same_however_they_arrive(dtype):
    values = torch.rand(30, generator=torch.Generator().manual_seed(0)).tolist()
    whole, chunked = make(dtype=dtype), make(dtype=dtype)
    results = []
    for cache, counts in ((whole, [30]), (chunked, [1, 20, 3, 6])):
        entry = cache.open()
        cache.reserve(entry, 30)
        start = 0
        for count in counts:
            view = cache.forward([entry], [count])
            paged = view.layer(0).extend(*rows_of(values[start : start + count], PAGED))
            ring = view.layer(1).extend(*rows_of(values[start : start + count], RING))
            start += count
        results.append((paged[0], ring[0][-WINDOW:]))
    expected = torch.tensor(values).to(dtype).float()
    for paged_k, ring_k in results:
        assert paged_k.dtype == torch.float32
        assert torch.equal(paged_k[:, 0, 0], expected)
        assert torch.equal(ring_k[:, 0, 0], expected[-WINDOW:])


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of resident pages")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_rows_that_nobody_wrote_take_no_memory(dtype):
    layout = KVLayout("paged", 2, 64, 64)
    before = resident_bytes()
    cache = KVCache(
        ((layout,),),
        num_pages=4000,
        num_slots=2,
        num_trunk_layers=1,
        max_model_len=64,
        num_draft=0,
        dtype=dtype,
    )
    pool = cache.pools[0, "kv"]
    size = pool.k_RKH.nbytes + pool.v_RKV.nbytes
    assert size >= 4000 * PAGE * 2 * 128
    assert resident_bytes() - before < size / 4
    assert pool.k_RKH.data_ptr() % 64 == pool.v_RKV.data_ptr() % 64 == 0
    assert not pool.k_RKH[:100].any()


def test_bytes_in_use_are_counted_now_and_at_their_peak():
    cache = make(num_pages=7, num_slots=3)  # a row of a page or a ring has 3 numbers of 4 bytes
    page, ring = PAGE * 12, (WINDOW + DRAFT) * 12
    a, b = cache.open(), cache.open()
    assert cache.reserve(a, 130)
    assert cache.reserve(b, 1)
    assert cache.usage() == {
        "page_tokens": 64, "used_pages": 4, "cached_pages": 0, "free_pages": 3, "peak_pages": 4,
        "used_slots": 2, "free_slots": 1,
        "used_bytes": {"paged": 4 * page, "ring": 2 * ring},
        "peak_bytes": {"paged": 4 * page, "ring": 2 * ring},
    }  # fmt: skip
    cache.pages.publish(a.pages[0], b"key")
    cache.free(a)
    assert cache.reserve(b, 70)
    usage = cache.usage()
    assert (usage["used_pages"], usage["cached_pages"], usage["free_pages"], usage["peak_pages"]) == (
        2,
        1,
        4,
        4,
    )
    assert (usage["used_slots"], usage["free_slots"]) == (1, 2)
    assert usage["used_bytes"] == {"paged": 2 * page, "ring": ring}
    assert cache.bytes_in_use_by_layer() == [2 * page, ring]
    assert cache.bytes_in_use_by_layer(at_peak=True) == [4 * page, 2 * ring]


def test_shared_pages_are_counted_once_and_free_with_the_last():
    cache = make(num_pages=6)
    first = cache.open()
    cache.reserve(first, 130)
    cache.forward([first], [130])
    for page, key in zip(first.pages[:2], (b"0", b"1"), strict=True):
        cache.pages.publish(page, key)
    second = cache.open()
    cache.share(second, first.pages[:2])
    assert (second.length, second.pages, second.rows.tolist()) == (128, first.pages[:2], list(range(128)))
    assert cache.reserve(second, 200)
    assert cache.usage()["used_pages"] == 5
    with pytest.raises(AssertionError):
        cache.truncate(second, 127)  # would let it write into rows that others read
    cache.free(first)
    assert (cache.usage()["used_pages"], cache.usage()["cached_pages"], cache.num_free_pages) == (4, 0, 2)
    cache.free(second)
    assert (cache.usage()["used_pages"], cache.usage()["cached_pages"], cache.num_free_pages) == (0, 2, 6)


def test_a_hybrid_allocates_what_the_formula_says(random_model):
    """At 16k tokens, ratio 1:5, window 128: full layers hold every token and sliding ones the window."""
    hybrid = random_model(
        "mimo-v2-flash-tiny", heads=0, num_hidden_layers=6, hybrid_layer_pattern=[0, 1, 1, 1, 1, 1],
        moe_layer_freq=[0] * 6, sliding_window=128, sliding_window_size=128, max_position_embeddings=16384,
    )  # fmt: skip
    for slots in (1, 4):
        llm = LLM(hybrid, max_num_seqs=slots, max_model_len=16384, kv_memory_bytes=1 << 30)
        # A full layer of 1 head, 5 sliding ones of 2; keys have 24 and values 16 channels, float32.
        formula = slots * (16384 * 40 + 5 * 128 * 80) * 4
        allocated = sum(llm.stats()["allocated_bytes"].values())
        assert abs(allocated / formula - 1) < 0.02
        assert allocated == sum(layer["bytes"] for layer in llm.allocated_layers())
        assert sum(llm.kv_bytes(16384).values()) * slots == allocated
        held = [tensor for pool in llm.cache.pools.values() for tensor in pool.per_row()]
        storage = sum(tensor.untyped_storage().nbytes() for tensor in held)
        assert allocated <= storage <= allocated + 64 * len(held)  # each may begin at a cache line
