"""What a model is made of, from its config alone: layers, parameters, cache bytes by context, traps.

`checkpoint.inspect` finds the model and prints this; nothing here reads a file or needs a parameter's data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.models.traps import traps
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
        "in_words": in_words(config),
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


# What a query of each kind of layer sees, beside its window; kinds that a word does not tell are named.
SEES = {
    "full_attention": "all earlier tokens",
    "complex_attention": "all earlier tokens",
    "oracle_attention": "all earlier tokens, choosing blocks for others",
    "sparse_attention": "the blocks that another layer chose",
    "sliding_attention": "",
}


def in_words(config: ModelConfig) -> str:
    """The config as one plain sentence: who sees what, experts, heads, the output matrix."""

    def sight(spec: LayerSpec) -> str:
        seen = SEES.get(spec.attention, f"what {spec.attention} selects")
        near = "" if spec.window is None else f"the last {spec.window} tokens"
        return " and ".join(part for part in (seen, near) if part)

    kinds = Counter(sight(spec) for spec in config.specs)
    parts = [
        f"{config.num_hidden_layers} layers: " + ", ".join(f"{n} see {what}" for what, n in kinds.items())
    ]
    experts = Counter((spec.moe.num_experts, spec.moe.experts_per_token) for spec in config.specs if spec.moe)
    parts += [f"{n} have {total} experts and use {used} for a token" for (total, used), n in experts.items()]
    if config.mtp is not None:
        heads = config.mtp.num_heads
        parts.append(f"{heads} MTP head{'s guess' if heads > 1 else ' guesses'} further tokens")
    is_tied = config.tie_word_embeddings
    parts.append(
        "the embedding is the output matrix" if is_tied else "the output matrix is not the embedding"
    )
    return "; ".join(parts)


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
