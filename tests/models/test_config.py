"""Configs: published parameter counts and tensor names, misspelt keys, values that are refused."""

from __future__ import annotations

import logging

import pytest
import torch

from sateen.checkpoint.load import parameter_entries
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.models.presets import PRESETS
from sateen.models.registry import preset

TINY = {
    "model_type": "qwen2", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def on_meta(name):
    with torch.device("meta"):
        return Decoder(ModelConfig.from_hf(preset(name)))


def stored(model):
    """Checkpoint tensor name -> shape."""
    return {
        entry.name: tuple(tensor.shape if entry.index is None else tensor.shape[1:])
        for _, tensor, entry in parameter_entries(model)
    }


def test_mimo_7b_has_the_published_tensors():
    model = on_meta("mimo-7b")
    assert count_parameters(model) == {"total": 7_622_619_136, "mtp": 210_790_400, "active": 7_622_619_136}
    D, W = 4096, 11008
    want = {
        "model.embed_tokens.weight": (151680, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (151680, D),
    }
    block = {
        "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
        "self_attn.q_proj.weight": (D, D), "self_attn.q_proj.bias": (D,),
        "self_attn.k_proj.weight": (1024, D), "self_attn.k_proj.bias": (1024,),
        "self_attn.v_proj.weight": (1024, D), "self_attn.v_proj.bias": (1024,),
        "self_attn.o_proj.weight": (D, D),
        "mlp.gate_proj.weight": (W, D), "mlp.up_proj.weight": (W, D), "mlp.down_proj.weight": (D, W),
    }  # fmt: skip
    for layer in range(36):
        want |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    extra = {f"{n}.weight": (D,) for n in ("token_layernorm", "hidden_layernorm", "final_layernorm")}
    extra["input_proj.weight"] = (D, 2 * D)
    want |= {f"model.mtp_layers.0.{name}": shape for name, shape in (block | extra).items()}
    assert len(want) == 451
    assert stored(model) == want


def test_mimo_v2_flash_has_the_published_tensors():
    model = on_meta("mimo-v2-flash")
    counts = count_parameters(model)
    assert round(counts["total"] / 1e9, 2) == 308.78
    assert round(counts["mtp"] / 3 / 1e9, 4) == 0.3293
    assert round(counts["active"] / 1e9, 2) == 15.45

    D, dense, wide = 4096, 16384, 2048
    want = {
        "model.embed_tokens.weight": (152576, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (152576, D),
    }

    def attention(kv_heads):
        q, k, v = 64 * 192, kv_heads * 192, kv_heads * 128
        shapes = {f"self_attn.{x}_proj.weight": (n, D) for x, n in (("q", q), ("k", k), ("v", v))}
        return shapes | {"self_attn.o_proj.weight": (D, 8192)}

    sliding = attention(8) | {"self_attn.attention_sink_bias": (64,)}
    mlp = {
        "mlp.gate_proj.weight": (dense, D),
        "mlp.up_proj.weight": (dense, D),
        "mlp.down_proj.weight": (D, dense),
    }
    moe = {"mlp.gate.weight": (256, D), "mlp.gate.e_score_correction_bias": (256,)}
    for expert in range(256):
        moe |= {f"mlp.experts.{expert}.{x}_proj.weight": (wide, D) for x in ("gate", "up")}
        moe[f"mlp.experts.{expert}.down_proj.weight"] = (D, wide)
    for layer in range(48):
        block = attention(4) if layer in (0, 5, 11, 17, 23, 29, 35, 41, 47) else sliding
        block = block | (mlp if layer == 0 else moe)
        block |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        want |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
    head = sliding | mlp | {f"{name}.weight": (D,) for name in norms} | {"eh_proj.weight": (D, 2 * D)}
    for k in range(3):
        want |= {f"model.mtp.layers.{k}.{name}": shape for name, shape in head.items()}
    assert stored(model) == want
    assert model.config.layers()[1].value_scale == 0.707
    assert {spec.rotary_dim for spec in model.config.layers()} == {64}
    assert [spec.rope_theta for spec in model.config.layers()[:2]] == [5e6, 1e4]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_and_do_not_share_their_dictionaries(name):
    config = ModelConfig.from_hf(preset(name))
    assert config.to_hf() == PRESETS[name]
    config.to_hf()["hidden_size"] = -1
    assert config.to_hf() == PRESETS[name]


def test_caches_cover_every_layer_and_head():
    layouts = ModelConfig.from_hf(preset("mimo-v2-flash")).kv_layouts()
    assert len(layouts) == 48 + 3
    assert [layer[0].kind for layer in layouts[:7]] == [
        "paged",
        "ring",
        "ring",
        "ring",
        "ring",
        "paged",
        "ring",
    ]
    assert [layer[0].kind for layer in layouts[48:]] == ["ring"] * 3
    assert {layer[0].row_elements for layer in layouts if layer[0].kind == "paged"} == {1280}
    assert {(layer[0].row_elements, layer[0].window) for layer in layouts if layer[0].kind == "ring"} == {
        (2560, 129)
    }


def test_a_misspelt_key_is_refused_with_the_nearest():
    raw = {k: v for k, v in TINY.items() if k != "num_hidden_layers"} | {"num_hidden_layer": 2}
    with pytest.raises(
        ConfigError, match=r"my\.json: num_hidden_layer is not .* did you mean num_hidden_layers\?"
    ):
        ModelConfig.from_hf(raw, origin="my.json")


def test_an_unknown_key_that_resembles_nothing_is_kept_and_named(caplog):
    with caplog.at_level(logging.INFO, logger="sateen.models"):
        config = ModelConfig.from_hf(TINY | {"zebra": {"stripes": 3}})
    assert config.to_hf()["zebra"] == {"stripes": 3}
    assert [record.getMessage() for record in caplog.records] == ["config.json: kept but not used: zebra"]


def test_a_missing_key_and_an_unknown_family_say_so():
    with pytest.raises(ConfigError, match="intermediate_size is missing for 'qwen2'"):
        ModelConfig.from_hf({k: v for k, v in TINY.items() if k != "intermediate_size"})
    with pytest.raises(
        ConfigError, match=r"unknown model_type 'qwen22'; did you mean qwen2\? \(known: .*llama"
    ):
        ModelConfig.from_hf(TINY | {"model_type": "qwen22"})
    with pytest.raises(ConfigError, match=r"'mimo_v2' .*fuses q.*readable: the MiMo-V2-Flash"):
        ModelConfig.from_hf(TINY | {"model_type": "mimo_v2"})
    with pytest.raises(ConfigError, match=r"unknown preset 'mimo-7c'; did you mean mimo-7b\?"):
        preset("mimo-7c")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; accepted: 'silu'"),
        ({"mlp_bias": True}, "mlp_bias and use_mrope are not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type 'yarn' is not supported"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            r"layer_types\[1\] 'chunked_attention' is not",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types lists 1 layers for num_hidden_layers 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not set"),
    ],
)
def test_what_the_family_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(TINY | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported; accepted: 'sigmoid'"),
        ({"n_group": 4}, "n_group 4 is not supported; accepted: 1"),
        ({"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
        ({"hybrid_layer_pattern": [0, 1]}, "2 layer kinds for num_hidden_layers 6"),
        ({"moe_layer_freq": [0, 1]}, "2 MLP kinds for num_hidden_layers 6"),
        (
            {"moe_layer_freq": None, "mlp_layer_types": ["dense"] * 5 + ["spares"]},
            r"mlp_layer_types\[5\] 'spares'",
        ),
    ],
)
def test_what_mimo_v2_flash_cannot_do_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(preset("mimo-v2-flash-tiny") | changes)


def test_heads_are_counted_from_tensor_names_only_where_the_config_is_silent():
    raw = preset("mimo-v2-flash-tiny")
    names = [f"model.mtp.layers.{k}.enorm.weight" for k in range(2)] + ["model.mtp.layers.1.hnorm.weight"]
    assert ModelConfig.from_hf(raw, tensor_names=names).num_mtp_heads == 3
    del raw["num_nextn_predict_layers"]
    assert ModelConfig.from_hf(raw, tensor_names=names).num_mtp_heads == 2
    assert ModelConfig.from_hf(raw, tensor_names=["model.norm.weight"]).num_mtp_heads == 0
    assert ModelConfig.from_hf(raw | {"num_nextn_predict_layers": 0}, tensor_names=names).num_mtp_heads == 0


def test_tied_weights_are_counted_once():
    counts = []
    for tie in (False, True):
        with torch.device("meta"):
            model = Decoder(ModelConfig.from_hf(preset("mimo-7b-tiny") | {"tie_word_embeddings": tie}))
        counts.append(count_parameters(model)["total"])
    assert counts[0] - counts[1] == 512 * 64
