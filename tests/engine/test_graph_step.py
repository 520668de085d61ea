"""Static decode steps against the ordinary forward over the same caches, token by token, on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from sateen.engine.cache.kv_cache import PAGE, KVCache
from sateen.engine.graph_step import BATCHES, LEAST_ROWS, GraphStep, graph_step, why_not
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 61, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
HYBRID = {
    "model_type": "mimo_v2_flash", "num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0],
    "sliding_window": 11, "moe_layer_freq": [0, 0, 0, 0], "num_key_value_heads": 2, "head_dim": 12,
    "v_head_dim": 8, "swa_num_key_value_heads": 1, "swa_head_dim": 12, "swa_v_head_dim": 8,
    "partial_rotary_factor": 0.334, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "add_swa_attention_sink_bias": True,
}  # fmt: skip
MODELS = {
    "full attention": {"model_type": "llama"},
    "grouped queries": {"model_type": "qwen3", "num_key_value_heads": 1},
    "sliding windows": {"model_type": "mistral", "sliding_window": 7},
    "hybrid with sinks, narrow values and grouped queries": HYBRID,
}
PROMPTS = (62, 3, 127, 20)  # two of them are about to pass the border of a page


def build(name):
    """Random weights; norms and sinks are not at their neutral values."""
    model = Decoder(ModelConfig.from_hf(TINY | MODELS[name])).init_weights(3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_cache(model, **options):
    return KVCache(
        model.config.kv_layouts(), num_trunk_layers=model.config.num_hidden_layers, num_pages=20,
        num_slots=5, max_model_len=300, **options,
    )  # fmt: skip


class Twins:
    """The same sequences in two caches, one for the ordinary forward and one for static steps."""

    def __init__(self, model, prompts):
        self.model = model
        self.caches = make_cache(model), make_cache(model)
        self.static = GraphStep(model, self.caches[1])
        self.entries = [[cache.open() for _ in prompts] for cache in self.caches]
        self.random = random.Random(5)
        for i, length in enumerate(prompts):
            ids = self.tokens(length)
            for side in (0, 1):
                self.ordinary(side, [i], ids, length)

    def tokens(self, count):
        return [self.random.randrange(TINY["vocab_size"]) for _ in range(count)]

    def view(self, side, chosen, count):
        cache, entries = self.caches[side], [self.entries[side][i] for i in chosen]
        starts = [entry.length for entry in entries]
        for entry in entries:
            assert cache.reserve(entry, entry.length + count)
        return cache.forward(entries, [count] * len(entries)), starts

    def ordinary(self, side, chosen, ids, count=1):
        view, starts = self.view(side, chosen, count)
        positions = torch.tensor([p for start in starts for p in range(start, start + count)])
        offsets = torch.arange(len(chosen) + 1, dtype=torch.int32) * count
        with torch.inference_mode():
            return self.model.trunk(torch.tensor(ids), Sequences(offsets, positions), view)

    def step(self, chosen):
        """Logits after one token more in each chosen sequence, of the ordinary and the static step."""
        ids = self.tokens(len(chosen))
        want = self.ordinary(0, chosen, ids)
        view, _ = self.view(1, chosen, 1)
        assert self.static.fits(view)
        got = self.static.trunk(ids, view)
        with torch.inference_mode():
            return [self.model.logits(self.model.head_input(hidden)) for hidden in (want, got)]

    def assert_same_rows(self):
        for key, pool in self.caches[0].pools.items():
            other = self.caches[1].pools[key]
            for x, y in ((pool.k_RKH, other.k_RKH), (pool.v_RKV, other.v_RKV)):
                torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", [[0], [0, 1, 2, 3]], ids=["one", "four"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_ordinary_forward(name, chosen):
    twins = Twins(build(name), PROMPTS)
    buffers: dict = {}
    for _ in range(PAGE // 4):
        want, got = twins.step(chosen)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for bucket, step in twins.static.steps.items():
            places = [step.ids, step.positions, step.cu_seqlens_q]
            places += [x for rows in step.view.kinds.values() for x in vars(rows).values()]
            assert buffers.setdefault(bucket, [x.data_ptr() for x in places]) == [
                x.data_ptr() for x in places
            ]
    twins.assert_same_rows()
    lengths = [twins.entries[1][i].length for i in chosen]
    assert lengths == [PROMPTS[i] + PAGE // 4 for i in chosen]
    assert lengths[0] > PAGE  # over the border of a page, and more than twice around the rings of 7 and 11
    # The rows of four sequences pass from one bucket into the next.
    full = [bucket for bucket in twins.static.steps if bucket[1]]
    if twins.caches[0].has_pages:
        assert full == ([(1, LEAST_ROWS)] if len(chosen) == 1 else [(4, LEAST_ROWS), (4, 2 * LEAST_ROWS)])
    else:
        assert list(twins.static.steps) == [(len(chosen), 0)]


@pytest.mark.parametrize("name", ["grouped queries", "hybrid with sinks, narrow values and grouped queries"])
def test_idle_lanes_change_nothing(name):
    twins = Twins(build(name), PROMPTS)
    for chosen in ([0, 1, 2], [3, 0], [2], [1, 2, 3], [0, 1, 2, 3], [3, 2, 1], [1], [0, 3]):
        want, got = twins.step(chosen)
        assert len(got) == len(chosen)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    twins.assert_same_rows()
    assert {lanes for lanes, _ in twins.static.steps} == {1, 2, 4}


def test_the_comparison_would_see_a_wrong_row():
    twins = Twins(build("full attention"), PROMPTS)
    twins.step([0, 1])
    pool = twins.caches[1].pools[0, "kv"]
    pool.k_RKH[twins.entries[1][0].rows[30]] += 1.0
    want, got = twins.step([0, 1])
    assert (got[0] - want[0]).abs().max() > 1e-3
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


def test_weights_that_moved_are_noticed():
    twins = Twins(build("full attention"), PROMPTS)
    twins.step([0])
    first = list(twins.static.steps.values())
    twins.step([0])
    assert list(twins.static.steps.values()) == first
    layer = twins.model.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)
    want, got = twins.step([0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert list(twins.static.steps.values()) != first


def test_steps_that_do_not_fit():
    twins = Twins(build("full attention"), (3, 4))
    assert not twins.static.fits(twins.view(1, [0], 2)[0])
    view, _ = twins.view(1, [0, 1], 1)
    view.counts *= BATCHES[-1]
    assert not twins.static.fits(view)


def test_models_and_caches_that_it_does_not_serve():
    model = build("full attention")
    assert why_not(model, make_cache(model)) is None
    assert graph_step(model, make_cache(model)) is None  # only CUDA gains by it
    assert "float rows" in why_not(model, make_cache(model, dtype=torch.int8))
    experts = ModelConfig.from_hf(TINY | HYBRID | {"moe_layer_freq": [0, 1, 1, 1]})
    routed = Decoder.build_empty(experts)
    assert why_not(routed, make_cache(model)) == (
        "layer 1.mlp routes to experts, whose loads are read on the host"
    )
