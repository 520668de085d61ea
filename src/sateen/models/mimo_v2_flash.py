"""MiMo-V2-Flash: sliding and full attention, sinks, a mixture of experts and MTP heads.

Reads both spellings of its config: the hub's (`hybrid_layer_pattern`, `swa_*`, a window of *earlier*
keys) and transformers' (`layer_types`, `rope_parameters`, a window that counts the query's own key).
Source: arXiv 2601.02780 §2, Table 1; the released checkpoint's tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sateen.errors import ConfigError
from sateen.models.base import Entry, Family, ModelConfig, layer_types, rope_theta
from sateen.nn.spec import LayerSpec, MoESpec, MTPSpec

KEYS = frozenset(
    "add_full_attention_sink_bias add_swa_attention_sink_bias attention_bias attention_chunk_size "
    "attention_value_scale head_dim hidden_act hybrid_block_size hybrid_layer_pattern intermediate_size "
    "layer_types layernorm_epsilon mlp_layer_types moe_intermediate_size moe_layer_freq n_group "
    "n_routed_experts n_shared_experts norm_topk_prob num_attention_heads num_experts_per_tok "
    "num_key_value_heads num_local_experts num_nextn_predict_layers partial_rotary_factor rms_norm_eps "
    "rope_parameters rope_scaling rope_theta routed_scaling_factor scoring_func sliding_window "
    "sliding_window_size swa_head_dim swa_num_attention_heads swa_num_key_value_heads swa_rope_theta "
    "swa_v_head_dim topk_group topk_method v_head_dim quantization_config mtp_intermediate_size".split()
)
NAMES = MappingProxyType(
    {
        "embedding_norm": "enorm",
        "hidden_norm": "hnorm",
        "join": "eh_proj",
        "mlp_norm": "pre_mlp_layernorm",
        "final_norm": "final_layernorm",
    }
)
FIXED = {
    "hidden_act": ("silu", "silu"),
    "scoring_func": ("sigmoid", "sigmoid"),
    "topk_method": ("noaux_tc", "noaux_tc"),
    "n_group": (1, 1),
    "topk_group": (1, 1),
    "n_shared_experts": (None, 0),
}


def _kinds(raw: Mapping[str, Any]) -> list[bool]:
    """For each layer, whether its attention slides."""
    count = int(raw["num_hidden_layers"])
    if (pattern := raw.get("hybrid_layer_pattern")) is not None:
        slides = [bool(bit) for bit in pattern]
    elif (types := layer_types(raw, count)) is not None:
        slides = [kind == "sliding_attention" for kind in types]
    else:
        slides = [i != 0 and (i + 1) % 6 != 0 for i in range(count)]
    if len(slides) != count:
        raise ConfigError(f"config.json: {len(slides)} layer kinds for num_hidden_layers {count}")
    return slides


def _moe_flags(raw: Mapping[str, Any]) -> list[bool]:
    count = int(raw["num_hidden_layers"])
    if (freq := raw.get("moe_layer_freq")) is not None:
        flags = [bool(bit) for bit in freq]
    elif (types := layer_types(raw, count, "mlp_layer_types", ("dense", "sparse"))) is not None:
        flags = [kind == "sparse" for kind in types]
    else:
        flags = [i > 0 for i in range(count)]
    if len(flags) != count:
        raise ConfigError(f"config.json: {len(flags)} MLP kinds for num_hidden_layers {count}")
    return flags


def _window(raw: Mapping[str, Any]) -> int:
    """Keys a sliding query sees, its own included.

    The hub's number counts earlier keys only: the vendor's reference server (SGLang) masks that way, so
    128 is 129 keys. transformers' `sliding_window` already includes the query's key.
    """
    if raw.get("sliding_window_size") is not None:
        return int(raw["sliding_window_size"]) + 1
    if "hybrid_layer_pattern" in raw:
        return int(raw["sliding_window"]) + 1
    return int(raw.get("sliding_window", 129))


def _layer(raw: Mapping[str, Any], index: int, slides: bool, moe: MoESpec | None) -> LayerSpec:
    transformers_dialect = "hybrid_layer_pattern" not in raw and "swa_num_key_value_heads" not in raw
    kind = "sliding_attention" if slides else "full_attention"

    def pick(key: str, default: Any) -> Any:
        value = raw.get(f"swa_{key}") if slides else None
        return raw.get(key, default) if value is None else value

    kv_heads = int(pick("num_key_value_heads", 4))
    if slides and transformers_dialect:
        kv_heads = 2 * int(raw["num_key_value_heads"])  # transformers fixes the ratio in its code
    rope = raw.get("rope_parameters") or {}
    partial = rope.get(kind, {}).get("partial_rotary_factor", raw.get("partial_rotary_factor", 0.334))
    head_dim = int(pick("head_dim", 192))
    theta = rope_theta(raw, 5e6, kind)
    if slides and kind not in rope:
        theta = float(raw.get("swa_rope_theta", 1e4))
    sink_key = "add_swa_attention_sink_bias" if slides else "add_full_attention_sink_bias"
    scale = raw.get("attention_value_scale", 0.707)
    return LayerSpec(
        index=index,
        attention=kind,
        num_attention_heads=int(pick("num_attention_heads", 64)),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=int(pick("v_head_dim", 128)),
        rope_theta=theta,
        rotary_dim=int(head_dim * partial),
        window=_window(raw) if slides else None,
        has_sink=bool(raw.get(sink_key, slides)),
        qkv_bias=bool(raw.get("attention_bias", False)),
        value_scale=1.0 if scale is None else float(scale),
        intermediate_size=int(raw["intermediate_size"]),
        moe=moe,
    )


def mtp(config: ModelConfig, num_heads: int) -> MTPSpec:
    """`num_heads` heads with the geometry of a sliding layer and a dense MLP.

    The paper does not print the MLP's width; 0.33B parameters per head force `intermediate_size`. Small
    models may set `mtp_intermediate_size` (ours). A model without sliding layers gets full attention in
    its heads.
    """
    slides = any(spec.attention == "sliding_attention" for spec in config.specs)
    layer = _layer(config.raw, config.num_hidden_layers, slides, None)
    width = int(config.raw.get("mtp_intermediate_size") or layer.intermediate_size)
    layer = replace(layer, intermediate_size=width)
    return MTPSpec(num_heads, layer, order="embedding", is_chained=False, path="mtp.layers", names=NAMES)


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    for key, accepted in FIXED.items():
        if raw.get(key, accepted[0]) not in accepted:
            raise ConfigError(f"config.json: {key} {raw[key]!r} is not supported; accepted: {accepted[0]!r}")
    scaling = raw.get("routed_scaling_factor")
    moe = MoESpec(
        num_experts=int(raw.get("n_routed_experts", raw.get("num_local_experts", 256))),
        experts_per_token=int(raw.get("num_experts_per_tok", 8)),
        intermediate_size=int(raw.get("moe_intermediate_size", 2048)),
        norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
        routed_scaling_factor=1.0 if scaling is None else float(scaling),
    )
    flags = _moe_flags(raw)
    config = ModelConfig(
        model_type="mimo_v2_flash",
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        rms_norm_eps=float(raw.get("layernorm_epsilon", raw.get("rms_norm_eps", 1e-5))),
        max_position_embeddings=int(raw.get("max_position_embeddings", 262144)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        specs=tuple(
            _layer(raw, i, slides, moe if flags[i] else None) for i, slides in enumerate(_kinds(raw))
        ),
        mtp=None,
        raw=raw,
    )
    heads = int(raw.get("num_nextn_predict_layers") or 0)
    return replace(config, mtp=mtp(config, heads)) if heads else config


def entries(name: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    """Stacked experts are one tensor per expert in the checkpoint; everything else keeps its name."""
    match = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_proj|up_proj|down_proj)", name)
    if match is None:
        yield Entry(name, None)
        return
    for expert in range(shape[0]):
        yield Entry(f"{match[1]}.{expert}.{match[2]}.weight", expert)


FAMILY = Family(parse=parse, keys=KEYS, entries=entries, mtp=mtp)
