"""Rows in host memory: which blocks are staged, and tokens as without offloading. On a CPU only."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.engine.cache.forward_cache import ForwardCache
from sateen.engine.cache.prefetch import Coming, Lane
from sateen.engine.cache.staging import stage_blocks
from sateen.engine.engine import LLM
from sateen.errors import ConfigError


def test_blocks_are_staged_in_order_and_queries_keep_theirs():
    """Worked by hand: blocks of 4; the first sequence has 14 keys and 2 queries, the second 5 and 1."""
    lists = torch.tensor([[[0, 2], [2, -1], [0, -1]], [[2, -1], [0, 3], [-1, -1]]], dtype=torch.int32)
    stage = stage_blocks(lists, [2, 1], [14, 5], 4)
    # Blocks 0 and 2 are chosen; block 3 holds the queries at 12 and 13. The second keeps 0 and the query's 1.
    assert [at.tolist() for at in stage.positions] == [[0, 1, 2, 3, 8, 9, 10, 11, 12, 13], [0, 1, 2, 3, 4]]
    assert stage.lists_KTn.tolist() == [[[0, 1], [1, -1], [0, -1]], [[1, -1], [0, 2], [-1, -1]]]
    assert stage.lists_KTn.dtype == torch.int32


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("queries", "lengths"), [([1, 3], [90, 33]), ([40, 1], [40, 64]), ([7, 5], [65, 5])])
def test_attention_over_staged_blocks_is_attention_over_all(block_size, queries, lengths):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(sum(queries), 4, 8, generator=generator)
    k, v = (torch.randn(sum(lengths), 2, 8, generator=generator) for _ in range(2))
    lists = torch.full((2, sum(queries), 6), -1, dtype=torch.int32)
    row = 0
    for count, length in zip(queries, lengths, strict=True):
        for t in range(count):
            seen = (length - count + t) // block_size + 1
            for head in range(2):
                some = torch.randperm(seen, generator=generator)[:6].sort().values
                lists[head, row, : len(some)] = some.int()
            row += 1

    def offsets(counts):
        return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)

    stage = stage_blocks(lists, queries, lengths, block_size)
    starts = np.cumsum([0, *lengths])
    rows = torch.from_numpy(np.concatenate([s + at for s, at in zip(starts, stage.positions, strict=False)]))
    options = {"block_size": block_size, "cu_seqlens_q": offsets(queries)}
    want = ops.block_sparse_attention(q, k, v, lists, cu_seqlens_k=offsets(lengths), **options)
    staged = offsets([len(at) for at in stage.positions])
    got = ops.block_sparse_attention(q, k[rows], v[rows], stage.lists_KTn, cu_seqlens_k=staged, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 24}, {"num_pages": 5, "max_num_batched_tokens": 90}],
    ids=["whole prompts", "chunks", "tight"],
)
@pytest.mark.parametrize("name", ["hysparse-tiny", "hysparse2-tiny"])
@pytest.mark.parametrize("prefetches", [False, True], ids=["", "prefetched"])
def test_tokens_are_those_without_offloading(
    prefetches, name, settings, drafting_model, make_prompts, tokens_of, greedy
):
    small = {"sparse_topk_tokens": 32} if name == "hysparse-tiny" else {"mtp_intermediate_size": 48}
    model = drafting_model(name, heads=2, noise=0.25, strength=0.1, **small)
    start, a, b = make_prompts([140, 50, 9])
    prompts = [start + a, b, start + b, a]
    settings = {"draft": "mtp", "max_num_seqs": 3, "max_model_len": 300} | settings
    plain = LLM(model, **settings)
    away = LLM(model, kv_offload=True, kv_prefetch=prefetches, **settings)
    assert tokens_of(away, prompts, greedy(16)) == tokens_of(plain, prompts, greedy(16))
    assert away.stats()["host_bytes"] == away.stats()["allocated_bytes"]["paged"] > 0
    assert plain.stats()["host_bytes"] == 0


def test_sparse_layers_get_the_chosen_blocks_alone(random_model, make_prompts, greedy, monkeypatch):
    """Two key/value heads of two blocks of 16, and the block of the query: 80 keys of 500."""
    model = random_model("hysparse-tiny", sparse_topk_tokens=32)
    lent, lend = [], ForwardCache.lend

    def watched(self, index, name, lists, seq, block_size):
        found = lend(self, index, name, lists, seq, block_size)
        lent.append((index, self.counts[0], len(self._published[index, name][0])))
        return found

    monkeypatch.setattr(ForwardCache, "lend", watched)
    llm = LLM(model, kv_offload=True, max_model_len=600, max_num_seqs=1)
    llm.generate(make_prompts([500]), greedy(9))
    decoding = [rows for _, count, rows in lent if count == 1]
    assert len(decoding) == 2 * 8
    assert {index for index, _, _ in lent} == {0, 3}
    assert max(decoding) <= 80
    assert min(decoding) > 16


def test_models_without_lists_only_move_their_pages(random_model, make_prompts, tokens_of, greedy):
    model = random_model("mimo-v2-flash-tiny", heads=0)
    prompts = make_prompts([70, 5])
    away = LLM(model, kv_offload=True, step="torch")
    assert tokens_of(away, prompts, greedy(8)) == tokens_of(LLM(model, step="torch"), prompts, greedy(8))


def test_int8_rows_cannot_be_offloaded(hysparse):
    with pytest.raises(ConfigError, match="kv_offload keeps rows as floats, and kv_cache_dtype is int8"):
        LLM(hysparse, kv_offload=True, kv_cache_dtype="int8")


def test_blocks_come_while_the_oracle_goes_on(random_model, make_prompts, greedy, monkeypatch):
    """Asked for inside an oracle's attention, awaited by the first sparse layer of its block, once."""
    model = random_model("hysparse-tiny", sparse_topk_tokens=32)
    events: list[str] = []
    fetch, wait, bring = Lane.fetch, Coming.wait, Lane._bring
    held = threading.Event()

    def watched_fetch(self, *args):
        events.append("asked")
        held.clear()
        return fetch(self, *args)

    def late_bring(self, *args):
        assert threading.current_thread() is not threading.main_thread()
        assert held.wait(30)  # until the oracle's MLP is done: nothing before it may need the rows
        return bring(self, *args)

    def watched_wait(self):
        events.append("awaited")
        return wait(self)

    monkeypatch.setattr(Lane, "fetch", watched_fetch)
    monkeypatch.setattr(Lane, "_bring", late_bring)
    monkeypatch.setattr(Coming, "wait", watched_wait)

    def after_mlp(name):
        events.append(name)
        held.set()

    for i, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, name=f"attention {i}": events.append(name))
        layer.mlp.register_forward_hook(lambda *_, name=f"mlp {i}": after_mlp(name))
    llm = LLM(model, kv_offload=True, kv_prefetch=True, max_model_len=300, max_num_seqs=1)
    llm.generate(make_prompts([200]), greedy(2))
    block = [["asked", f"attention {i}", f"mlp {i}", "awaited", f"attention {i + 1}", f"mlp {i + 1}",
              f"attention {i + 2}", f"mlp {i + 2}"] for i in (0, 3)]  # fmt: skip
    forward = [*block[0], *block[1], "attention 6", "mlp 6"]
    rounds, rest = divmod(len(events), len(forward))
    assert rest == 0
    assert rounds > 1
    assert events == forward * rounds


def test_rows_are_read_before_they_are_written_again():
    """`drain` returns once the host has read the rows, whether or not somebody waited for them."""
    lane, pool = Lane(torch.device("cpu")), torch.arange(6.0).view(3, 2)
    coming = lane.fetch([pool, pool], torch.tensor([2, 0]), torch.bfloat16)
    lane.drain()
    pool.zero_()
    first, second = coming.wait()
    assert first.dtype == torch.bfloat16
    assert first.tolist() == second.tolist() == [[4.0, 5.0], [0.0, 1.0]]
    failed = lane.fetch([pool], torch.tensor([9]), torch.float32)
    lane.drain()
    with pytest.raises(IndexError):
        failed.wait()


def test_prefetching_needs_offloading(hysparse):
    with pytest.raises(ConfigError, match="use both or neither"):
        LLM(hysparse, kv_prefetch=True)
