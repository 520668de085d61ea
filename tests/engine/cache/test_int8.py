"""Int8 rows and int8 attention in the engine: what rows hold, their bytes, how close outputs stay."""

from __future__ import annotations

import pytest
import torch

from sateen import ops
from sateen.engine.cache.kv_cache import PAGE, KVCache, page_bytes
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import BackendUnavailable
from sateen.nn.spec import KVLayout

WINDOW, DRAFT = 9, 3
PAGED = KVLayout("paged", 2, 8, 4)
RING = KVLayout("ring", 1, 4, 8, window=WINDOW)


def make(layouts=((PAGED,), (RING,)), **changes):
    settings = {"num_trunk_layers": 2, "max_model_len": 400, "num_draft": DRAFT, "num_pages": 7}
    return KVCache(layouts, **(settings | {"num_slots": 3, "dtype": torch.int8} | changes))


def numbers(count, layout, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(count, layout.num_kv_heads, layout.head_dim, generator=generator) + 3
    return k.to(dtype), torch.randn(count, layout.num_kv_heads, layout.v_head_dim, generator=generator).to(
        dtype
    )


def append(cache, entry, data, counts, layer):
    """The visible rows after the last of several chunks."""
    start = entry.length
    for count in counts:
        cache.reserve(entry, start + count)
        view = cache.forward([entry], [count]).layer(layer)
        k, v, _ = view.extend(*(x[start : start + count] for x in data))
        start += count
    return k, v


@pytest.mark.parametrize(("layer", "layout"), [(0, PAGED), (1, RING)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_the_written_ones_within_half_a_code(layer, layout, dtype):
    data = numbers(150, layout, dtype=dtype)
    cache = make()
    got = append(cache, cache.open(), data, [100, 1, 4, 45], layer)
    for x, rows, centre in zip(data, got, (data[0][:100].float().mean(0), 0.0), strict=True):
        assert rows.dtype == dtype
        want = x[-len(rows) :].float()
        step = (want - centre).abs().amax(-1, keepdim=True) / 127
        slack = 1e-5 if dtype == torch.float32 else 2**-8 * float(want.abs().max())
        assert ((rows.float() - want).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize(("layer", "layout"), [(0, PAGED), (1, RING)])
def test_rows_do_not_depend_on_the_chunks_behind_the_first(layer, layout):
    data = numbers(150, layout)
    results = []
    for counts in ([150], [40, 110], [33, 1, 1, 100, 15]):
        cache = make()
        k, v = append(cache, cache.open(num_prompt=33), data, counts, layer)
        results.append((k[-WINDOW:], v[-WINDOW:]))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_mean_is_frozen_until_the_first_row_is_written_again():
    cache = make(num_slots=1)
    data, other = numbers(80, PAGED), numbers(80, PAGED, seed=1)
    entry = cache.open()
    first, _ = append(cache, entry, data, [50, 30], 0)
    mean = cache.pools[0, "kv"].scales.k_mean_LKH[0].clone()
    assert torch.allclose(mean, data[0][:50].mean(0))
    cache.truncate(entry, 60)
    again, _ = append(cache, entry, data, [20], 0)
    assert torch.equal(first, again)
    assert torch.equal(cache.pools[0, "kv"].scales.k_mean_LKH[0], mean)
    cache.free(entry)
    append(cache, cache.open(num_prompt=7), other, [20], 0)
    assert torch.allclose(cache.pools[0, "kv"].scales.k_mean_LKH[0], other[0][:7].mean(0))


def test_sequences_of_a_batch_keep_their_own_means():
    cache = make()
    data = [numbers(20, PAGED, seed) for seed in range(3)]
    entries = [cache.open() for _ in data]
    alone = [append(make(), make().open(), each, [20], 0) for each in data]
    for entry in entries:
        cache.reserve(entry, 20)
    view = cache.forward(entries, [20] * 3).layer(0)
    k, v, cu = view.extend(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    assert cu.tolist() == [0, 20, 40, 60]
    assert torch.equal(k, torch.cat([each[0] for each in alone]))
    assert torch.equal(v, torch.cat([each[1] for each in alone]))


def test_bytes_count_codes_scales_and_means():
    cache = make()
    paged_row, ring_row = 2 * (8 + 4) + 2 * 8, (4 + 8) + 8
    means = 2 * 8 * 4, 1 * 4 * 4
    paged = 7 * PAGE * paged_row + 3 * means[0]
    ring = 3 * (WINDOW + DRAFT) * ring_row + 3 * means[1]
    assert cache.allocated_bytes() == {"paged": paged, "ring": ring}
    assert cache.allocated_bytes_by_layer() == [paged, ring]
    assert page_bytes(cache.layouts, torch.int8) == PAGE * paged_row
    held = [x for pool in cache.pools.values() for x in (pool.k_RKH, pool.v_RKV, *pool.scales)]
    assert sum(x.nbytes for x in held) == paged + ring
    assert cache.kv_bytes(65) == {"paged": 2 * PAGE * paged_row + means[0], "ring": ring // 3}


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
@pytest.mark.parametrize(("layer", "layout"), [(0, PAGED), (1, RING)])
def test_attend_runs_integer_attention_over_the_rows(dtype, layer, layout):
    """What the operator gives for the same numbers, whatever the layout; not what float attention gives."""
    data = numbers(40, layout)
    q = torch.randn(6, 2, layout.head_dim, generator=torch.Generator().manual_seed(9))
    outs = {}
    for attention in ("float", "int8"):
        cache = make(dtype=dtype, attention=attention)
        entry = cache.open()
        cache.reserve(entry, 40)
        cu_q = torch.tensor([0, 34], dtype=torch.int32)
        queries = torch.zeros(34, 2, layout.head_dim)
        view = cache.forward([entry], [34]).layer(layer)
        view.attend(queries, *(x[:34] for x in data), cu_seqlens_q=cu_q, window=layout.window)
        view = cache.forward([entry], [6]).layer(layer)
        outs[attention] = view.attend(
            q,
            *(x[34:] for x in data),
            cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32),
            window=layout.window,
        )
    want = ops.attention(
        q, *data, cu_seqlens_q=torch.tensor([0, 6]), cu_seqlens_k=torch.tensor([0, 40]), window=layout.window
    )
    gaps = {name: float((out - want).norm() / want.norm()) for name, out in outs.items()}
    assert gaps["float"] < (0.02 if dtype == torch.int8 else 1e-5)
    assert max(1e-4, gaps["float"]) < gaps["int8"] < 0.04


FORMS = [("float", "int8"), ("int8", "int8"), ("int8", "auto")]


@pytest.mark.parametrize(("attention", "dtype"), FORMS)
@pytest.mark.parametrize("name", ["flash", "mimo"])
def test_logprobs_stay_close_to_float32(name, attention, dtype, request, make_prompts):
    """Random weights of deviation 0.1; the bound is for all tokens of a prompt's continuation."""
    model = request.getfixturevalue(name)
    prompts = make_prompts([150, 40, 7])
    plain = LLM(model, draft="none", max_model_len=256).generate(
        prompts, SamplingParams(temperature=0, max_tokens=6, logprobs=0, ignore_eos=True)
    )
    llm = LLM(model, draft="none", max_model_len=256, attention=attention, kv_cache_dtype=dtype)
    gaps = []
    for prompt, output in zip(prompts, plain, strict=True):
        # The float model's tokens are forced one by one, so that a flipped one does not end the comparison.
        tokens = output.outputs[0].token_ids
        forced = [[*prompt, *tokens[:i]] for i in range(len(tokens))]
        got = llm.generate(forced, SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True))
        for i, one in enumerate(got):
            table = one.outputs[0].logprobs[0]
            if tokens[i] in table:
                gaps.append(abs(table[tokens[i]].logprob - output.outputs[0].token_logprobs[i]))
    assert len(gaps) == 18
    assert 0 < max(gaps) < 0.04


@pytest.mark.parametrize(("attention", "dtype"), FORMS)
def test_greedy_tokens_of_a_settled_model_are_those_of_float32(
    attention, dtype, drafting_model, make_prompts, tokens_of, greedy
):
    model = drafting_model("mimo-v2-flash-tiny", noise=0.01)
    prompts = make_prompts([90, 33, 5], vocab_size=320)
    want = tokens_of(LLM(model, draft="none", max_model_len=160), prompts, greedy(24))
    for draft in ("none", "mtp"):
        llm = LLM(model, draft=draft, max_model_len=160, attention=attention, kv_cache_dtype=dtype)
        assert tokens_of(llm, prompts, greedy(24)) == want
    assert llm.stats()["acceptance_length"] > 2


def test_preemption_changes_nothing_and_a_short_first_chunk_little(mimo, make_prompts):
    """The mean is the prompt's and rows are quantised one by one: computed again, they are the same.

    A mean over other rows moves the log-probabilities by thousandths.
    """
    prompts = make_prompts([60, 58, 61])
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0, ignore_eos=True)
    settings = {"draft": "none", "max_model_len": 128, "kv_cache_dtype": "int8"}
    calm, tight = LLM(mimo, **settings), LLM(mimo, num_pages=4, **settings)
    chunked = LLM(mimo, max_num_batched_tokens=64, **settings)
    want, *others = (
        [out.outputs[0] for out in llm.generate(prompts, params)] for llm in (calm, tight, chunked)
    )
    assert (calm.stats()["preemptions"], tight.stats()["preemptions"] > 0) == (0, True)
    for a, b in zip(want, others[0], strict=True):
        assert a.token_ids == b.token_ids
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=2e-4)
    # The budget cuts the second and third prompt's first chunk short, and with it their means.
    for a, b in zip(want, others[1], strict=True):
        assert a.token_logprobs[0] == pytest.approx(b.token_logprobs[0], abs=0.02)


def test_int8_rows_take_a_quarter_of_float32_and_the_scales(flash):
    full, small = (LLM(flash, max_model_len=128, kv_cache_dtype=dtype) for dtype in ("fp32", "int8"))
    for kind, size in full.kv_bytes(128).items():
        pools = [pool for pool in small.cache.pools.values() if pool.layout.kind == kind]
        rows = [pool.ring_rows or 128 for pool in pools]
        heads = [pool.layout.num_kv_heads for pool in pools]
        scales = sum(n * 8 * h for n, h in zip(rows, heads, strict=True))
        means = sum(pool.layout.head_dim * h * 4 for pool, h in zip(pools, heads, strict=True))
        assert small.kv_bytes(128)[kind] == size // 4 + scales + means


def test_layers_that_read_their_own_rows_refuse_int8_attention():
    cache = make(attention="int8")
    view = cache.forward([cache.open()], [2]).layer(1)
    with pytest.raises(BackendUnavailable, match="attention 'int8' cannot serve layer 1"):
        view.extend(*numbers(2, RING))


@pytest.mark.parametrize("name", ["hysparse", "hysparse2"])
def test_sparse_layers_read_shared_int8_rows_and_refuse_int8_attention(name, request, make_prompts):
    model = request.getfixturevalue(name)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    prompts = make_prompts([130], vocab_size=model.config.vocab_size)
    results = []
    for dtype in ("fp32", "int8"):
        (output,) = LLM(model, max_model_len=160, kv_cache_dtype=dtype).generate(prompts, params)
        results.append(output.outputs[0].token_logprobs[0])
    assert 0 < abs(results[0] - results[1]) < 0.04
    with pytest.raises(BackendUnavailable, match="attention 'int8' cannot serve layer"):
        LLM(model, max_model_len=160, attention="int8")
