"""Prefix reuse: the same tokens and acceptance as without it, and nothing kept longer than it is true."""

from __future__ import annotations

import logging

import pytest
import torch

from sateen.engine.cache.anchors import copy_window, keeps_window, paste_window, window_bytes
from sateen.engine.cache.kv_cache import PAGE, KVCache
from sateen.engine.cache.prefix import PrefixCache
from sateen.engine.engine import LLM, WeightUpdate
from sateen.engine.request import SamplingParams
from sateen.engine.state import Request
from sateen.nn.attention import Sequences
from sateen.nn.spec import KVLayout

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"
SETTINGS = {"max_num_seqs": 3, "max_model_len": 640, "max_num_batched_tokens": 96}


def engine(model, **settings):
    """With a fixed number of drafts where there are heads: what is compared must not depend on time."""
    return LLM(model, **({"draft": "mtp" if model.num_mtp_heads else "none"} | settings))


def conversations(make_prompts):
    """Prompts in rounds: one start, the same again, branches of it, other starts, lengths at page borders."""
    start, a, b, c = make_prompts([130, 56, 33, 90])
    return [
        [start + a],
        [start + a, start + b, start + c],
        [start + c + b, start[:129], start[:131]],
    ]


def run(llm, rounds, params, turns=True):
    """Tokens and draft counts of every prompt, in order; each is asked again with its answer."""
    told = []
    for prompts in rounds:
        outputs = llm.generate(prompts, params(len(prompts)))
        if turns:
            longer = [o.prompt_token_ids + o.outputs[0].token_ids + [7, 8, 9] for o in outputs]
            outputs += llm.generate(longer, params(len(prompts)))
        told += [
            (o.outputs[0].token_ids, o.outputs[0].draft.drafted, o.outputs[0].draft.accepted) for o in outputs
        ]
    return told


def greedy_params(count):
    return [SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)] * count


def seeded_params(count):
    return [SamplingParams(temperature=0.9, max_tokens=10, ignore_eos=True, seed=i) for i in range(count)]


def models(name, random_model, drafting_model, request):
    if name in ("hysparse", "hysparse2"):
        return request.getfixturevalue(name)
    kind, _, form = name.partition(" ")
    preset = {"flash": FLASH, "mimo": MIMO}[kind]
    if form == "mtp":
        return drafting_model(preset, heads=3, noise=0.2, strength=0.05)
    return random_model(preset, heads=0)


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("mimo", greedy_params),
        ("mimo", seeded_params),
        ("flash", greedy_params),
        ("mimo mtp", greedy_params),
        ("mimo mtp", seeded_params),
        ("flash mtp", greedy_params),
        ("flash mtp", seeded_params),
        ("hysparse", greedy_params),
        ("hysparse2", greedy_params),
    ],
)
def test_outputs_equal_those_without_reuse(name, params, random_model, drafting_model, make_prompts, request):
    model = models(name, random_model, drafting_model, request)
    rounds = conversations(make_prompts)
    plain = engine(model, prefix_cache=False, **SETTINGS)
    reusing = engine(model, **SETTINGS)
    assert run(reusing, rounds, params) == run(plain, rounds, params)
    stats = reusing.stats()["prefix"]
    assert plain.stats()["prefix"] is None
    # Every second turn can reuse its first; with the shared starts that is well above half of all tokens.
    assert stats["hit_tokens"] > 0.55 * stats["looked_up_tokens"]
    if "mtp" in name:
        assert 0.05 < reusing.stats()["acceptance_by_position"][0] < 0.95


@pytest.mark.parametrize("name", ["mimo mtp", "flash mtp", "flash"])
def test_outputs_stay_equal_while_pages_are_taken_back(
    name, random_model, drafting_model, make_prompts, request
):
    """Six pages for prompts of up to four: hits, evictions and preemptions at once."""
    model = models(name, random_model, drafting_model, request)
    rounds = conversations(make_prompts) * 2
    settings = SETTINGS | {"num_pages": 6, "max_model_len": 384}
    plain = engine(model, prefix_cache=False, **settings)
    reusing = engine(model, **settings)
    assert run(reusing, rounds, greedy_params) == run(plain, rounds, greedy_params)
    stats = reusing.stats()
    assert stats["prefix"]["hit_tokens"] > 0
    assert stats["preemptions"] > 0
    cache = stats["cache"]
    assert (cache["used_pages"], cache["used_slots"]) == (0, 0)
    assert cache["cached_pages"] + cache["free_pages"] == 6
    assert cache["peak_pages"] == 6


def drafts_by_definition(model, tokens):
    """The heads over the whole sequence at once, without caches."""
    n = len(tokens) - 1
    hidden = model.trunk(torch.tensor(tokens[:n]), Sequences.of_lengths([n]))
    known = list(tokens)
    for k in range(model.num_mtp_heads):
        hidden, out = model.mtp(k, hidden, torch.tensor(known[k + 1 : k + 1 + n]), Sequences.of_lengths([n]))
        known.append(int(model.logits(out[-1:]).argmax()))
    return known[n + 1 :]


@pytest.mark.parametrize("is_good", [False, True])
@pytest.mark.parametrize(("name", "first"), [(FLASH, 0), (MIMO, 64)])
@torch.inference_mode()
def test_drafts_after_reuse_are_the_heads_own(
    name, first, is_good, random_model, drafting_model, make_prompts, greedy
):
    """Branches right behind a page border, where the heads' last rows lean on tokens of the next page."""
    if is_good:  # many drafts are accepted; but such heads hardly look at earlier rows
        model = drafting_model(name, heads=3, noise=0.15, strength=0.05)
    else:
        model = random_model(name, heads=3)
    llm = engine(model, max_num_seqs=8, max_model_len=400)
    start, *tails = make_prompts([130, 1, 2, 40, 62])
    whole = start + tails[3]
    llm.generate(whole, greedy(20))
    prompts = [start[:cut] + tail for cut in (128, 129, 130) for tail in tails]
    prompts += [whole[:131], whole[:133], whole[:140]]  # the window reaches back over the border
    compared, reused = 0, []
    for prompt in prompts:
        request = llm.add(prompt, greedy(8))
        while llm.has_work:
            for one in llm.step():
                if one.drafts and one.finish_reason is None:
                    assert one.drafts == drafts_by_definition(model, one.tokens)
                    compared += 1
        reused.append(request.output().num_cached_tokens)
    # Page two ends with 128 and its heads have seen three tokens more; only the last four prompts have those.
    assert reused == [first, *[64] * 10, *[128] * 4]
    assert compared > 15


def cached_tokens(llm, prompt, count=3):
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    return llm.generate([prompt], params)[0].num_cached_tokens


def test_full_pages_are_reused_and_one_token_is_computed(random_model, make_prompts):
    llm = engine(random_model(MIMO, heads=0), max_model_len=400)
    (prompt,) = make_prompts([200])
    assert cached_tokens(llm, prompt) == 0
    assert cached_tokens(llm, prompt) == 192
    assert cached_tokens(llm, prompt[:192]) == 128
    assert cached_tokens(llm, prompt[:193]) == 192
    assert cached_tokens(llm, prompt[:100] + prompt) == 64
    assert cached_tokens(llm, [*prompt[:10], 5, *prompt[11:]]) == 0
    stats = llm.stats()["prefix"]
    assert stats["hit_tokens"] == 192 + 128 + 192 + 64
    assert stats["looked_up_tokens"] == 200 + 200 + 192 + 193 + 300 + 200


def test_drafts_look_as_many_tokens_further(random_model, make_prompts):
    """Row 191 of the third head read token 194, so page three is the same only where that is the same."""
    llm = engine(random_model(MIMO, heads=3), max_model_len=400)
    (prompt,) = make_prompts([200])
    cached_tokens(llm, prompt, 8)
    assert cached_tokens(llm, prompt[:194], 8) == 128
    assert cached_tokens(llm, prompt[:195], 8) == 192
    assert cached_tokens(llm, [*prompt[:194], 5], 8) == 128


def test_windows_are_kept_at_the_end_of_prompts_where_they_branch_and_in_answers(random_model, make_prompts):
    llm = engine(random_model(FLASH, heads=0), max_model_len=512)
    start, a, b, c = make_prompts([150, 100, 110, 120])
    assert cached_tokens(llm, start + a) == 0  # kept at 192
    assert cached_tokens(llm, start + a) == 192
    assert cached_tokens(llm, start + b) == 0  # the pages match up to 128, but no window is there; now one is
    assert cached_tokens(llm, start + c) == 128
    assert llm.stats()["prefix"]["anchors"] == 4
    first = llm.generate([a], SamplingParams(temperature=0, max_tokens=180, ignore_eos=True))[0]
    turn = a + first.outputs[0].token_ids + [3, 4]
    assert cached_tokens(llm, turn) == 256  # 279 rows are known; the windows at 128 and 192 have made room
    assert llm.stats()["prefix"]["anchors"] == 4 + 2  # at 64, where the prompt ends, and at 256


def test_equal_prompts_that_arrive_together_are_read_once(random_model, make_prompts, greedy):
    for name in (MIMO, FLASH):
        llm = engine(random_model(name, heads=0), max_num_seqs=8, max_model_len=400)
        (prompt,) = make_prompts([200])
        outputs = llm.generate([prompt] * 8, greedy(5))
        assert [output.num_cached_tokens for output in outputs] == [0] + [192] * 7
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
        assert llm.stats()["cache"]["peak_pages"] == 3 + 8  # three shared, and the last page of each


@pytest.mark.parametrize(("name", "kept"), [(MIMO, 256), (FLASH, 256)])
def test_preempted_requests_take_up_their_own_rows(name, kept, random_model, make_prompts, greedy):
    model = random_model(name, heads=0)
    llm = engine(model, max_model_len=400)
    (prompt,) = make_prompts([200])
    request = llm.add(prompt, greedy(80))
    while request.num_generated < 70:
        llm.step()
    llm.scheduler._preempt(request)
    llm.step()
    assert llm.stats()["prefix"]["hit_tokens"] == kept  # of 269 rows
    while llm.has_work:
        llm.step()
    output = request.output()
    assert output.num_cached_tokens == 0  # none of the prompt, when it first started
    plain = engine(model, prefix_cache=False, max_model_len=400)
    assert output.outputs[0].token_ids == plain.generate([prompt], greedy(80))[0].outputs[0].token_ids


def test_waiting_for_a_prompt_ends_with_its_reader(random_model, make_prompts, greedy):
    llm = engine(random_model(MIMO, heads=0), max_num_seqs=4, max_model_len=400, max_num_batched_tokens=32)
    (prompt,) = make_prompts([200])
    first, second = llm.add(prompt, greedy(5)), llm.add(prompt, greedy(5))
    llm.step()
    assert (first.entry is not None, second.entry) == (True, None)
    llm.abort(first)
    llm.step()
    assert second.entry is not None
    while llm.has_work:
        llm.step()
    assert second.finish_reason == "length"


def test_prompt_logprobs_compute_every_row(random_model, make_prompts):
    llm = engine(random_model(FLASH, heads=0), max_model_len=400)
    (prompt,) = make_prompts([200])
    cached_tokens(llm, prompt)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
    output = llm.generate([prompt], params)[0]
    assert output.num_cached_tokens == 0
    assert len(output.prompt_logprobs) == 200
    assert cached_tokens(llm, prompt) == 192


def test_new_weights_forget_everything(random_model, make_prompts, greedy):
    llm, other = engine(random_model(FLASH), max_model_len=400), random_model(FLASH, seed=1)
    (prompt,) = make_prompts([200])
    cached_tokens(llm, prompt, 8)
    assert cached_tokens(llm, prompt, 8) == 192
    llm.update_weights(WeightUpdate(1, other.state_dict()))
    assert llm.stats()["prefix"]["anchors"] == llm.stats()["prefix"]["anchor_bytes"] == 0
    assert llm.stats()["cache"]["cached_pages"] == 0
    output = llm.generate([prompt], greedy(8))[0]
    assert output.num_cached_tokens == 0
    plain = engine(other, prefix_cache=False, max_model_len=400)
    assert output.outputs[0].token_ids == plain.generate([prompt], greedy(8))[0].outputs[0].token_ids


def test_weights_that_a_trainer_changes_in_place_are_noticed(random_model, make_prompts, greedy):
    model = random_model(MIMO, heads=0)
    llm = engine(model, max_model_len=400)
    (prompt,) = make_prompts([200])
    cached_tokens(llm, prompt)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    output = llm.generate([prompt], greedy(8))[0]
    assert output.num_cached_tokens == 0
    plain = engine(model, prefix_cache=False, max_model_len=400)
    assert output.outputs[0].token_ids == plain.generate([prompt], greedy(8))[0].outputs[0].token_ids


# Integer attention over rings rounds P by the chunk's first row: only floats give the same tokens there.
INT8_CASES = [("mimo", "float"), ("flash", "float"), ("flash mtp", "float"), ("mimo", "int8")]


@pytest.mark.parametrize(("name", "attention"), INT8_CASES)
def test_int8_rows_are_reused_where_their_means_are_the_same(
    name, attention, random_model, drafting_model, make_prompts, request
):
    model = models(name, random_model, drafting_model, request)
    start, a, b, short = make_prompts([280, 90, 70, 200])
    rounds = [[start + a], [start + a, start + b], [short, start[:270]]]
    # First chunks are whole, so that the means do not depend on the neighbours.
    settings = SETTINGS | {"max_num_batched_tokens": 1200, "kv_cache_dtype": "int8", "attention": attention}
    plain = engine(model, prefix_cache=False, **settings)
    reusing = engine(model, **settings)
    assert run(reusing, rounds, greedy_params) == run(plain, rounds, greedy_params)
    assert reusing.stats()["prefix"]["hit_tokens"] > 800
    assert cached_tokens(reusing, short + a) == 0  # 200 shared tokens, but the mean is over 256
    assert cached_tokens(reusing, start + [5] * 9) == 256


def test_int8_rows_with_the_mean_of_a_short_first_chunk_are_not_kept(random_model, make_prompts):
    llm = engine(
        random_model(MIMO, heads=0), max_model_len=400, max_num_batched_tokens=100, kv_cache_dtype="int8"
    )
    (prompt,) = make_prompts([330])
    assert [cached_tokens(llm, prompt) for _ in range(2)] == [0, 0]
    assert llm.stats()["cache"]["cached_pages"] == 0


def test_it_is_off_with_a_reason(random_model, caplog):
    caplog.set_level(logging.INFO, "sateen.engine")
    assert engine(random_model(FLASH), record_routing=True).prefix is None
    assert "routing or lists of every token are recorded" in caplog.text
    assert engine(random_model(FLASH, hybrid_layer_pattern=[1] * 6), max_model_len=64).prefix is None
    assert "no layer keeps all rows" in caplog.text
    assert engine(random_model(FLASH), prefix_cache=False).prefix is None


# The index on its own, without a model.

PAGED, RING = KVLayout("paged", 1, 1, 1), KVLayout("ring", 1, 1, 1, window=5)


def fill(cache, prefix, request, entry, count):
    """Appends rows that hold their position, as one step would."""
    start = entry.length
    assert cache.reserve(entry, start + count)
    view = cache.forward([entry], [count])
    rows = torch.arange(start, start + count, dtype=torch.float32).view(-1, 1, 1)
    for layer in range(len(cache.layouts)):
        view.layer(layer).extend(rows, -rows)
    prefix.advance(request, entry, start + count, samples=entry.length == len(request.tokens))


def start(cache, prefix, tokens, number=0):
    request = Request(number, SamplingParams(), list(tokens), len(tokens), 50)
    hit = prefix.match(request)
    entry = cache.open()
    prefix.begin(request, entry, hit)
    return request, entry


def test_the_oldest_windows_go_first_and_with_their_pages():
    cache = KVCache(((PAGED,), (RING,)), num_trunk_layers=2, num_pages=6, num_slots=3, max_model_len=400)
    size = window_bytes(cache)
    assert size == 4 * 2 * 4  # four rows of a key and a value in float32
    prefix = PrefixCache(cache, max_anchor_bytes=2 * size)
    for number in range(3):
        request, entry = start(cache, prefix, [number] * 70)
        fill(cache, prefix, request, entry, prefix.room(entry, 70))
        assert entry.length == 64  # the chunk ends where a window is wanted
        fill(cache, prefix, request, entry, prefix.room(entry, 6))
        prefix.end(entry)
        cache.free(entry)
    assert prefix.stats()["anchors"] == 2
    assert prefix.stats()["anchor_bytes"] == 2 * size
    assert prefix.stats()["cached_pages"] == 3
    assert len(prefix.match(Request(9, SamplingParams(), [0] * 70, 70, 5)).pages) == 0
    hit = prefix.match(Request(9, SamplingParams(), [2] * 70, 70, 5))
    assert len(hit.pages) == 1
    assert hit.anchor.trunk[0].flatten().tolist() == [60, 61, 62, 63]
    taken = cache.open()
    assert cache.reserve(taken, 6 * PAGE)
    assert prefix.stats() | {"looked_up_tokens": 0} == {
        "looked_up_tokens": 0, "hit_tokens": 0, "cached_pages": 0, "anchors": 0, "anchor_bytes": 0,
        "max_anchor_bytes": 2 * size,
    }  # fmt: skip
    assert prefix.match(Request(9, SamplingParams(), [2] * 70, 70, 5)).pages == []


def test_windows_move_between_rings_of_any_phase():
    layouts = ((PAGED,), (RING,), (RING,))
    cache = KVCache(layouts, num_trunk_layers=2, num_pages=8, num_slots=3, max_model_len=400, num_draft=2)
    assert [cache.pools[i, "kv"].ring_rows for i in (1, 2)] == [7, 9]
    a, b = cache.open(), cache.open()
    for end in (1, 4, 5, 13):
        for layer, ring in ((1, 7), (2, 9)):
            pool = cache.pools[layer, "kv"]
            pool.k_RKH.fill_(torch.nan)
            for position in range(max(0, end - ring), end):
                pool.k_RKH[a.slot * ring + position % ring] = position
        for heads in (False, True):
            copies = copy_window(cache, a, end, heads=heads)
            assert copies[0].flatten().tolist() == list(range(max(0, end - 4), end))
            paste_window(cache, b, end, copies, heads=heads)
        for layer, ring in ((1, 7), (2, 9)):
            pool = cache.pools[layer, "kv"]
            got = [float(pool.k_RKH[b.slot * ring + p % ring]) for p in range(max(0, end - 4), end)]
            assert got == list(range(max(0, end - 4), end))
    assert keeps_window(cache, 10, 13, heads=False)
    assert not keeps_window(cache, 10, 14, heads=False)
    assert keeps_window(cache, 10, 15, heads=True)
    assert not keeps_window(cache, 10, 16, heads=True)
    assert keeps_window(cache, 3, 7, heads=False)
