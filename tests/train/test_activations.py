"""Activation checkpointing: the same gradients to the bit, choices of the first forward, less memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sateen import ops
from sateen.config import AudioTokenizerStageConfig, PretrainConfig, Silent, load_recipe
from sateen.data.packing import PackedBatch, Replay, pack
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.mimo_audio import layout as lay
from sateen.models.mimo_audio.lm import AudioLM, LossWeights
from sateen.models.quantize import quantize_model
from sateen.models.registry import preset
from sateen.nn.attention import Sequences
from sateen.nn.moe import Router
from sateen.nn.spec import QuantSpec
from sateen.ops.attention_and_blocks import OP, native
from sateen.run import run_recipe
from sateen.train import precision
from sateen.train.activations import checkpoint_activations
from sateen.train.metrics import read_metrics
from sateen.train.objective import CrossEntropy, LossParts, TokenObjective
from sateen.train.precision import matmul_dtype

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "hysparse-tiny.toml"
HEADS = {"num_nextn_predict_layers": 2}
SMALL = {"sparse_block_size": 4, "sparse_topk_tokens": 16, "sliding_window": 8}
MODELS = {
    "mimo": ("mimo-7b-tiny", HEADS),
    "mimo_v2_flash": ("mimo-v2-flash-tiny", HEADS),
    "hysparse": ("hysparse-tiny", HEADS | SMALL),
    "hysparse with own rows": ("hysparse-tiny", SMALL | {"share_kv_sa": False}),
    "hysparse2": ("hysparse2-tiny", HEADS | {"mtp_intermediate_size": 48}),
    "complexnet": ("fairy-tiny", {}),
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    base, changes = MODELS[name]
    raw = preset(base) | {"vocab_size": 61, "initializer_range": 0.2} | changes
    return Decoder.build(ModelConfig.from_hf(raw)).init_weights(0).to(dtype)


def batch_of(*lengths: int) -> PackedBatch:
    g = torch.Generator().manual_seed(0)
    return pack([torch.randint(0, 61, (n,), generator=g).tolist() for n in lengths])


BATCH = batch_of(70, 1, 45)


def loss_of(model: Decoder, batch: PackedBatch = BATCH, dtype: torch.dtype = torch.float32) -> LossParts:
    objective = TokenObjective(CrossEntropy(), mtp_weight=0.3, balance_weight=0.1)
    objective.begin_step([batch])
    with matmul_dtype("cpu", dtype):
        return objective.loss(model, batch)


def gradients(model: Decoder, loss: LossParts) -> dict[str, Tensor]:
    model.zero_grad()
    loss.total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def with_and_without(model: Decoder, **options) -> None:
    plain = loss_of(model, **options)
    want = gradients(model, plain)
    assert len(want) > 10
    checkpoint_activations(model, options.get("dtype", torch.float32))
    lean = loss_of(model, **options)
    assert torch.equal(lean.total, plain.total)
    assert lean.parts.keys() == plain.parts.keys()
    assert_same(gradients(model, lean), want)
    assert lean.expert_counts.keys() == plain.expert_counts.keys()
    for layer, counts in plain.expert_counts.items():  # a second forward reports nothing
        assert torch.equal(lean.expert_counts[layer], counts)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_to_the_bit(name):
    with_and_without(tiny(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_with_other_backends(backend, dtype, monkeypatch):
    """Of the oracle's pass; float64 is the reference's alone."""
    if backend == "torch" and dtype == torch.float64:
        pytest.skip("the torch backend refuses float64")
    chosen = OP.backends[backend]
    monkeypatch.setattr(OP, "choose", lambda *_, **__: chosen)
    with_and_without(tiny("hysparse", dtype))


@pytest.mark.parametrize("has_bfloat16", [True, False])
@pytest.mark.parametrize("name", ["mimo_v2_flash", "hysparse2"])
def test_in_bfloat16(name, has_bfloat16, monkeypatch):
    """The second forward rounds as the first one did, with the processor's products and without."""
    if has_bfloat16 and not precision.has_bfloat16_matmul():
        pytest.skip("this CPU has no bfloat16 products")
    monkeypatch.setattr(precision, "has_bfloat16_matmul", lambda: has_bfloat16)
    with_and_without(tiny(name), dtype=torch.bfloat16)


@pytest.mark.parametrize(("name", "method"), [("mimo", "fairy2i"), ("complexnet", "phase")])
def test_through_two_bit_weights(name, method):
    with_and_without(quantize_model(tiny(name), QuantSpec(method)))


def test_with_recorded_choices():
    """Some tokens repeat the lists and experts of a rollout, the others choose."""
    model = tiny("hysparse2")
    g = torch.Generator().manual_seed(1)
    T = BATCH.num_tokens
    lists = torch.full((1, T, 24 + 8), -1, dtype=torch.int32)
    lists[:, ::2, :2] = torch.tensor([0, 1], dtype=torch.int32)
    experts = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(T)])
    experts[::3] = -1
    with_and_without(model, batch=replace(BATCH, replay=Replay({1: experts}, {3: lists})))


def test_audio_models():
    tiny_shape = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40, "local_dim": 16, "local_attn_heads": 4,
        "local_ffn_dim": 20, "local_layers": 2, "input_local_layers": 2, "input_local_dim": 16,
        "audio_channels": 2, "speech_vocab_size": "10-8", "speech_zeroemb_idx": "9-7", "delay_pattern": "0-1",
        "initializer_range": 0.3,
    }  # fmt: skip
    model = Decoder.build(ModelConfig.from_hf(preset("mimo-audio-mini") | tiny_shape)).init_weights(0)
    assert isinstance(model, AudioLM)
    codes = torch.arange(24)[:, None] * torch.tensor([5, 3]) % torch.tensor([9, 7])
    stream = lay.stream(model.spec, range(24, 32), codes, text_chunk=3, patch_chunk=2).learnt(model.spec)
    batch = lay.pack(model.spec, [lay.join([lay.text_positions(model.spec, [20, 21]), stream])])

    def loss() -> LossParts:
        return LossParts(model.loss_parts(batch, LossWeights(channels=(2.0, 1.0)))["total"])

    want = gradients(model, loss())
    assert any("input_local" in name for name in want)
    checkpoint_activations(model, torch.float32)
    assert_same(gradients(model, loss()), want)


def test_lists_of_the_first_forward_hold(monkeypatch):
    """Whatever an oracle would choose in its second forward: nobody reads it, and gradients stay."""
    model = tiny("hysparse")
    want = gradients(model, loss_of(model))
    checkpoint_activations(model, torch.float32)
    honest, calls = ops.attention_and_blocks, []

    def perturbed(*args, **kwargs):
        out, lists = honest(*args, **kwargs)
        calls.append(kwargs["lists_KTn"] is not None)
        return out, torch.where(lists > 0, lists - 1, lists)  # other blocks, all of them visible

    lean = loss_of(model)
    monkeypatch.setattr(ops, "attention_and_blocks", perturbed)
    assert_same(gradients(model, lean), want)
    assert calls == [True, True]  # both oracles ran again, and knew their lists
    # The same disturbance of a first forward does show.
    wrong = gradients(model, loss_of(model))
    assert not torch.equal(wrong["model.layers.0.self_attn.q_proj.weight"],
                           want["model.layers.0.self_attn.q_proj.weight"])  # fmt: skip


def test_nothing_is_chosen_again(monkeypatch):
    """The kernel is asked for lists once per oracle; noise in the scores cannot flip what is not chosen."""
    model = tiny("hysparse")
    checkpoint_activations(model, torch.float32)
    honest, columns = native.attention_oracle, []

    def watched(*args, **kwargs):
        columns.append(kwargs["columns"])
        return honest(*args, **kwargs)

    monkeypatch.setattr(native, "attention_oracle", watched)
    gradients(model, loss_of(model))
    assert columns == [4, 4, 0, 0]


def test_experts_of_the_first_forward_hold(monkeypatch):
    model = tiny("mimo_v2_flash")
    want = gradients(model, loss_of(model))
    checkpoint_activations(model, torch.float32)
    lean, calls = loss_of(model), []

    def others(self, scores_TE):
        calls.append(len(scores_TE))
        return scores_TE.detach().argsort(-1)[
            :, : self.spec.experts_per_token
        ]  # the worst instead of the best

    monkeypatch.setattr(Router, "choose", others)
    assert_same(gradients(model, lean), want)
    assert calls


def test_shared_rows_are_projected_by_their_owner_alone():
    """A sparse layer's second forward leaves the oracle's projections alone; the oracle's runs them once."""
    model = tiny("hysparse")
    runs: dict[int, int] = {}
    for index, layer in enumerate(model.model.layers):
        for name, module in layer.self_attn.named_children():
            if name == "k_proj" and module is not None:
                module.register_forward_hook(lambda *_, i=index: runs.update({i: runs.get(i, 0) + 1}))
    checkpoint_activations(model, torch.float32)
    gradients(model, loss_of(model))
    assert runs == {0: 2, 3: 2, 6: 2}


def kept_bytes(model: Decoder) -> int:
    """Bytes of all tensors that autograd keeps at the end of the forward, parameters and ids left out."""
    skipped = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive: dict[int, Tensor] = {}

    def pack_tensor(x: Tensor) -> Tensor:
        storage = x.untyped_storage().data_ptr()
        if storage not in skipped:
            alive[storage] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda x: x):
        hidden = model.trunk(BATCH.input_ids, Sequences.of_lengths([70, 1, 45]))
    assert hidden.requires_grad
    return sum(x.untyped_storage().nbytes() for x in alive.values())


@pytest.mark.parametrize(("name", "share"), [("mimo", 0.1), ("mimo_v2_flash", 0.1), ("hysparse", 0.25),
                                              ("hysparse2", 0.2), ("complexnet", 0.1)])  # fmt: skip
def test_less_is_kept(name, share):
    """Kept are inputs of layers, rows and lists of oracles, the input that a bridge publishes."""
    model = tiny(name)
    before = kept_bytes(model)
    checkpoint_activations(model, torch.float32)
    after, T = kept_bytes(model), BATCH.num_tokens
    config = model.config
    least = 4 * T * config.hidden_size * len(config.specs)
    for spec in config.specs:
        if spec.options.get("num_blocks"):
            lists = spec.options["num_blocks"] + (spec.options.get("forced_window") or 0)
            least += 4 * T * spec.num_key_value_heads * (spec.head_dim + spec.v_head_dim + lists)
        if spec.options.get("publishes_input"):
            least += 4 * T * config.hidden_size
    assert least <= after <= 1.1 * least + 4096
    assert after < share * before


def test_evaluation_and_caches_pass_by():
    model = tiny("mimo")
    checkpoint_activations(model, torch.float32)
    with torch.no_grad():
        lean = model.trunk(BATCH.input_ids, Sequences.of_lengths([70, 1, 45]))
    assert not lean.requires_grad


def test_a_run_is_the_run_without_it(texts, tmp_path):
    shortened = [
        f'data.docs={{kind="text_dir", path="{texts}"}}', "tokenizer.vocab_size=300",
        "stages.pretrain.tokens=2048", "stages.pretrain.seq_len=128",
        "stages.pretrain.tokens_per_batch=1024", "stages.pretrain.micro_batches=2",
        "stages.pretrain.schedule.warmup_tokens=0", "stages.pretrain.schedule.decay_tokens=0",
    ]  # fmt: skip
    losses = []
    for word in ("false", "true"):
        config = load_recipe([RECIPE], [*shortened, f"stages.pretrain.activation_checkpointing={word}"])
        run_recipe(config, tmp_path / word, Silent())
        losses.append([row["loss"] for row in read_metrics(tmp_path / word) if "loss" in row])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="does not go with compile = true"):
        PretrainConfig(tokens=8192, compile=True, activation_checkpointing=True)
    with pytest.raises(ValueError, match="audio tokenizer has none"):
        AudioTokenizerStageConfig(tokens=8192, activation_checkpointing=True)
