"""Whole models against transformers' on tiny random weights."""

from __future__ import annotations

import json

import pytest
import torch

from sateen.checkpoint.hf import load_model
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder

ROPE = {"rope_type": "default", "rope_theta": 500.0}
FLASH = {
    "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16, "sliding_window": 9,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
}  # fmt: skip
# family -> transformers' config class and its arguments; every window is shorter than the test's sequences.
FAMILIES = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 3, "rope_parameters": ROPE}),
    "llama with biases": ("LlamaConfig", {"num_hidden_layers": 2, "attention_bias": True, "head_dim": 12}),
    "llama, tied": ("LlamaConfig", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"num_hidden_layers": 3, "sliding_window": 7, "head_dim": 8}),
    "mistral, no window": ("MistralConfig", {"num_hidden_layers": 2, "sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {"num_hidden_layers": 3, "rope_parameters": ROPE}),
    "qwen2 with windows": (
        "Qwen2Config",
        {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"num_hidden_layers": 3, "head_dim": 16}),
    "qwen3 with windows": (
        "Qwen3Config",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 7,
            "max_window_layers": 2,
        },
    ),
    "qwen3 with biases": ("Qwen3Config", {"num_hidden_layers": 2, "head_dim": 16, "attention_bias": True}),
    "mimo_v2_flash": ("MiMoV2FlashConfig", FLASH),
    "mimo_v2_flash, scaled": (
        "MiMoV2FlashConfig",
        FLASH | {"routed_scaling_factor": 2.5, "attention_value_scale": None, "norm_topk_prob": False},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_match_transformers(name, build, tokens, assert_close, tmp_path):
    theirs = build(*FAMILIES[name])
    ours = load_model(tmp_path)
    ids = tokens(3, 33)
    lengths = torch.tensor([33, 20, 1])
    right = torch.arange(33) < lengths[:, None]
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)
        for mask in (right, right.flip(1)):
            got, want = ours(ids, mask.long()).logits, theirs(ids, attention_mask=mask.long()).logits
            assert_close(got[mask], want[mask])
            assert got[~mask].eq(0).all()


@pytest.mark.parametrize("drop", [[], ["sliding_window_size"], ["sliding_window"]])
def test_the_hub_dialect_is_the_same_model(drop, hub, build, tokens, assert_close, tmp_path):
    theirs = build("MiMoV2FlashConfig", FLASH)
    before = load_model(tmp_path).config
    words = {key: value for key, value in hub.items() if key not in drop}
    (tmp_path / "config.json").write_text(json.dumps(words))
    ours = load_model(tmp_path)
    assert ours.config.layers() == before.layers()
    ids = tokens(2, 33)
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        # The hub's 128 counts earlier keys: row 128 still sees token 0, row 129 does not.
        ({"hybrid_layer_pattern": [1], "sliding_window": 128, "sliding_window_size": 128}, 128),
        ({"hybrid_layer_pattern": [1], "sliding_window": 128}, 128),
        # transformers' number includes the query's own key.
        ({"layer_types": ["sliding_attention"], "sliding_window": 128}, 127),
        ({"layer_types": ["sliding_attention"], "sliding_window": 129}, 128),
        ({"layer_types": ["sliding_attention"], "sliding_window": 129, "sliding_window_size": 128}, 128),
    ],
)
def test_the_window_ends_where_its_dialect_says(changes, last, randomise, tokens):
    raw = {
        "model_type": "mimo_v2_flash", "vocab_size": 11, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12,
        "v_head_dim": 8, "moe_layer_freq": [0], "rms_norm_eps": 1e-5, **changes,
    }  # fmt: skip
    if "hybrid_layer_pattern" in changes:
        raw |= {
            "swa_num_key_value_heads": 2,
            "swa_num_attention_heads": 2,
            "swa_head_dim": 12,
            "swa_v_head_dim": 8,
        }
    model = Decoder(ModelConfig.from_hf(raw))
    assert model.config.layers()[0].window == last + 1
    randomise(sorted(model.state_dict().items()))
    ids = tokens(1, 131) % 11
    with torch.no_grad():
        before = model(ids).logits[0]
        ids[0, 0] = (ids[0, 0] + 1) % 11
        changed = (model(ids).logits[0] != before).any(-1)
    assert changed[[127, 128, 129, 130]].tolist() == [t <= last for t in (127, 128, 129, 130)]
