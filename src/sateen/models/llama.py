"""Llama, Mistral, Qwen2 and Qwen3 (dense): one attention kind, SwiGLU, no MTP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sateen.errors import ConfigError
from sateen.models.base import Family, ModelConfig, layer_types, plain_entries, rope_theta
from sateen.nn.spec import LayerSpec

KEYS = frozenset(
    "attention_bias head_dim hidden_act intermediate_size max_window_layers mlp_bias num_attention_heads "
    "num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window use_mrope "
    "use_sliding_window layer_types".split()
)
# What the families do when their config does not say.
BIAS = {"llama": False, "mistral": False, "qwen2": True, "qwen3": False, "mimo": True}
DEFAULT_THETA = {"llama": 10000.0, "mistral": 10000.0, "qwen2": 10000.0, "qwen3": 10000.0, "mimo": 10000.0}


def dense_layers(raw: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The trunk of a dense Llama-shaped model."""
    kind = raw["model_type"]
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; accepted: 'silu'")
    if raw.get("mlp_bias") or raw.get("use_mrope"):
        raise ConfigError("config.json: mlp_bias and use_mrope are not supported; accepted: false")
    heads = int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or raw["hidden_size"] // heads)
    bias = bool(raw.get("attention_bias", BIAS[kind]))
    windowed = kind == "mistral" or bool(raw.get("use_sliding_window"))
    window = raw.get("sliding_window", 4096) if windowed else None
    first_windowed = int(raw.get("max_window_layers", 28)) if kind != "mistral" else 0
    count = int(raw["num_hidden_layers"])
    types = layer_types(raw, count)
    layers = []
    for index in range(count):
        slides = (
            types[index] == "sliding_attention" if types else window is not None and index >= first_windowed
        )
        if slides and window is None:
            raise ConfigError(
                f"config.json: layer_types[{index}] is sliding_attention but sliding_window is not set"
            )
        layers.append(
            LayerSpec(
                index=index,
                attention="sliding_attention" if slides else "full_attention",
                num_attention_heads=heads,
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=head_dim,
                v_head_dim=head_dim,
                rope_theta=rope_theta(raw, DEFAULT_THETA[kind]),
                rotary_dim=head_dim,
                window=int(window) if slides and window is not None else None,
                qkv_bias=bias,
                o_bias=bias and kind in ("llama", "qwen3"),
                qk_norm=kind == "qwen3",
                intermediate_size=int(raw["intermediate_size"]),
            )
        )
    return tuple(layers)


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        model_type=raw["model_type"],
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        specs=dense_layers(raw),
        mtp=None,
        raw=raw,
    )


FAMILY = Family(parse=parse, keys=KEYS, entries=plain_entries)
