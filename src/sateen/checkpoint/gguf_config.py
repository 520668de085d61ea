"""The config.json that a GGUF file's metadata amount to.

Settings that our models do not have are refused here, by the metadata's own keys. Names: the page on GGUF in
the ggml repository and llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sateen.checkpoint.gguf_file import GGUFFile
from sateen.errors import CheckpointError, ConfigError, unknown_name


@dataclass(frozen=True)
class Architecture:
    """What a GGUF architecture means in a config.json.

    Attributes:
        class_name: of transformers, for `architectures`.
        is_permuted: query and key rows are stored for rotations of neighbours, (0, 1), (2, 3), ...; ours
            rotates channel i with channel i + H/2.
    """

    class_name: str
    is_permuted: bool = False


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", is_permuted=True),
    "qwen2": Architecture("Qwen2ForCausalLM"),
    "qwen3": Architecture("Qwen3ForCausalLM"),
}


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The dictionary that a config.json of this file's model holds.

    Raises:
        CheckpointError: metadata that are missing or cannot be used.
        ConfigError: an architecture or a setting that our models do not have.
    """
    try:
        return _config(file)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{file.path}: a value cannot be used ({error}); convert the model again"
        ) from None


def rotated_heads(file: GGUFFile) -> dict[str, int]:
    """The projections whose rows are permuted, with their number of heads."""
    kind = _architecture(file)
    if not ARCHITECTURES[kind].is_permuted:
        return {}
    heads = int(_need(file, f"{kind}.attention.head_count"))
    return {"attn_q": heads, "attn_k": int(file.metadata.get(f"{kind}.attention.head_count_kv", heads))}


def _config(file: GGUFFile) -> dict[str, Any]:
    kind = _architecture(file)
    values: Mapping[str, Any] = file.metadata
    for key, neutral, what in _refused(kind):
        if values.get(key, neutral) not in (neutral, None):
            raise ConfigError(f"{file.path}: {key} is {values[key]}; {what}")
    heads = _need(file, f"{kind}.attention.head_count")
    kv_heads = values.get(f"{kind}.attention.head_count_kv", heads)
    inner = _need(file, f"{kind}.feed_forward_length")
    for name, value in (("head_count", heads), ("head_count_kv", kv_heads), ("feed_forward_length", inner)):
        if isinstance(value, tuple):
            raise ConfigError(f"{file.path}: {name} differs between layers; accepted: one number for all")
    hidden = int(_need(file, f"{kind}.embedding_length"))
    head_dim = int(values.get(f"{kind}.attention.key_length", hidden // heads))
    same = {
        "attention.value_length": int(values.get(f"{kind}.attention.value_length", head_dim)),
        "rope.dimension_count": int(values.get(f"{kind}.rope.dimension_count", head_dim)),
    }
    for key, size in same.items():
        if size != head_dim:
            raise ConfigError(
                f"{file.path}: {kind}.{key} is {size}; accepted: the {head_dim} channels of a head"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: token_embd.weight is missing; it holds no whole model")
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind].class_name],
        "model_type": kind,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": int(inner),
        "num_hidden_layers": int(_need(file, f"{kind}.block_count")),
        "num_attention_heads": int(heads),
        "num_key_value_heads": int(kv_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(_need(file, f"{kind}.context_length")),
        "rms_norm_eps": _decimal(_need(file, f"{kind}.attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(values.get(f"{kind}.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "dtype": "float32",
    }
    if kind == "llama" and "blk.0.attn_q.bias" in file.tensors:
        config["attention_bias"] = True
    return config | _token_ids(values)


def _refused(kind: str) -> Iterator[tuple[str, Any, str]]:
    """Settings that change the computation: key, the value that changes nothing, what is accepted."""
    unscaled = "scaled rotary positions are not supported; accepted: unscaled"
    yield f"{kind}.rope.scaling.type", "none", unscaled
    yield f"{kind}.rope.scale_linear", 1.0, unscaled
    yield f"{kind}.rope.scaling.factor", 1.0, unscaled
    yield f"{kind}.expert_count", 0, "mixtures of experts are not read from GGUF; accepted: dense models"
    window = "a sliding window is not read from GGUF; accepted: full attention"
    yield f"{kind}.attention.sliding_window", 0, window


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the special tokens; generation ends at the end of a text, a turn or a message."""
    given = {
        name: int(values[f"tokenizer.ggml.{name}_token_id"])
        for name in ("bos", "padding", "eos", "eot", "eom")
        if f"tokenizer.ggml.{name}_token_id" in values
    }
    found: dict[str, Any] = {
        ours: given[name]
        for ours, name in (("bos_token_id", "bos"), ("pad_token_id", "padding"))
        if name in given
    }
    ends = list(dict.fromkeys(given[name] for name in ("eos", "eot", "eom") if name in given))
    return found | ({"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {})


def _decimal(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747e-06."""
    return float(str(np.float32(value)))


def _architecture(file: GGUFFile) -> str:
    kind = str(_need(file, "general.architecture"))
    if kind not in ARCHITECTURES:
        raise ConfigError(f"{file.path}: {unknown_name('GGUF architecture', kind, ARCHITECTURES)}")
    return kind


def _need(file: GGUFFile, key: str) -> Any:
    if key not in file.metadata:
        raise CheckpointError(f"{file.path}: {key} is missing in its metadata; convert the model again")
    return file.metadata[key]
