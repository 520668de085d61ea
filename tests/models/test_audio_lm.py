"""MiMo-Audio's language model: names and shapes, layouts, masks, both small transformers, the loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.checkpoint.hf import load_model
from sateen.errors import CheckpointError, ConfigError, ShapeError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.mimo_audio import layout as lay
from sateen.models.mimo_audio.lm import AudioLM, LossWeights, part_of
from sateen.models.mimo_audio.patch import StepCache
from sateen.models.mimo_audio_lm import AudioSpec
from sateen.models.registry import preset
from sateen.nn.attention import Sequences

TINY = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256, "vocab_size": 40,
    "local_dim": 16, "local_attn_heads": 4, "local_ffn_dim": 20, "local_layers": 2, "input_local_layers": 2,
    "input_local_dim": 16, "audio_channels": 3, "speech_vocab_size": "10-8-6", "speech_zeroemb_idx": "9-7-5",
    "delay_pattern": "0-1-2", "initializer_range": 0.3,
}  # fmt: skip


WEIGHTS = LossWeights(channels=(12.0, 8.0, 6.0))


def tiny(seed: int = 0, **changes: object) -> AudioLM:
    """Three channels, weights large enough that everything matters, biases too."""
    raw = preset("mimo-audio-mini") | TINY | changes
    model = AudioLM(ModelConfig.from_hf(raw)).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
    return model


def draw_codes(spec: AudioSpec, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    columns = [
        torch.randint(size - 1, (frames,), generator=generator)  # the empty id is the last one
        for size in spec.vocab_sizes
    ]
    return torch.stack(columns, 1)


def document(spec: AudioSpec, seed: int = 0) -> lay.AudioLayout:
    """Some text, audio input, text, a learnt stream."""
    return lay.join(
        [
            lay.text_positions(spec, [20, 21]),
            lay.audio_input(spec, draw_codes(spec, 10, seed)),
            lay.text_positions(spec, [22 + seed]),
            lay.stream(
                spec, range(24, 32), draw_codes(spec, 26, seed + 1), text_chunk=3, patch_chunk=2
            ).learnt(spec),
        ]
    )


def run(model: AudioLM, layout: lay.AudioLayout) -> Tensor:
    return model.hidden(layout.text_ids_L, layout.codes_LGR, Sequences.of_lengths([len(layout)]))


def published_tensors() -> dict[str, tuple[int, ...]]:
    """The checkpoint of the 7B model, written down from the shapes of arXiv 2512.23808 Table 2."""
    found: dict[str, tuple[int, ...]] = {}

    def transformer(prefix: str, layers: int, width: int, ffn: int, kv: int) -> None:
        for i in range(layers):
            p = f"{prefix}.layers.{i}"
            for name, rows in (("q", width), ("k", kv), ("v", kv)):
                found[f"{p}.self_attn.{name}_proj.weight"] = (rows, width)
                found[f"{p}.self_attn.{name}_proj.bias"] = (rows,)
            found[f"{p}.self_attn.o_proj.weight"] = (width, width)
            found[f"{p}.mlp.gate_proj.weight"] = found[f"{p}.mlp.up_proj.weight"] = (ffn, width)
            found[f"{p}.mlp.down_proj.weight"] = (width, ffn)
            found[f"{p}.input_layernorm.weight"] = found[f"{p}.post_attention_layernorm.weight"] = (width,)
        found[f"{prefix}.norm.weight"] = (width,)

    transformer("model", 36, 4096, 11008, 1024)
    transformer("local_transformer", 16, 1024, 4096, 1024)
    transformer("input_local_transformer", 6, 1024, 4096, 1024)
    found["model.embed_tokens.weight"] = found["lm_head.weight"] = (151680, 4096)
    for r in range(8):
        shape = (1025 if r < 2 else 129, 1024)
        found[f"speech_embeddings.{r}.weight"] = found[f"local_transformer_lm_heads.{r}.weight"] = shape
    found["speech_group_downcast.weight"] = (4096, 4096)
    found["hidden_states_downcast.weight"] = (1024, 4096)
    return found


def test_the_7b_preset_has_the_published_tensors_and_sizes() -> None:
    model = load_model("mimo-audio-7b", device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == published_tensors()
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        part = "model" if name.startswith(("model.layers.", "model.norm")) else name.split(".")[0]
        part = name if name == "model.embed_tokens.weight" else part
        sizes[part] = sizes.get(part, 0) + math.prod(shape)
    millions = {part: round(size / 1e6, 1) for part, size in sizes.items()}
    assert millions == {
        "model": 6380.1, "model.embed_tokens.weight": 621.3, "lm_head": 621.3, "local_transformer": 268.5,
        "input_local_transformer": 100.7, "speech_group_downcast": 16.8, "hidden_states_downcast": 4.2,
        "speech_embeddings": 2.9, "local_transformer_lm_heads": 2.9,
    }  # fmt: skip
    assert sum(sizes.values()) == 8_018_587_648


def test_the_published_config_builds_the_model_and_plain_qwen2_does_not() -> None:
    raw = preset("mimo-audio-7b")
    assert raw["model_type"] == "qwen2"
    audio = ModelConfig.from_hf(raw)
    assert audio.model_type == "mimo_audio"
    assert audio.to_hf() == raw
    assert audio.rms_norm_eps == 1e-6
    spec = AudioSpec.from_hf(raw)
    assert {layer.rope_theta for layer in (*audio.specs, *spec.encoder_layers, *spec.decoder_layers)} == {
        640000
    }
    assert {layer.head_dim for layer in (*spec.encoder_layers, *spec.decoder_layers)} == {16}
    assert (spec.num_steps, spec.is_bidirectional, spec.tokens.empty) == (11, True, 151667)
    plain = {key: value for key, value in raw.items() if "local" not in key and "speech" not in key}
    assert ModelConfig.from_hf(plain).model_type == "qwen2"


def test_keys_of_the_sibling_models_are_kept_and_not_used() -> None:
    more = {
        "empty_loss_weight": 0.01, "local_hidden_dropout": 0.1, "local_rotary_base": 640000, "mlp_layers": 1,
        "n_rvq": 20, "no_speech_loss": False, "no_text_loss": False, "add_input_local_transformer": True,
        "add_speech_sosp_eosp": False, "audio_config": {"d_model": 1024},
    }  # fmt: skip
    raw = preset("mimo-audio-7b") | more
    config = ModelConfig.from_hf(raw)
    assert config.to_hf() == raw
    assert AudioSpec.from_hf(raw) == AudioSpec.from_hf(preset("mimo-audio-7b"))


def test_the_mini_preset_counts_three_and_a_half_million() -> None:
    model = load_model("mimo-audio-mini")
    assert isinstance(model, AudioLM)
    assert sum(p.numel() for p in model.parameters()) == 3_492_192


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"delay_pattern": "0-1"}, "delay_pattern"),
        ({"speech_zeroemb_idx": "10-7-5"}, "speech_zeroemb_idx"),
        ({"audio_token_ids": {}}, "audio_token_ids"),
        ({"local_attn_heads": 5}, "5 heads"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(preset("mimo-audio-mini") | TINY | changes)


def test_one_number_stands_for_all_channels() -> None:
    spec = AudioSpec.from_hf(
        preset("mimo-audio-mini") | TINY | {"speech_vocab_size": 17, "speech_zeroemb_idx": "16"}
    )
    assert (spec.vocab_sizes, spec.empty_ids) == ((17, 17, 17), (16, 16, 16))


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = tiny()
    model.save(tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert isinstance(again, AudioLM)
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == model.config.to_hf()
    layout = document(model.spec)
    assert torch.equal(run(again, layout), run(model, layout))
    batch = lay.pack(model.spec, [layout])
    assert torch.equal(again.loss_parts(batch, WEIGHTS)["total"], model.loss_parts(batch, WEIGHTS)["total"])


def test_a_checkpoint_without_its_patch_decoder_is_refused(tmp_path: Path) -> None:
    model = tiny()
    del model.local_transformer.layers[1]
    model.save(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"local_transformer\.layers\.1"):
        load_model(tmp_path / "m")


# Embedding and masks


def test_the_embedding_follows_the_published_order_of_masks() -> None:
    """Everything through the encoder with masks before and behind it, against ours that skips text."""
    model = tiny()
    spec, layout = model.spec, document(model.spec)
    is_audio = (layout.text_ids_L == spec.tokens.empty).float()[:, None, None]
    total = torch.zeros(len(layout), 4, 16)
    for r in range(3):
        ids = layout.codes_LGR[:, :, r]
        total += F.embedding(ids, model.speech_embeddings[r].weight) * (ids != spec.empty_ids[r])[..., None]
    encoded = model.input_local_transformer(total * is_audio) * is_audio
    want = F.embedding(layout.text_ids_L, model.model.embed_tokens.weight) * (1 - is_audio[:, 0])
    want = want + encoded.flatten(1) @ model.speech_group_downcast.weight.T
    got = model.embed(layout.text_ids_L, layout.codes_LGR)
    assert torch.allclose(got, want, atol=1e-5)


def test_empty_codes_add_exactly_nothing() -> None:
    model = tiny()
    with torch.no_grad():
        for table, empty in zip(model.speech_embeddings, model.spec.empty_ids, strict=True):
            table.weight[empty].fill_(1e30)  # as a checkpoint might hold it
    assert not model.embed_codes(torch.tensor(model.spec.empty_ids).view(1, 1, -1)).any()
    loss = model.loss_parts(lay.pack(model.spec, [document(model.spec)]), WEIGHTS)["total"]
    assert bool(loss.isfinite())


def test_the_text_embedding_of_an_audio_position_is_not_read() -> None:
    model, other = tiny(), tiny()
    with torch.no_grad():
        other.model.embed_tokens.weight[model.spec.tokens.empty] += 1.0
    layout = document(model.spec)
    assert torch.equal(run(model, layout), run(other, layout))


def test_frames_see_their_whole_patch_and_no_other() -> None:
    encoder = tiny().input_local_transformer
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoder(x)[1, 0].square().sum().backward()
    assert x.grad is not None
    reached = x.grad.abs().sum(-1) > 0
    assert reached.tolist() == [[False] * 4, [True] * 4, [False] * 4]


def test_the_encoder_is_causal_where_the_config_says_so() -> None:
    encoder = tiny(input_full_attention=False).input_local_transformer
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoder(x)[0, 1].square().sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(-1) > 0).tolist() == [[True, True, False, False]]


def test_one_encoder_layer_against_its_formula() -> None:
    """Attention of a patch in float64 written out, rotation included."""
    layer = tiny().input_local_transformer.layers[0].double()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).double()
    attention = layer.self_attn
    angle = torch.arange(4.0, dtype=torch.float64)[:, None] * 10000.0 ** -(torch.arange(0, 4, 2).double() / 4)
    cos, sin = angle.cos(), angle.sin()

    def heads(y: Tensor, rotate: bool) -> Tensor:
        y = y.view(4, 4, 4).transpose(0, 1)
        if not rotate:
            return y
        a, b = y[..., :2], y[..., 2:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def project(linear: torch.nn.Module) -> Tensor:
        return x @ linear.weight.T + linear.bias  # type: ignore[operator]

    q, k = heads(project(attention.q_proj), True), heads(project(attention.k_proj), True)
    v = heads(project(attention.v_proj), False)
    weights = ((q @ k.transpose(1, 2)) / 2.0).softmax(-1)
    want = (weights @ v).transpose(0, 1).reshape(4, 16) @ attention.o_proj.weight.T
    from sateen.nn.attention import LayerLinks

    got = attention(x, Sequences.of_lengths([4]), None, LayerLinks())
    assert torch.allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("part", ["local_transformer", "input_local_transformer"])
def test_the_small_transformers_equal_transformers_qwen2(part: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    ours = tiny(local_ffn_dim=64).get_submodule(part)  # the encoder's is four times its width: 64
    config = transformers.Qwen2Config(
        hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000.0, vocab_size=3,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = transformers.Qwen2Model(config).eval()
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["embed_tokens.weight"]
    assert missing.unexpected_keys == []
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(6))
    mask = torch.zeros(3, 1, 4, 4)  # added to the scores
    if part == "local_transformer":
        mask = mask + torch.full((4, 4), -1e9).triu(1)
    with torch.no_grad():
        want = theirs(inputs_embeds=x, attention_mask=mask).last_hidden_state
        assert torch.allclose(ours(x), want, atol=1e-5)


def test_a_future_patch_does_not_change_past_logits() -> None:
    model = tiny()
    layout = document(model.spec)
    changed = layout.codes_LGR.clone()
    last = int((layout.text_ids_L == model.spec.tokens.empty).nonzero()[-1])
    changed[last] = (changed[last] + 1) % 5
    seq = Sequences.of_lengths([len(layout)])
    a = model.hidden(layout.text_ids_L, layout.codes_LGR, seq)
    b = model.hidden(layout.text_ids_L, changed, seq)
    assert torch.equal(a[:last], b[:last])
    assert not torch.allclose(a[last], b[last])


# The patch decoder


def test_teacher_forced_logits_equal_cached_steps() -> None:
    model = tiny()
    spec = model.spec
    codes = draw_codes(spec, 20).view(5, 4, 3)
    hidden = torch.randn(5, 24, generator=torch.Generator().manual_seed(2))
    forced = model.patch_logits(hidden, codes)
    seen: list[list[Tensor]] = [[], [], []]

    def choose(channel: int, logits: Tensor) -> Tensor:
        seen[channel].append(logits)
        return codes[:, len(seen[channel]) - 1, channel]

    assert torch.equal(model.write_patches(hidden, choose), codes)
    for r in range(3):
        assert torch.allclose(torch.stack(seen[r], 1), forced[r], atol=1e-5)


def test_a_code_reads_only_codes_that_were_written_before_it() -> None:
    """The step of frame g of channel r is g + r; logits move with codes of earlier steps and no others."""
    model = tiny()
    codes = draw_codes(model.spec, 4).view(1, 4, 3)
    hidden = torch.randn(1, 24, generator=torch.Generator().manual_seed(2))
    before = model.patch_logits(hidden, codes)
    for g in range(4):
        for r in range(3):
            other = codes.clone()
            other[0, g, r] = (other[0, g, r] + 1) % 5
            after = model.patch_logits(hidden, other)
            for channel in range(3):
                for frame in range(4):
                    moved = not torch.equal(before[channel][0, frame], after[channel][0, frame])
                    assert moved == (frame + channel > g + r), (g, r, frame, channel)


def test_wider_code_embeddings_are_projected() -> None:
    model = tiny(input_local_dim=32)
    assert model.speech_embeddings_to_local is not None
    assert tuple(model.state_dict()["speech_embeddings_to_local.weight"].shape) == (16, 32)
    assert bool(model.loss_parts(lay.pack(model.spec, [document(model.spec)]), WEIGHTS)["total"].isfinite())


def test_a_step_cache_is_as_long_as_its_steps() -> None:
    model = tiny()
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(4))
    cache = StepCache()
    steps = [model.local_transformer(x[:, i : i + 1], cache) for i in range(6)]
    assert cache.length == 6
    assert torch.allclose(torch.cat(steps, 1), model.local_transformer(x), atol=1e-5)


# The loss


@torch.no_grad()
def test_the_loss_of_two_positions_by_hand() -> None:
    """A text position and the patch behind it: -log softmax by hand, weights 100, 12, 8, 6."""
    model = tiny()
    spec = model.spec
    patch = lay.patch_positions(spec, torch.tensor([[1, 2, 3], [4, 5, 0], [6, 1, 2], [7, 3, 4]]))
    layout = lay.join([lay.text_positions(spec, [20]), patch.learnt(spec)])
    parts = model.loss_parts(lay.pack(spec, [layout]), WEIGHTS)

    h = run(model, layout).double()
    text_logits = h[0] @ model.lm_head.weight.double().T
    # A lone target counts fully however small its weight: the sum is divided by the sum of weights.
    text = float(torch.logsumexp(text_logits, 0) - text_logits[spec.tokens.empty])
    inputs = torch.zeros(1, 6, 16)
    inputs[0, 0] = model.hidden_states_downcast(run(model, layout)[0])
    for step in range(5):
        for r in range(3):
            if 0 <= step - r < 4:
                inputs[0, step + 1] += model.speech_embeddings[r].weight[patch.codes_LGR[0, step - r, r]]
    states = model.local_transformer(inputs)[0].double()
    codes = []
    for r in range(3):
        total = 0.0
        for g in range(4):
            logits = states[g + r] @ model.local_transformer_lm_heads[r].weight.double().T
            total += float(torch.logsumexp(logits, 0) - logits[patch.codes_LGR[0, g, r]])
        codes.append(total / 4)
    assert float(parts["text"]) == pytest.approx(text, rel=1e-5)
    assert [float(parts[f"code_{r}"]) for r in range(3)] == pytest.approx(codes, rel=1e-5)
    want = (100 * text + 12 * codes[0] + 8 * codes[1] + 6 * codes[2]) / 126
    assert float(parts["total"]) == pytest.approx(want, rel=1e-5)


def test_weights_for_other_channels_are_refused() -> None:
    model = tiny()
    with pytest.raises(ShapeError, match="3 audio channels"):
        model.loss_parts(lay.pack(model.spec, [document(model.spec)]), LossWeights())


def test_the_published_weights_add_up_to_136() -> None:
    weights = LossWeights()
    assert weights.text + sum(weights.channels) == 136
    assert weights.empty_text == 0.01


def test_empty_targets_weigh_a_hundredth() -> None:
    model = tiny()
    spec = model.spec
    layout = lay.join([lay.text_positions(spec, [20]), lay.patch_positions(spec, draw_codes(spec, 8))])
    layout = lay.join([layout, lay.text_positions(spec, [21])]).learnt(spec, audio=False)
    losses = F.cross_entropy(model.logits(run(model, layout))[:3], layout.text_ids_L[1:], reduction="none")
    want = (0.01 * losses[0] + 0.01 * losses[1] + losses[2]) / 1.02
    parts = model.loss_parts(lay.pack(spec, [layout]), WEIGHTS)
    assert parts["total"].item() == pytest.approx(want.item(), rel=1e-5)
    assert set(parts) == {"total", "text"}  # no patch is learnt: the text loss alone, not divided by 136


def test_text_alone_is_a_plain_decoders_loss_and_logits() -> None:
    model = tiny()
    ids = torch.tensor([[20, 21, 22, 23, 24]])
    plain = Decoder(model.config)
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith(("model.", "lm_head"))}
    )
    assert torch.equal(model(ids).logits, plain(ids).logits)
    layout = lay.text_positions(model.spec, ids[0].tolist()).learnt(model.spec)
    want = F.cross_entropy(plain(ids).logits[0, :-1], ids[0, 1:])
    assert model.loss_parts(lay.pack(model.spec, [layout]), WEIGHTS)["total"].item() == pytest.approx(
        want.item(), rel=1e-5
    )


def test_a_text_only_stage_trains_no_patch_decoder() -> None:
    model = tiny()
    batch = lay.pack(model.spec, [document(model.spec)])
    parts = model.loss_parts(batch, LossWeights(channels=(0.0, 0.0, 0.0)))
    parts["total"].backward()
    assert set(parts) == {"total", "text"}
    touched = {part_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert touched == {"encoder", "trunk"}


def test_every_parameter_learns_from_both_kinds_of_loss() -> None:
    model = tiny()
    model.loss_parts(lay.pack(model.spec, [document(model.spec)]), WEIGHTS)["total"].backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == set()
    assert {part_of(name) for name, _ in model.named_parameters()} == {"encoder", "trunk", "decoder"}


def test_a_packed_batch_equals_its_sequences() -> None:
    model = tiny()
    spec = model.spec
    layouts = [document(spec, seed) for seed in range(3)] + [lay.text_positions(spec, range(20, 27))]
    batch = lay.pack(spec, layouts)
    whole = model.hidden(batch.text_ids_L, batch.codes_LGR, Sequences(batch.cu_seqlens, batch.position_ids))
    singles = torch.cat([run(model, layout) for layout in layouts])
    assert torch.allclose(whole, singles, atol=1e-5)
    patches = [lay.pack(spec, [layout]).patches_P for layout in layouts]
    parts = [model.loss_parts(lay.pack(spec, [layout]), WEIGHTS) for layout in layouts[:3]]
    packed = model.loss_parts(batch, WEIGHTS)
    counts = torch.tensor([float(len(p)) for p in patches[:3]])
    for r in range(3):
        mean = sum(n * p[f"code_{r}"] for n, p in zip(counts, parts, strict=True)) / counts.sum()
        assert packed[f"code_{r}"].item() == pytest.approx(float(mean), rel=1e-5)


def test_a_random_subset_of_patches_estimates_the_same_loss() -> None:
    """The mean over all subsets of two is the mean over all patches; drawn often enough it comes close."""
    model = tiny()
    batch = lay.pack(model.spec, [document(model.spec)])
    with torch.no_grad():
        whole = model.loss_parts(batch, WEIGHTS)
        generator = torch.Generator().manual_seed(0)
        drawn = [model.loss_parts(batch, WEIGHTS, max_patches=2, generator=generator) for _ in range(80)]
        values = torch.tensor([float(parts["code_0"]) for parts in drawn])
        assert len(set(values.tolist())) > 5
        spread = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - float(whole["code_0"])) < 4 * spread
        again = model.loss_parts(batch, WEIGHTS, max_patches=2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again["total"], drawn[0]["total"])
