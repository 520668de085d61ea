"""Fairy±i: every projection complex, two-bit phases times one scale per axis, int8 activations.

The residual stream is one real tensor [re | im], so `ModelConfig.hidden_size` and the head sizes are twice
the numbers of `config.json`, which count complex entries. The embedding and the norms, each one tensor here,
are two in a checkpoint, by columns. Source: arXiv 2508.05571 and its published code
(PKULab1806/Fairy-plus-minus-i). Ours: `softmax_scale`, and `quantization_config` to train without quantising.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.base import Entry, Family, ModelConfig, rope_theta
from sateen.models.quant_config import default_spec
from sateen.nn.spec import LayerSpec

KEYS = frozenset(
    "intermediate_size num_attention_heads num_key_value_heads rms_norm_eps rope_parameters "
    "rope_scaling rope_theta softmax_scale".split()
)
# The published code has two: its flash path falls back on the width of the joined head, 2 * head_dim, and the
# released weights were trained with it; its eager path uses head_dim.
SOFTMAX_SCALES = ("flash", "eager")

# Our path -> the checkpoint's; a layer's remaining words are the same.
TOP = {"model.embed_tokens": "token_embeddings", "model.norm": "final_norm", "lm_head": "lm_head"}
NORMS = {"input_layernorm": "pre_layernorm", "post_attention_layernorm": "post_layernorm"}


def _head_dim(raw: Mapping[str, Any]) -> int:
    """Complex channels of a head."""
    hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
    if hidden % heads:
        raise ConfigError(
            f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    return hidden // heads


def layers(raw: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The trunk: one spec, repeated."""
    chosen = raw.get("softmax_scale", SOFTMAX_SCALES[0])
    if chosen not in SOFTMAX_SCALES:
        raise ConfigError(f"config.json: {unknown_name('softmax_scale', str(chosen), SOFTMAX_SCALES)}")
    channels, heads = _head_dim(raw), int(raw["num_attention_heads"])
    options = {} if chosen == "flash" else {"scale": channels**-0.5}
    return tuple(
        LayerSpec(
            index=index,
            attention="complex_attention",
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=2 * channels,
            v_head_dim=2 * channels,
            rope_theta=rope_theta(raw, 10000.0),
            rotary_dim=2 * channels,
            intermediate_size=int(raw["intermediate_size"]),
            norm="complex_rms",
            mlp="complex_relu2",
            options=MappingProxyType(options),
        )
        for index in range(int(raw["num_hidden_layers"]))
    )


def parse(raw: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(
        model_type="complexnet",
        vocab_size=int(raw["vocab_size"]),
        hidden_size=2 * int(raw["hidden_size"]),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-5)),
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        initializer_range=float(raw.get("initializer_range", 0.02)),
        specs=layers(raw),
        mtp=None,
        raw=raw,
        norm="complex_rms",
        # The released files are masters without a word about it; the code that reads them always quantises.
        quant=default_spec("phase"),
    )


def entries(name: str, shape: tuple[int, ...]) -> Iterator[Entry]:
    """The published names; embedding and norms are a real and an imaginary tensor there."""
    path, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.*)", path):
        stored = f"layer.{match[1]}.{NORMS.get(match[2], match[2])}"
    else:
        stored = TOP.get(path, path)
    if leaf != "weight" or path == "lm_head" or path.endswith("_proj"):
        yield Entry(f"{stored}.{leaf}", None)
        return
    half = shape[-1] // 2
    for part, columns in (("real", (0, half)), ("imag", (half, 2 * half))):
        separate = f"{stored}_{part}.weight" if path == "model.embed_tokens" else f"{stored}.weight_{part}"
        yield Entry(separate, None, columns)


FAMILY = Family(parse=parse, keys=KEYS, entries=entries)
