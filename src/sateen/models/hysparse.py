"""HySparse and HySparse2: full layers that choose keys, sparse layers that read the chosen rows.

Source: arXiv 2602.03560 §3 and Table 1; HySparse2, arXiv 2609.26368. No checkpoint was released, so the
config words and tensor names are ours, in Hugging Face's manner. Ours as well, because the papers leave them
open: `gate_granularity`, `sink_sa` and `sink_swa` apart, `swa_num_key_value_heads`, `swa_rope_theta` and the
partial rotary factors of HySparse, everything of the MLPs but the number of experts, `sparse_bridge_source`,
and the form of MTP heads. `share_kv_sa` and `share_kv_swa` select the rows of Table 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from sateen.errors import ConfigError
from sateen.models.base import Family, ModelConfig, layer_types, rope_theta
from sateen.models.mimo_v2_flash import NAMES, entries
from sateen.nn.spec import LayerSpec, MoESpec, MTPSpec

KEYS = frozenset(
    "attention_bias gate_granularity gqa_score_reduce head_dim hidden_act intermediate_size layer_types "
    "moe_intermediate_size moe_layer_freq mtp_intermediate_size n_routed_experts norm_topk_prob "
    "num_attention_heads num_experts_per_tok num_key_value_heads num_nextn_predict_layers "
    "partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta routed_scaling_factor "
    "scoring_func share_kv_sa share_kv_swa sink_sa sink_swa sliding_window sparse_block_size sparse_bridge "
    "sparse_bridge_source sparse_local sparse_score sparse_select sparse_topk_tokens swa_num_key_value_heads "
    "swa_output_gate swa_partial_rotary_factor swa_rope_theta v_head_dim".split()
)
KINDS = ("full_attention", "sliding_attention", "sparse_attention")
# Key -> accepted values, the first when absent.
WORDS = {
    "hidden_act": ("silu",),
    "scoring_func": ("sigmoid",),
    "sparse_score": ("max",),
    "gqa_score_reduce": ("max", "mean"),
    "share_kv_sa": (True, False),
    "share_kv_swa": (False, True),
    "sparse_select": ("block", "token"),
    "sparse_local": ("gated", "forced", "none"),
    "gate_granularity": ("head", "element"),
}


def _word(raw: Mapping[str, Any], key: str) -> Any:
    accepted = WORDS[key]
    value = raw.get(key, accepted[0])
    if value not in accepted:
        words = ", ".join(map(repr, accepted))
        raise ConfigError(f"config.json: {key} {value!r} is not supported; accepted: {words}")
    return value


def _sources(kinds: list[str]) -> dict[int, int]:
    """Sparse layer -> the full layer before it."""
    found: dict[int, int] = {}
    last: int | None = None
    for index, kind in enumerate(kinds):
        if kind == "full_attention":
            last = index
        elif kind == "sparse_attention":
            if last is None:
                raise ConfigError(
                    f"config.json: layer_types[{index}] is sparse_attention with no full_attention before "
                    "it, whose keys it would read; let a full layer come first"
                )
            found[index] = last
    return found


def _budget(raw: Mapping[str, Any]) -> tuple[int, int]:
    """Keys per block and blocks per query; single tokens are blocks of 1."""
    size = 1 if _word(raw, "sparse_select") == "token" else int(raw.get("sparse_block_size", 64))
    tokens = int(raw.get("sparse_topk_tokens", 1024))
    if size < 1 or tokens < size or tokens % size:
        raise ConfigError(
            f"config.json: sparse_topk_tokens {tokens} is not a positive multiple of the block size {size}"
        )
    return size, tokens // size


def _bridge(raw: Mapping[str, Any], kinds: list[str]) -> int | None:
    """The layer whose input later full layers project keys from; the first full one by default."""
    if not raw.get("sparse_bridge", False):
        return None
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    source = raw.get("sparse_bridge_source", full[0] if full else None)
    if source not in full:
        raise ConfigError(f"config.json: sparse_bridge_source {source} is not a full_attention layer: {full}")
    return int(source)


def _sharing(raw: Mapping[str, Any]) -> dict[str, bool]:
    """Options of a sparse layer whose branches read other rows than HySparse's do: the paper's Table 4."""
    sharing = {key: bool(_word(raw, key)) for key in ("share_kv_sa", "share_kv_swa")}
    if sharing == {"share_kv_sa": True, "share_kv_swa": False}:
        return {}
    if sharing == {"share_kv_sa": False, "share_kv_swa": True}:
        raise ConfigError(
            "config.json: share_kv_swa true with share_kv_sa false would share in one branch what the other "
            "has of its own; accepted: HySparse's true and false, both true, both false"
        )
    own = {
        "swa_num_key_value_heads": raw["num_key_value_heads"],
        "swa_rope_theta": rope_theta(raw, 10000.0),
        "swa_partial_rotary_factor": raw.get("partial_rotary_factor", 1.0),
    }
    for key, value in own.items():
        if raw.get(key, value) != value and "sliding_attention" not in raw["layer_types"]:
            raise ConfigError(
                f"config.json: {key} {raw[key]!r} has no meaning where both branches read the same rows; "
                f"leave it out or give {value!r}"
            )
    return sharing


def layers(raw: Mapping[str, Any], moe: list[MoESpec | None]) -> tuple[LayerSpec, ...]:
    """The trunk; which full layers become oracles follows from what comes after them."""
    kinds = layer_types(raw, len(moe), accepted=KINDS)
    if kinds is None:
        raise ConfigError("config.json: layer_types is missing for 'hysparse'; name the kind of every layer")
    sources, bridge, (block_size, num_blocks) = _sources(kinds), _bridge(raw, kinds), _budget(raw)
    local, granularity, sharing = _word(raw, "sparse_local"), _word(raw, "gate_granularity"), _sharing(raw)
    window = int(raw.get("sliding_window", 128))
    head_dim = int(raw["head_dim"])
    theta = rope_theta(raw, 10000.0)
    own_theta = float(raw.get("swa_rope_theta", theta))
    rotary = int(head_dim * float(raw.get("partial_rotary_factor", 1.0)))
    own_rotary = int(head_dim * float(raw.get("swa_partial_rotary_factor", rotary / head_dim)))
    kv_heads = int(raw["num_key_value_heads"])
    own_heads = int(raw.get("swa_num_key_value_heads", kv_heads))
    specs = []
    for index, kind in enumerate(kinds):
        options: dict[str, Any] = {}
        slides = kind == "sliding_attention"
        if kind == "full_attention":
            if index in sources.values():
                forced = window if local == "forced" else None
                options |= {"block_size": block_size, "num_blocks": num_blocks, "forced_window": forced}
                if (aggregate := _word(raw, "gqa_score_reduce")) != "max":
                    options["aggregate"] = aggregate
            if index == bridge:
                options["publishes_input"] = True
            elif bridge is not None and index > bridge:
                options["input_from"] = bridge
            kind = "oracle_attention" if options else kind
        elif kind == "sparse_attention":
            options = {"block_size": block_size, "gate_granularity": granularity} | sharing
            options |= {
                "swa_rope_theta": own_theta,
                "swa_rotary_dim": own_rotary,
                "swa_num_kv_heads": own_heads,
            }
            options |= {key: bool(raw.get(key, True)) for key in ("sink_sa", "sink_swa")}
        elif raw.get("swa_output_gate", False):
            kind, options = "gated_sliding_attention", {"gate_granularity": granularity}
        is_sparse = index in sources
        has_window = slides or (is_sparse and local == "gated")
        sinks = (is_sparse and raw.get("sink_sa", True)) or (has_window and raw.get("sink_swa", True))
        specs.append(
            LayerSpec(
                index=index,
                attention=kind,
                num_attention_heads=int(raw["num_attention_heads"]),
                num_key_value_heads=own_heads if slides else kv_heads,
                head_dim=head_dim,
                v_head_dim=int(raw.get("v_head_dim", head_dim)),
                rope_theta=own_theta if slides else theta,
                rotary_dim=own_rotary if slides else rotary,
                window=window if has_window else None,
                has_sink=bool(sinks),
                qkv_bias=bool(raw.get("attention_bias", False)),
                kv_source=sources.get(index),
                intermediate_size=int(raw.get("intermediate_size", 0)),
                moe=moe[index],
                options=MappingProxyType(options),
            )
        )
    return tuple(specs)


def _experts(raw: Mapping[str, Any]) -> list[MoESpec | None]:
    """One per layer; `moe_layer_freq` marks the layers with experts, all where it is absent."""
    count = int(raw["num_hidden_layers"])
    if not raw.get("n_routed_experts"):
        return [None] * count
    flags = list(raw.get("moe_layer_freq", [1] * count))
    if len(flags) != count:
        raise ConfigError(
            f"config.json: moe_layer_freq has {len(flags)} entries for num_hidden_layers {count}"
        )
    moe = MoESpec(
        num_experts=int(raw["n_routed_experts"]),
        experts_per_token=int(raw["num_experts_per_tok"]),
        intermediate_size=int(raw["moe_intermediate_size"]),
        norm_topk_prob=bool(raw.get("norm_topk_prob", True)),
        routed_scaling_factor=float(raw.get("routed_scaling_factor") or 1.0),
    )
    return [moe if flag else None for flag in flags]


def mtp(config: ModelConfig, num_heads: int) -> MTPSpec:
    """`num_heads` heads in MiMo-V2-Flash's form: a plain sliding layer and a dense MLP (source: ours).

    Raises:
        ConfigError: no width is given for the MLP.
    """
    raw, first = config.raw, config.specs[0]
    width = int(raw.get("mtp_intermediate_size") or raw.get("intermediate_size") or 0)
    if width < 1:
        raise ConfigError("config.json: MTP heads have a dense MLP; mtp_intermediate_size gives its width")
    rotary = float(raw.get("swa_partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    layer = LayerSpec(
        index=len(config.specs),
        attention="sliding_attention",
        num_attention_heads=first.num_attention_heads,
        num_key_value_heads=int(raw.get("swa_num_key_value_heads", raw["num_key_value_heads"])),
        head_dim=first.head_dim,
        v_head_dim=first.v_head_dim,
        rope_theta=float(raw.get("swa_rope_theta", rope_theta(raw, 10000.0))),
        rotary_dim=int(first.head_dim * rotary),
        window=int(raw.get("sliding_window", 128)),
        has_sink=bool(raw.get("sink_swa", True)),
        qkv_bias=first.qkv_bias,
        intermediate_size=width,
    )
    return MTPSpec(num_heads, layer, order="embedding", is_chained=False, path="mtp.layers", names=NAMES)


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    for key in WORDS:
        _word(raw, key)
    config = ModelConfig(
        model_type="hysparse",
        vocab_size=int(raw["vocab_size"]),
        hidden_size=int(raw["hidden_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        specs=layers(raw, _experts(raw)),
        mtp=None,
        raw=raw,
    )
    heads = int(raw.get("num_nextn_predict_layers") or 0)
    return replace(config, mtp=mtp(config, heads)) if heads else config


FAMILY = Family(parse=parse, keys=KEYS, entries=entries, mtp=mtp)
