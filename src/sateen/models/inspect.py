"""What a model is made of, from its config alone: layers, parameters, cache bytes by context, traps.

`checkpoint.inspect` finds the model and prints this; nothing here reads a file or needs a parameter's data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.nn.attention import Attention
from sateen.nn.spec import KVLayout, LayerSpec

# Bytes of a cached number. Int8 rows have scales beside them; FP8 rows are cast without any.
KV_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
CONFIG_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def describe(model: Decoder, *, contexts: Sequence[int] = (), kv_dtype: str = "auto") -> dict[str, Any]:
    """Everything `sateen inspect` shows except stored bytes, ready for JSON.

    Args:
        model: any device; `meta` is enough.
        contexts: tokens per sequence to size the cache for; 4096, 32768 and the longest when empty.
        kv_dtype: a key of `KV_BYTES`, or `auto` for the config's dtype (float32 where it names none).

    Raises:
        ConfigError: an unknown dtype or a context below 1.
    """
    config = model.config
    longest = config.max_position_embeddings
    sizes = sorted(set(contexts or [n for n in (4096, 32768, longest) if n <= longest]))
    if sizes[0] < 1:
        raise ConfigError(f"context {sizes[0]} is not accepted; a context is at least 1 token")
    if kv_dtype == "auto":
        stated = config.raw.get("dtype") or config.raw.get("torch_dtype")
        kv_dtype = CONFIG_DTYPES.get(str(stated), "fp32")
    if kv_dtype not in KV_BYTES:
        raise ConfigError(unknown_name("kv dtype", kv_dtype, ["auto", *KV_BYTES]))
    return {
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": longest,
        "layers": layer_groups(config.layers()),
        "mtp": {"num_heads": config.mtp.num_heads} | _words(config.mtp.layer) if config.mtp else None,
        "parameters": count_parameters(model),
        "kv_dtype": kv_dtype,
        "kv_bytes_per_token": _row_bytes(config, kv_dtype),
        "kv": [kv_bytes(config, context, kv_dtype) for context in sizes],
        "traps": traps(config, sizes[-1]),
    }


def layer_groups(specs: Iterable[LayerSpec]) -> list[dict[str, Any]]:
    """One row per distinct layer, in order of first appearance, with the `layers` it stands for as ranges."""
    groups: dict[LayerSpec, list[int]] = {}
    for spec in specs:
        same = next((known for known in groups if known == replace(spec, index=known.index)), spec)
        groups.setdefault(same, []).append(spec.index)
    return [{"layers": _ranges(found), "count": len(found)} | _words(spec) for spec, found in groups.items()]


def _ranges(indices: list[int]) -> str:
    """`0, 5, 7-9` for [0, 5, 7, 8, 9]."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _words(spec: LayerSpec) -> dict[str, Any]:
    moe = spec.moe
    mlp = str(spec.intermediate_size)
    if moe is not None:
        mlp = f"{moe.num_experts} x {moe.intermediate_size}, top {moe.experts_per_token}"
    return {
        "attention": spec.attention,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "v_head_dim": spec.v_head_dim,
        "window": spec.window,
        "has_sink": spec.has_sink,
        "rope_theta": spec.rope_theta,
        "rotary_dim": spec.rotary_dim,
        "mlp": mlp,
    }


def _layouts(config: ModelConfig) -> tuple[list[KVLayout], list[KVLayout]]:
    """The layouts of the trunk and of the MTP heads."""
    groups = config.kv_layouts()
    trunk, heads = groups[: config.num_hidden_layers], groups[config.num_hidden_layers :]
    return [layout for group in trunk for layout in group], [layout for group in heads for layout in group]


def _bytes(layout: KVLayout, kv_dtype: str) -> int:
    return layout.row_bytes(KV_BYTES[kv_dtype], is_scaled=kv_dtype == "int8")


def _row_bytes(config: ModelConfig, kv_dtype: str) -> list[dict[str, Any]]:
    """Bytes that one more cached token takes in each kind of trunk layer."""
    found: dict[tuple[str, int], int] = {}
    for spec in config.layers():
        row = sum(_bytes(layout, kv_dtype) for layout in Attention.kinds[spec.attention].kv_layouts(spec))
        found[spec.attention, row] = found.get((spec.attention, row), 0) + 1
    return [{"layer_kind": kind, "num_layers": count, "bytes": row} for (kind, row), count in found.items()]


def kv_bytes(config: ModelConfig, context: int, kv_dtype: str) -> dict[str, Any]:
    """Bytes of one sequence's cache; a ring counts its window's rows exactly, and no more than the context.

    `kv_dtype` is a key of `KV_BYTES`.

    `all_full_bytes` is the same trunk with the model's own full-attention layer everywhere, and `ratio`
    what the trunk saves against it; both are None where no layer keeps all rows. MTP heads are counted
    apart.
    """
    trunk, heads = ([row.rows(context) * _bytes(row, kv_dtype) for row in rows] for rows in _layouts(config))
    in_trunk, in_heads = sum(trunk), sum(heads)
    full = next((layout for layout in _layouts(config)[0] if layout.kind == "paged"), None)
    all_full = _bytes(full, kv_dtype) * context * config.num_hidden_layers if full else None
    return {
        "context": context,
        "bytes": in_trunk,
        "mtp_bytes": in_heads,
        "all_full_bytes": all_full,
        "ratio": all_full / in_trunk if all_full else None,
    }


def traps(config: ModelConfig, context: int) -> list[str]:
    """What other programs are known to get wrong about a model like this, and what a user may trip over."""
    specs, found = config.layers(), []
    windows = {spec.window for spec in specs if spec.window is not None}
    if "hybrid_layer_pattern" in config.raw and windows:
        stored = config.raw.get("sliding_window_size", config.raw.get("sliding_window"))
        seen = f"a query sees {max(windows)} with its own"
        found.append(f"the config's window {stored} counts earlier keys only; {seen}")
    if scales := {spec.value_scale for spec in specs} - {1.0}:
        scale = max(scales)
        found.append(
            f"values are multiplied by {scale} before they are cached; old code elsewhere skips this"
        )
    if any(spec.head_dim != spec.v_head_dim for spec in specs):
        found.append("key and value heads differ in size, which many attention kernels refuse")
    if config.norm == "complex_rms":
        entries = f"{config.hidden_size // 2} and {specs[0].head_dim // 2} complex entries"
        found.append(f"hidden and head sizes count real numbers, re and im of {entries}")
    if config.mtp is not None:
        first = config.mtp.order
        found.append(f"MTP heads join their inputs {first} first; the other order loads and drafts noise")
    if context > config.max_position_embeddings:
        found.append(f"context {context} is beyond max_position_embeddings {config.max_position_embeddings}")
    return found
