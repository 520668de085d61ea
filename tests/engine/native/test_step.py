"""The native step against the torch forward in float64: hidden states, logits, cached rows and tokens."""

from __future__ import annotations

import copy
import random
import statistics

import pytest
import torch

from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.cache.sizing import sized_cache
from sateen.engine.engine import LLM
from sateen.engine.native.step import MAX_TOKENS, NativeStep
from sateen.errors import BackendUnavailable, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.lowbit import lowbit_model
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences
from sateen.ops.native import native, native_available

pytestmark = pytest.mark.skipif(native_available() is not None, reason=f"needs {native_available()}")

TINY = {
    "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 512,
    "initializer_range": 0.2,
}  # fmt: skip
FLASH = {
    "model_type": "mimo_v2_flash", "num_hidden_layers": 4, "hybrid_layer_pattern": [0, 1, 1, 0],
    "sliding_window": 11, "moe_layer_freq": [0, 1, 1, 1], "head_dim": 24, "v_head_dim": 16,
    "swa_num_key_value_heads": 3, "swa_head_dim": 20, "swa_v_head_dim": 12, "partial_rotary_factor": 0.334,
    "n_routed_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
    "num_nextn_predict_layers": 2,
}  # fmt: skip
FULL, SPARSE, SLIDING = "full_attention", "sparse_attention", "sliding_attention"
HYSPARSE = {
    "model_type": "hysparse", "num_hidden_layers": 6, "sliding_window": 11, "v_head_dim": 16,
    "layer_types": [FULL, SPARSE, SPARSE, FULL, SPARSE, FULL], "sparse_block_size": 8,
    "sparse_topk_tokens": 32,
}  # fmt: skip
HYSPARSE2 = HYSPARSE | {
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SPARSE, FULL], "sparse_bridge": True,
    "swa_output_gate": True, "sparse_select": "token", "sparse_local": "forced", "num_key_value_heads": 1,
    "sparse_topk_tokens": 20, "partial_rotary_factor": 0.0, "swa_partial_rotary_factor": 0.5,
    "moe_layer_freq": [0, 1, 1, 1, 1, 0], "n_routed_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "num_nextn_predict_layers": 1,
}  # fmt: skip
FAMILIES = {
    "hysparse": HYSPARSE,
    "hysparse, odd sizes": HYSPARSE | {
        "head_dim": 20, "v_head_dim": 12, "sparse_block_size": 7, "sparse_topk_tokens": 21,
        "swa_num_key_value_heads": 3, "swa_rope_theta": 500.0, "swa_partial_rotary_factor": 0.6,
        "gate_granularity": "element", "attention_bias": True, "sink_sa": False,
    },
    "hysparse, blocks over pages": HYSPARSE | {
        "sparse_block_size": 48, "sparse_topk_tokens": 96, "sparse_local": "none",
        "gate_granularity": "element",
    },
    "hysparse, blocks beyond pages": HYSPARSE | {"sparse_block_size": 80, "sparse_topk_tokens": 80},
    "hysparse, forced blocks": HYSPARSE | {"sparse_local": "forced", "sink_swa": False},
    "hysparse2": HYSPARSE2,
    "llama": {"model_type": "llama"},
    "llama, odd sizes": {
        "model_type": "llama", "attention_bias": True, "head_dim": 10, "hidden_size": 33,
        "intermediate_size": 35, "num_attention_heads": 3, "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "one head per row": {"model_type": "llama", "num_key_value_heads": 6, "head_dim": 32},
    "qwen2": {"model_type": "qwen2", "rope_theta": 500.0},
    "qwen2, windows": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral, long window": {"model_type": "mistral", "sliding_window": 100},
    "mimo": {"model_type": "mimo", "num_nextn_predict_layers": 2},
    "mimo_v2_flash": FLASH,
    "mimo_v2_flash, scaled": FLASH | {
        "norm_topk_prob": False, "routed_scaling_factor": 2.5, "add_full_attention_sink_bias": True,
        "n_routed_experts": 5, "num_experts_per_tok": 1,
    },
}  # fmt: skip
# Relative to the largest number. bfloat16 rows are within a unit in their last place, hidden states feel it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(name, **changes):
    """Random weights; norms, biases and sinks are not at their neutral values."""
    model = Decoder(ModelConfig.from_hf(TINY | FAMILIES[name] | changes)).init_weights(3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def make_cache(model, dtype, num_draft=0, *, heads=False):
    trunk = model.config.num_hidden_layers
    layouts = model.config.kv_layouts()[: None if heads else trunk]
    return KVCache(
        layouts, num_trunk_layers=trunk, num_pages=20, num_slots=5, max_model_len=300, num_draft=num_draft,
        dtype=dtype,
    )  # fmt: skip


class Pair:
    """The same sequences in two caches: one for torch, in float64 unless told, one for the native step."""

    def __init__(self, model, dtype=torch.float32, num_draft=0, *, truth=None, heads=False):
        self.truth = copy.deepcopy(model).double() if truth is None else truth
        wide = torch.float64 if dtype == torch.float32 and truth is None else dtype
        self.caches = [make_cache(model, kind, num_draft, heads=heads) for kind in (wide, dtype)]
        self.native = NativeStep(model, self.caches[1])
        self.entries = [[cache.open() for _ in range(5)] for cache in self.caches]
        self.generator = torch.Generator().manual_seed(7)
        self.links = [LayerLinks(), LayerLinks()]

    def views(self, counts, *, heads=False):
        """Both caches' views of a forward that gives sequence i `counts[i]` new tokens, and `Sequences`."""
        chosen = [i for i, count in enumerate(counts) if count]
        counts = [counts[i] for i in chosen]
        views = []
        for cache, entries in zip(self.caches, self.entries, strict=True):
            theirs = [entries[i] for i in chosen]
            for entry, count in zip(theirs, counts, strict=True):
                assert cache.reserve(entry, entry.length + count)
            views.append(cache.forward(theirs, counts, heads=heads))
        positions = [t for s, n in zip(views[0].starts, counts, strict=True) for t in range(s, s + n)]
        return views, Sequences(torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(positions))

    @torch.inference_mode()
    def step(self, counts):
        """Both hidden states."""
        views, seq = self.views(counts)
        ids = torch.randint(97, (sum(counts),), generator=self.generator)
        want = self.truth.trunk(ids, seq, views[0], self.links[0])
        return want, self.native.trunk(ids.tolist(), views[1], self.links[1])

    def truncate(self, index, length):
        for cache, entries in zip(self.caches, self.entries, strict=True):
            cache.truncate(entries[index], length)

    def rows(self):
        for want, got in zip(self.caches[0].pools.values(), self.caches[1].pools.values(), strict=True):
            yield want.k_RKH.double(), got.k_RKH.double()
            yield want.v_RKV.double(), got.v_RKV.double()


def assert_near(got, want, tolerance):
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"relative to the largest number {float(error):.2e}"


def relative_rms(got, want):
    return float((got.double() - want).norm() / want.norm())


# Prompts, decodes, drafts and chunks together; page borders at 64 and 128, every ring wraps.
SCHEDULE = [
    [1, 5, 9, 0, 0],
    [1, 1, 1, 40, 0],
    [1, 4, 20, 1, 30],
    [30, 1, 4, 3, 1],
    [29, 1, 1, 20, 5],
    [1, 1, 1, 1, 1],
    [4, 60, 0, 0, 0],
    [62, 1, 1, 0, 0],
    [1, 1, 1, 1, 1],
    [1, 0, 0, 1, 0],
]


@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_and_rows_are_those_of_torch(name, num_draft):
    pair = Pair(build(name), num_draft=num_draft)
    for counts in SCHEDULE:
        want, got = pair.step(counts)
        assert_near(got, want, 1e-5)
        for theirs, ours in pair.rows():
            assert_near(ours, theirs, 1e-5)
    pair.truncate(1, pair.entries[0][1].length - num_draft)
    want, got = pair.step([1, 2, 3, 4, 5])
    assert_near(got, want, 1e-5)
    with torch.inference_mode():
        assert_near(pair.native.logits(got), pair.truth.logits(pair.truth.head_input(want)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama, odd sizes", "mistral", "qwen3"])
def test_rows_of_sixteen_bits(name, dtype):
    """The rows that torch stores. In the first layer few numbers are so near a rounding border that float32
    decides; further up these few have moved all others by as much.
    """
    pair = Pair(build(name), dtype)
    for counts in SCHEDULE:
        want, got = pair.step(counts)
        assert_near(got, want, TOLERANCE[dtype])
    for i, (theirs, ours) in enumerate(pair.rows()):
        assert_near(ours, theirs, TOLERANCE[dtype])
        assert (ours != theirs).double().mean() < (0.005 if i < 2 else 0.2)
    # And not float32 rows in disguise: those would agree better than the rounding of the rows allows.
    exact = Pair(build(name))
    for counts in SCHEDULE:
        wide, _ = exact.step(counts)
    assert relative_rms(want, wide) > 3 * relative_rms(got, want)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("name", ["llama", "mistral", "one head per row"])
def test_bfloat16_rows_of_whole_vectors(name, head_dim):
    """Heads that bfloat16 dot products read where they lie, in pages and in rings."""
    pair = Pair(build(name, head_dim=head_dim), torch.bfloat16)
    for counts in [*SCHEDULE, [70, 1, 3, 2, 1], [1, 1, 1, 1, 1]]:
        want, got = pair.step(counts)
        assert_near(got, want, TOLERANCE[torch.bfloat16])


def test_numbers_that_round_oddly_in_float16():
    """Subnormals, the borders of the range and ties, through the values of a layer that passes them on."""
    values = torch.tensor([6e-8, 2.9e-8, 3e-8, 6.1e-5, 6.09e-5, 2049.0, 2051.0, 65519.0, 65520.0, -1e-9, 0.0])
    model = build("llama", num_hidden_layers=1, attention_bias=True)
    with torch.no_grad():
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight.zero_()
        attention.v_proj.bias.zero_()
        attention.v_proj.bias[: len(values)] = values
    cache = make_cache(model, torch.float16)
    entry = cache.open()
    assert cache.reserve(entry, 1)
    NativeStep(model, cache).trunk([5], cache.forward([entry], [1]), LayerLinks())
    stored = cache.pools[0, "kv"].v_RKV[entry.rows[0]].flatten()[: len(values)]
    assert stored.equal(values.half())


def test_a_bfloat16_model_is_nearer_to_the_truth_than_torch_is():
    model = build("qwen2").bfloat16()
    exact, rounded = (
        Pair(model, torch.bfloat16, truth=truth) for truth in (copy.deepcopy(model).double(), model)
    )
    for counts in SCHEDULE:
        want, native = exact.step(counts)
        in_torch, _ = rounded.step(counts)
        assert native.dtype == torch.bfloat16
        assert relative_rms(native, want) < relative_rms(in_torch, want) < 0.1
    with torch.inference_mode():
        logits = exact.native.logits(native)
        assert logits.dtype == torch.float32
        assert relative_rms(logits, exact.truth.logits(exact.truth.head_input(native.double()))) < 5e-3


@pytest.mark.parametrize("name", ["mimo", "mimo_v2_flash"])
def test_heads_are_those_of_torch(name):
    pair = Pair(build(name), num_draft=2, heads=True)
    for counts in ([9, 1, 3, 0, 0], [2, 5, 1, 20, 1], [3, 3, 3, 3, 3]):
        want, got = pair.step(counts)
        views, seq = pair.views(counts, heads=True)
        for k in range(2):
            ids = torch.randint(97, (len(want),), generator=pair.generator)
            with torch.inference_mode():
                want, out = pair.truth.mtp(k, want, ids, seq, views[0])
                normed = pair.native.head(k, got, ids, views[1])
                assert_near(normed, out, 1e-5)
                assert_near(pair.native.logits(normed, is_normed=True), pair.truth.logits(out), 1e-5)
            got = normed if pair.truth.config.mtp.is_chained else got
        for theirs, ours in pair.rows():
            assert_near(ours, theirs, 1e-5)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["qwen2", "mimo_v2_flash", "hysparse", "hysparse2"])
def test_low_bit_weights(name, weights):
    """Activations of both paths round to the same int8 codes, but for those at a border: one such code shows
    in its token and, through attention, a little in later ones. So most tokens agree closely, and there are
    two layers and routes that are settled.
    """
    few = {"num_hidden_layers": 2}
    if name == "mimo_v2_flash":
        few |= {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]}
    if name.startswith("hysparse"):  # all blocks are listed: a choice, too, may fall the other way
        few |= {"layer_types": [FULL, SPARSE], "moe_layer_freq": [0, 1], "sparse_topk_tokens": 512}
    model = lowbit_model(build(name, **few), weights)
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias += 2.0 * torch.arange(moe.spec.num_experts)
    pair = Pair(model, truth=model)
    errors = []
    for counts in SCHEDULE[:4]:
        want, got = pair.step(counts)
        errors += [relative_rms(g, w.double()) for g, w in zip(got, want, strict=True)]
    assert statistics.median(errors) < 1e-4
    assert max(errors) < 2e-2
    with torch.inference_mode():
        assert relative_rms(pair.native.logits(want), model.logits(model.head_input(want)).double()) < 1e-3


@pytest.mark.parametrize("name", [name for name in FAMILIES if "hysparse" in name])
def test_lists_are_those_of_torch(name):
    """Of every token, chosen by probability over the group's heads; prompts, decodes, drafts and chunks."""
    pair = Pair(build(name))
    oracles = [spec.index for spec in pair.truth.config.specs if spec.options.get("num_blocks")]
    assert oracles
    compared = different = 0
    for counts in SCHEDULE:
        pair.step(counts)
        want, got = (links.selections for links in pair.links)
        assert sorted(got) == oracles
        for layer in oracles:
            assert got[layer].dtype == torch.int32
            assert got[layer].shape == want[layer].shape
            compared += got[layer].shape[1]
            different += int((got[layer] != want[layer]).any(-1).any(0).sum())
    assert compared > 300
    assert different == 0


@pytest.fixture
def selected_isa(isa):
    """Runs a test with the instruction set of its parameter, or skips it where the processor has another."""
    before = native().current_isa()
    try:
        native().select_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    yield
    native().select_isa(before)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("name", ["hysparse", "hysparse, odd sizes", "hysparse2"])
@pytest.mark.usefixtures("selected_isa")
def test_hysparse_at_every_instruction_set(name, isa):
    """Rows of float32 against torch in float64, lists included; rows of 16 bits where every visible block is
    listed, because rounding moves other choices.
    """
    exact = Pair(build(name))
    for counts in SCHEDULE[:5]:
        want, got = exact.step(counts)
        assert_near(got, want, 1e-5)
    for layer, lists in exact.links[1].selections.items():
        assert lists.equal(exact.links[0].selections[layer])
    size = 1 if name == "hysparse2" else TINY["head_dim"]
    everything = {"sparse_block_size": size, "sparse_topk_tokens": 512}
    for dtype, head_dim in ((torch.float16, 16), (torch.bfloat16, 24), (torch.bfloat16, 64)):
        wide = {"head_dim": head_dim, "v_head_dim": 32 if head_dim == 64 else 12}
        model = build(name, **everything, **wide)
        for moe in model.moe_layers().values():  # routes that rounding leaves alone
            moe.gate.e_score_correction_bias += 2.0 * torch.arange(moe.spec.num_experts)
        rounded = Pair(model, dtype)
        for counts in SCHEDULE[:8]:
            want, got = rounded.step(counts)
            assert_near(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["hysparse, odd sizes", "hysparse, blocks over pages", "hysparse2"])
def test_threads_share_the_keys_of_an_oracle(name):
    """Parts of a long sequence are merged; a block is never in two of them. Lists stay to the last one."""
    model, found = build(name), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        rng = random.Random(5)
        cache = make_cache(model, torch.float32)
        step, entries, links = NativeStep(model, cache), [cache.open(), cache.open()], LayerLinks()
        for counts in ([32, 1], [32, 2], *[[30, 0]] * 6, [1, 1], [4, 1]):
            theirs = [entry for entry, count in zip(entries, counts, strict=True) if count]
            counts = [count for count in counts if count]
            for entry, count in zip(theirs, counts, strict=True):
                assert cache.reserve(entry, entry.length + count)
            ids = [rng.randrange(97) for _ in range(sum(counts))]
            out = step.trunk(ids, cache.forward(theirs, counts), links)
        found.append((out, links.selections))
    for out, lists in found[1:]:
        assert_near(out, found[0][0], 1e-5)
        assert all(lists[layer].equal(found[0][1][layer]) for layer in lists)


def test_long_steps_with_hysparse_run_in_torch():
    """Queries of a prompt share blocks; and block maxima take memory by tokens, heads and blocks."""
    model = build("hysparse")
    cache = make_cache(model, torch.float32)
    step, entry = NativeStep(model, cache), cache.open()

    def fits(count):
        assert cache.reserve(entry, entry.length + count)
        return step.fits(cache.forward([entry], [count]))

    assert [fits(32), fits(33), fits(1)] == [True, False, True]
    plain = build("llama")
    assert NativeStep(plain, make_cache(plain, torch.float32)).fits(cache.forward([entry], [400]))


def test_experts_are_those_of_torch():
    pair = Pair(build("mimo_v2_flash"))
    for counts in SCHEDULE:
        pair.step(counts)
        want, got = (links.router_ids for links in pair.links)
        assert list(got) == list(want) == [1, 2, 3]
        assert all(got[i].equal(want[i].int()) for i in want)


def test_equal_scores_go_to_the_lower_expert():
    model = build("mimo_v2_flash")
    with torch.no_grad():
        for moe in model.moe_layers().values():
            moe.gate.weight.zero_()
            moe.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0]))
    pair = Pair(model)
    pair.step([3, 1, 0, 0, 0])
    assert all(ids.tolist() == [[1, 3, 5]] * 4 for ids in pair.links[1].router_ids.values())


def test_threads_do_not_change_a_bit():
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = make_cache(model := build("mimo_v2_flash"), torch.float32)
        native, entries = NativeStep(model, cache), [cache.open() for _ in range(3)]
        found = []
        for counts in ([20, 1, 9], [1, 1, 1], [1, 1, 30]):
            for entry, count in zip(entries, counts, strict=True):
                assert cache.reserve(entry, entry.length + count)
            ids = [i % 97 for i in range(sum(counts))]
            found.append(native.logits(native.trunk(ids, cache.forward(entries, counts), LayerLinks())))
        outputs.append(torch.cat(found))
    assert all(out.equal(outputs[0]) for out in outputs)


def test_new_weights_are_used():
    """In place at once, and after every tensor has been replaced."""
    model = build("llama")
    cache = make_cache(model, torch.float32)
    native = NativeStep(model, cache)

    def run(step):
        entry = cache.open()
        assert cache.reserve(entry, 3)
        out = step(cache.forward([entry], [3]))
        cache.free(entry)
        return out

    def same():
        with torch.inference_mode():
            want = run(lambda view: model.trunk(torch.tensor([4, 8, 2]), Sequences.of_lengths([3]), view))
            got = run(lambda view: native.trunk([4, 8, 2], view, LayerLinks()))
        assert_near(got, want, 1e-5)
        return got

    first = same()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1.0)
    second = same()
    assert not second.allclose(first)
    model.double()
    model.float()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(-1.0)
    assert_near(same(), first, 1e-5)


def test_refusals(hysparse):
    def reason(model, dtype=torch.float32, attention="float"):
        cache = make_cache(model, dtype)
        cache.attention = attention
        return NativeStep.why_not(model, cache)

    assert reason(build("llama")) is None
    assert reason(build("llama"), torch.int8) is None
    assert reason(build("llama"), torch.int8, "int8") is None
    assert "no attention 'int8' over rows of torch.bfloat16" in reason(build("llama"), torch.bfloat16, "int8")
    assert "attention 'int8-half'" in reason(build("llama"), torch.int8, "int8-half")
    assert "'oracle_attention' does not read int8 rows" in reason(hysparse, torch.int8)
    assert "'oracle_attention' does not read offloaded rows" in NativeStep.why_not(
        hysparse, sized_cache(hysparse, kv_cache_dtype="auto", max_num_seqs=1, max_model_len=64,
                              kv_memory_bytes=None, offloads=True),
    )  # fmt: skip
    own = build("hysparse", share_kv_sa=False)
    assert "layer 1: self_attn reads other rows" in reason(own)
    assert "ranks blocks by the mean" in reason(build("hysparse", gqa_score_reduce="mean"))
    assert "complex_attention" in reason(Decoder.build(ModelConfig.from_hf(preset("fairy-tiny"))))
    assert "layer 0" in reason(build("llama").double())
    assert "on meta" in reason(copy.deepcopy(build("llama")).to("meta"))
    quantised = preset("mimo-7b-tiny") | {"quantization_config": {"quant_method": "ternary"}}
    assert "LowbitLinear" in reason(Decoder(ModelConfig.from_hf(quantised)))
    with pytest.raises(BackendUnavailable, match=r"step 'native' cannot run this model: .*torch\.float32"):
        LLM(build("llama"), step="native", attention="int8", max_model_len=64)
    with pytest.raises(ConfigError, match="step"):
        LLM(build("llama"), step="fast", max_model_len=64)
    assert LLM(build("llama"), kv_cache_dtype="int8", max_model_len=64).runner.native is not None
    assert LLM(build("llama"), attention="int8", max_model_len=64).runner.native is None
    assert LLM(build("llama"), step="torch", max_model_len=64).runner.native is None


@pytest.mark.parametrize("draft", ["none", "mtp"])
@pytest.mark.parametrize("name", ["mimo-v2-flash-tiny", "mimo-7b-tiny"])
def test_the_same_tokens_whatever_the_schedule(name, draft, drafting_model, greedy, monkeypatch):
    """Requests come, leave and run at random times; both engines do the same things at the same steps."""
    model = drafting_model(name, heads=2, noise=0.1, strength=0.05)
    steps = []
    trunk = NativeStep.trunk
    monkeypatch.setattr(
        NativeStep, "trunk", lambda self, ids, *rest: steps.append(len(ids)) or trunk(self, ids, *rest)
    )
    results = []
    for mode in ("torch", "native"):
        rng = random.Random(11)
        llm = LLM(
            model, draft=draft, step=mode, max_num_seqs=4, num_pages=12, max_model_len=256,
            max_num_batched_tokens=96,
        )  # fmt: skip
        requests = []
        for _ in range(60):
            if rng.random() < 0.3 and len(requests) < 14:
                prompt = [rng.randrange(300) for _ in range(rng.choice([1, 7, 63, 64, 65, 130]))]
                requests.append(llm.add(prompt, greedy(rng.randrange(1, 30))))
            unfinished = [request for request in requests if request.finish_reason is None]
            if unfinished and rng.random() < 0.05:
                llm.abort(rng.choice(unfinished))
            if llm.has_work:
                llm.step()
        while llm.has_work:
            llm.step()
        results.append([(request.tokens, request.finish_reason) for request in requests])
    assert results[1] == results[0]
    assert len(results[0]) == 14
    assert "abort" in [reason for _, reason in results[0]]
    assert len(steps) > 20
    assert max(steps) <= MAX_TOKENS


# Int8 rows: the torch forward over a cache of its own quantises alike, so codes are equal but for those at a
# border, which float32 sums in another order decide.
INT8_NAMES = [
    "llama, odd sizes",
    "one head per row",
    "qwen3",
    "mistral",
    "mistral, long window",
    "mimo_v2_flash",
]


def int8_pair(name, attention, num_draft=0, **changes):
    model = build(name, **changes)
    pair = Pair(model, torch.int8, num_draft, truth=model)
    for cache in pair.caches:
        cache.attention = attention
    pair.native = NativeStep(model, pair.caches[1])
    return pair


def assert_tokens_near(got, want):
    """Within 2e-3 of the largest number, but for a token in a hundred with a query code at a border."""
    gaps = (got - want).abs().amax(-1) / want.abs().max()
    assert (gaps > 2e-3).sum() <= 1 + len(gaps) // 100
    assert gaps.max() < 2e-2


def assert_rows_agree(pair):
    """Codes within one of each other, nearly all equal; scales and means to the precision of float32."""
    for want, got in zip(*(cache.pools.values() for cache in pair.caches), strict=True):
        for a, b in ((want.k_RKH, got.k_RKH), (want.v_RKV, got.v_RKV)):
            gap = (a.int() - b.int()).abs()
            assert gap.max() <= 1
            assert (gap > 0).double().mean() < 0.01
        for a, b in zip(want.scales, got.scales, strict=True):
            assert_near(b, a, 1e-4)


@pytest.mark.parametrize("num_draft", [0, 3])
@pytest.mark.parametrize("attention", ["float", "int8"])
@pytest.mark.parametrize("name", INT8_NAMES)
def test_one_layer_is_that_of_torch(name, attention, num_draft):
    """Prompts, decodes, drafts and chunks; page borders; rings that wrap. One layer, so that a code that
    falls the other way moves nothing but its own product.
    """
    few = {"num_hidden_layers": 1}
    if name == "mimo_v2_flash":
        few |= {
            "hybrid_layer_pattern": [1],
            "moe_layer_freq": [0],
            "swa_head_dim": 24,
            "num_nextn_predict_layers": 0,
        }
    pair = int8_pair(name, attention, num_draft, **few)
    for counts in SCHEDULE:
        want, got = pair.step(counts)
        assert_tokens_near(got, want)
        assert_rows_agree(pair)
    pair.truncate(1, pair.entries[0][1].length - num_draft)
    want, got = pair.step([1, 2, 3, 4, 5])
    assert_tokens_near(got, want)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("head_dim", [16, 40, 64, 128])
@pytest.mark.usefixtures("selected_isa")
def test_every_instruction_set(isa, head_dim):
    for name in ("qwen3", "mistral, long window"):
        pair = int8_pair(name, "int8", num_hidden_layers=1, head_dim=head_dim)
        for counts in ([70, 3, 1, 0, 0], [1, 4, 9, 1, 0], [60, 1, 1, 1, 1]):
            want, got = pair.step(counts)
            assert_tokens_near(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("name", ["one head per row", "mistral, long window"])
def test_few_query_rows_of_whole_vectors(name, dtype):
    """One to seven per key/value head, most of which have a kernel of their own, in pages and in rings."""
    if dtype == torch.int8:
        pair = int8_pair(name, "int8", num_hidden_layers=1, head_dim=64)
    else:
        pair = Pair(build(name, head_dim=64), dtype)
    for counts in ([130, 70, 64, 1, 40], [1, 2, 3, 4, 5], [6, 7, 1, 2, 3], [4, 5, 6, 7, 1], [1] * 5):
        want, got = pair.step(counts)
        if dtype == torch.int8:
            assert_tokens_near(got, want)
        else:
            assert_near(got, want, TOLERANCE[dtype])


def test_queries_of_zeros():
    """All keys that a row sees count alike, those behind it do not."""
    pair = int8_pair("one head per row", "int8", num_hidden_layers=1, head_dim=64)
    with torch.no_grad():
        pair.truth.model.layers[0].self_attn.q_proj.weight.zero_()
    for counts in ([70, 3, 0, 0, 0], [2, 1, 0, 0, 0]):
        want, got = pair.step(counts)
        assert_tokens_near(got, want)


def test_parts_of_the_keys_join():
    """Several threads share a long sequence; blocks stay, so only floats add up in another order."""
    model = build("mistral, long window", num_hidden_layers=1)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = make_cache(model, torch.int8)
        cache.attention = "int8"
        native_step, entry = NativeStep(model, cache), cache.open()
        for count in (128, 120, 1, 1):
            assert cache.reserve(entry, entry.length + count)
            ids = [i % 97 for i in range(count)]
            out = native_step.trunk(ids, cache.forward([entry], [count]), LayerLinks())
        outputs.append(out)
    for out in outputs[1:]:
        assert_tokens_near(out, outputs[0])


@pytest.mark.parametrize("attention", ["float", "int8"])
@pytest.mark.parametrize("name", ["mimo-v2-flash-tiny", "mimo-7b-tiny"])
def test_greedy_tokens_are_those_of_the_torch_step(
    name, attention, drafting_model, make_prompts, tokens_of, greedy
):
    model = drafting_model(name, heads=2, noise=0.01)
    prompts = make_prompts([90, 33, 5], vocab_size=300)
    settings = {"max_model_len": 160, "attention": attention, "kv_cache_dtype": "int8"}
    for draft in ("none", "mtp"):
        torch_llm, native_llm = (
            LLM(model, draft=draft, step=step, **settings) for step in ("torch", "native")
        )
        assert tokens_of(native_llm, prompts, greedy(24)) == tokens_of(torch_llm, prompts, greedy(24))


def test_a_layer_that_falls_back_reads_its_codes_as_floats():
    """Between the two modes: one layer differs from all-integer attention, the others from all-float."""
    outputs = {}
    model = build("llama")
    for name, attention, layers in (
        ("float", "float", ()),
        ("int8", "int8", ()),
        ("one", "int8", (1,)),
        ("all", "int8", (0, 1, 2)),
    ):
        cache = make_cache(model, torch.int8)
        cache.attention, cache.float_layers = attention, frozenset(layers)
        entry = cache.open()
        assert cache.reserve(entry, 70)
        outputs[name] = NativeStep(model, cache).trunk(
            list(range(70)), cache.forward([entry], [70]), LayerLinks()
        )
    assert outputs["all"].equal(outputs["float"])
    assert not outputs["one"].equal(outputs["int8"])
    assert not outputs["one"].equal(outputs["float"])
