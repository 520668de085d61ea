"""The two spellings of MiMo-V2-Flash's config.json, each written from the other.

Tensors have the hub's names in both. The hub counts earlier keys in its window and spells out what differs
between sliding and full layers; transformers counts the query's own key too and fixes the rest in its code.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.base import ModelConfig
from sateen.models.mimo_v2_flash import parse
from sateen.nn.spec import LayerSpec

DIALECTS = ("hub", "transformers")
HUB_ONLY = frozenset(
    "add_full_attention_sink_bias add_swa_attention_sink_bias hybrid_layer_pattern layernorm_epsilon "
    "moe_layer_freq partial_rotary_factor rope_scaling rope_theta scoring_func sliding_window "
    "sliding_window_size swa_head_dim swa_num_attention_heads swa_num_key_value_heads swa_rope_theta "
    "swa_v_head_dim topk_method".split()
)
TRANSFORMERS_ONLY = frozenset(
    "layer_types mlp_layer_types rms_norm_eps rope_parameters sliding_window".split()
)


def in_dialect(config: ModelConfig, dialect: str) -> ModelConfig:
    """The same model with its dictionary in `hub` or `transformers` words.

    Keys that belong to neither spelling stay as they are.

    Raises:
        ConfigError: another family or dialect, or a model that transformers' code cannot express.
    """
    if dialect not in DIALECTS:
        raise ConfigError(unknown_name("dialect", dialect, DIALECTS))
    if config.model_type != "mimo_v2_flash":
        raise ConfigError(
            f"--dialect is for mimo_v2_flash, whose config has two spellings; this is {config.model_type}"
        )
    full = next((spec for spec in config.specs if spec.window is None), None)
    slides = next((spec for spec in config.specs if spec.window is not None), None)
    either = full or slides
    assert either is not None
    full, slides = full or either, slides or either
    kept = {key: value for key, value in config.raw.items() if key not in HUB_ONLY | TRANSFORMERS_ONLY}
    kept |= {"model_type": "mimo_v2_flash"} | _heads("", full)
    words = _hub(config, full, slides) if dialect == "hub" else _transformers(config, full, slides)
    written = ModelConfig.from_hf(kept | words, origin=f"config.json in {dialect} words")
    if written.layers() != config.layers() or written.mtp != config.mtp:
        theirs = zip(written.layers(), config.layers(), strict=True)
        first = next((new.index for new, old in theirs if new != old), len(config.specs))
        raise ConfigError(f"layer {first} of this model cannot be written in {dialect} words")
    return written


def misread_by_transformers(config: ModelConfig) -> list[str]:
    """What transformers 5.23 would read differently from this config, as our words for it; empty for most.

    Of the hub's own words it reads the window alone and takes the release's values for the others. It stops
    at the key `rope_scaling`, whatever its value.
    """
    if "hybrid_layer_pattern" not in config.raw:
        return []
    unread = HUB_ONLY - {"sliding_window", "sliding_window_size"}
    kept = {key: value for key, value in config.raw.items() if key not in unread}
    try:
        seen = parse({"num_key_value_heads": 4} | kept)
    except ConfigError:  # both spellings in one file, and they contradict
        return ["layer_types"]
    pairs = list(zip(seen.specs, config.specs, strict=True))
    names = [field.name for field in fields(LayerSpec)]
    found = {name for new, old in pairs for name in names if getattr(new, name) != getattr(old, name)}
    if seen.rms_norm_eps != config.rms_norm_eps:
        found.add("rms_norm_eps")
    return sorted(found | ({"rope_scaling"} & config.raw.keys()))


def _heads(prefix: str, spec: LayerSpec) -> dict[str, int]:
    return {
        f"{prefix}num_attention_heads": spec.num_attention_heads,
        f"{prefix}num_key_value_heads": spec.num_key_value_heads,
        f"{prefix}head_dim": spec.head_dim,
        f"{prefix}v_head_dim": spec.v_head_dim,
    }


def _routed_scale(config: ModelConfig) -> float:
    return next((spec.moe.routed_scaling_factor for spec in config.specs if spec.moe), 1.0)


def _partial(spec: LayerSpec) -> float:
    """A share of the head that gives this many rotated channels; the published one where it does."""
    published = 0.334
    same = int(spec.head_dim * published) == spec.rotary_dim
    return published if same else (spec.rotary_dim + 0.5) / spec.head_dim


def _hub(config: ModelConfig, full: LayerSpec, slides: LayerSpec) -> dict[str, Any]:
    return _heads("swa_", slides) | {
        "add_full_attention_sink_bias": full.has_sink and full.window is None,
        "add_swa_attention_sink_bias": slides.has_sink and slides.window is not None,
        "hybrid_layer_pattern": [int(spec.window is not None) for spec in config.specs],
        "layernorm_epsilon": config.rms_norm_eps,
        "moe_layer_freq": [int(spec.is_moe) for spec in config.specs],
        "partial_rotary_factor": _partial(full),
        "rope_theta": full.rope_theta,
        "routed_scaling_factor": None if _routed_scale(config) == 1.0 else _routed_scale(config),
        "scoring_func": "sigmoid",
        "sliding_window": (slides.window or 1) - 1,
        "sliding_window_size": (slides.window or 1) - 1,
        "swa_rope_theta": slides.rope_theta,
        "topk_method": "noaux_tc",
    }


def _transformers(config: ModelConfig, full: LayerSpec, slides: LayerSpec) -> dict[str, Any]:
    kinds = {"full_attention": full, "sliding_attention": slides}
    return {
        "layer_types": [spec.attention for spec in config.specs],
        "mlp_layer_types": ["sparse" if spec.is_moe else "dense" for spec in config.specs],
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {
            kind: {
                "rope_type": "default",
                "rope_theta": spec.rope_theta,
                "partial_rotary_factor": _partial(spec),
            }
            for kind, spec in kinds.items()
        },
        "routed_scaling_factor": _routed_scale(config),
        "sliding_window": slides.window or 1,
    }
