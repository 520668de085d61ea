"""HySparse in the engine: tokens, lists under drafts, what reuse keeps, bytes, against whole forwards."""

from __future__ import annotations

import pytest
import torch

from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.engine import LLM
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences

SMALL = {
    "hysparse-tiny": {"hidden_size": 64, "intermediate_size": 96, "sparse_topk_tokens": 32},
    "hysparse2-tiny": {"mtp_intermediate_size": 48},
}
TIGHT = {"num_pages": 5, "max_model_len": 300, "max_num_batched_tokens": 40}


@pytest.fixture(scope="module", params=SMALL)
def model(request, drafting_model):
    """With three MTP heads whose drafts are right now and then, and contexts beyond window and budget."""
    return drafting_model(request.param, heads=3, noise=0.25, strength=0.1, **SMALL[request.param])


@pytest.fixture(scope="module")
def asked(model, make_prompts, greedy_by_hand):
    """Prompts, three of which begin alike, and their greedy answers."""
    start, a, b, c = make_prompts([140, 30, 9, 60])
    prompts = [start + a, start + b, b, c, start[:133]]
    return prompts, [greedy_by_hand(model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("draft", ["none", "mtp"])
@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 17}, TIGHT, {"step": "torch"}])
def test_greedy_tokens_are_those_of_whole_forwards(model, asked, draft, settings, tokens_of, greedy):
    """Whole and chunked prompts, preemption, prompts that begin alike, answers taken up again."""
    prompts, want = asked
    for reuses in (False, True):
        llm = LLM(
            model, draft=draft, prefix_cache=reuses, max_num_seqs=3, **({"max_model_len": 300} | settings)
        )
        got = tokens_of(llm, prompts[:1], greedy(12)) + tokens_of(llm, prompts[1:], greedy(12))
        assert got == want
        turn = prompts[0] + want[0][:8]
        assert tokens_of(llm, [turn], greedy(4)) == [want[0][8:]]
        stats = llm.stats()
        if reuses and settings is not TIGHT:
            assert stats["prefix"]["hit_tokens"] >= 3 * 128
            assert stats["prefix"]["anchors"] > 0
        if draft == "mtp":
            assert 0.05 < stats["acceptance_by_position"][0] < 0.98
        if not reuses:
            assert bool(stats["preemptions"]) == (settings is TIGHT)


@torch.inference_mode()
def test_every_draft_has_its_own_lists_and_rejected_ones_leave_none(model, make_prompts):
    """Three drafts are four lists; the rings have room for them and forget them."""
    (tokens,) = make_prompts([100])
    whole = LayerLinks()
    model.trunk(torch.tensor(tokens), Sequences.of_lengths([100]), links=whole)
    config = model.config
    cache = KVCache(
        config.kv_layouts(), num_trunk_layers=config.num_hidden_layers, num_pages=2, num_slots=1,
        max_model_len=128, num_draft=3,
    )  # fmt: skip
    window = config.raw["sliding_window"]
    assert {
        pool.ring_rows for (i, _), pool in cache.pools.items() if pool.ring_rows and i < len(config.specs)
    } == {window + 3}
    entry, at = cache.open(), 0
    for right in (40, *[4, 1, 2, 3] * 6):
        wrong = 0 if at == 0 else 4 - right
        ids = tokens[at : at + right] + [7] * wrong
        assert cache.reserve(entry, at + len(ids))
        seq = Sequences(Sequences.of_lengths([len(ids)]).cu_seqlens, at + torch.arange(len(ids)))
        links = LayerLinks()
        model.trunk(torch.tensor(ids), seq, cache.forward([entry], [len(ids)]), links)
        assert set(links.selections) == set(whole.selections)
        for layer, lists_KTn in links.selections.items():
            assert lists_KTn.shape[1] == len(ids)
            assert torch.equal(lists_KTn[:, :right], whole.selections[layer][:, at : at + right])
        at += right
        cache.truncate(entry, at)


@torch.inference_mode()
def test_full_rows_and_the_newest_of_every_ring_are_all_that_a_prefix_needs(
    model, make_prompts, tokens_of, greedy
):
    """Everything else is overwritten with NaN before a second prompt takes up the first one's rows."""
    (tokens,) = make_prompts([150])
    llm = LLM(model, draft="mtp", max_num_seqs=1, max_model_len=256)
    llm.generate([tokens[:140]])
    (anchor,) = llm.prefix.anchors.values()
    kinds = [layout for group in model.config.kv_layouts() for layout in group]
    rings = [layout for layout in kinds if layout.kind == "ring"]
    assert len(anchor.trunk) + len(anchor.heads) == 2 * len(rings)
    assert {len(copy) for copy in anchor.trunk} == {model.config.raw["sliding_window"] - 1}
    for pool in llm.cache.pools.values():
        kept = slice(128, None) if pool.ring_rows == 0 else slice(None)
        pool.k_RKH[kept] = pool.v_RKV[kept] = torch.nan
    (output,) = llm.generate([tokens], greedy(6))
    assert output.num_cached_tokens == 128
    plain = LLM(model, draft="none", prefix_cache=False, max_model_len=256)
    assert output.outputs[0].token_ids == tokens_of(plain, [tokens], greedy(6))[0]


def test_allocated_bytes_follow_the_formula_at_32k():
    """One full layer in eight: (L_f n + L_s w) rows of K (H + V) numbers, in the model's dtype."""
    kinds = [*(["full_attention"] + ["sparse_attention"] * 7) * 2, "full_attention"]
    raw = preset("hysparse-tiny") | {
        "num_hidden_layers": 17, "layer_types": kinds, "max_position_embeddings": 32768,
    }  # fmt: skip
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0).to(torch.bfloat16)
    llm = LLM(model, max_num_seqs=1)
    n, w, width = 32768, 32, 2 * (32 + 32)
    formula = (3 * n + 14 * w) * width * 2
    allocated = sum(llm.stats()["allocated_bytes"].values())
    assert abs(allocated / formula - 1) < 0.02
    assert sum(llm.kv_bytes(n).values()) == allocated
    pools = sum(pool.k_RKH.nbytes + pool.v_RKV.nbytes for pool in llm.cache.pools.values())
    assert pools == allocated
    full = 17 * n * width * 2
    assert full / allocated == pytest.approx(17 * n / (3 * n + 14 * w), rel=0.02)  # 5.64 here
