"""GGUF files as our checkpoints: their tensors under our names, their config, their tokenizer.

`checkpoint.hf` loads through these as it does through safetensors shards, one tensor at a time. Blocks are
dequantised by the `gguf` package. Formats and names: the page on GGUF in the ggml repository and llama.cpp's
converter.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sateen.checkpoint.gguf_config import config_of, rotated_heads
from sateen.checkpoint.gguf_file import GGUFFile, read_gguf
from sateen.errors import BackendUnavailable, CheckpointError, ConfigError

if TYPE_CHECKING:
    from sateen.data.tokenizer import Tokenizer

log = logging.getLogger("sateen.checkpoint")

ROPE_FREQS = "rope_freqs.weight"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_gguf(path: str | Path | None) -> bool:
    """Whether a path names a GGUF file, there or not, by its ending."""
    return path is not None and Path(path).suffix == ".gguf" and not Path(path).is_dir()


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The dictionary that a config.json of this file's model holds.

    Raises:
        CheckpointError: see `read_gguf`; also metadata that are missing or cannot be used.
        ConfigError: an architecture or a setting that our models do not have.
    """
    return config_of(read_gguf(path))


def gguf_tensor_names(path: Path) -> list[str]:
    """Our names of the file's tensors; those that have none keep their own.

    Raises:
        ConfigError: the file scales rotary frequencies, which our models do not.
    """
    return list(_names(read_gguf(path)))


def gguf_bytes(path: Path) -> dict[str, tuple[str, int]]:
    """Our name of each tensor -> its format in the file and its bytes there."""
    file = read_gguf(path)
    stored = {ours: file.tensors[theirs] for ours, theirs in _names(file).items()}
    return {name: (tensor.kind.name, tensor.num_bytes) for name, tensor in stored.items()}


def load_gguf_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer that the metadata describe, or None where they describe none.

    Raises:
        ConfigError: it is of a kind that is not rebuilt; the message lists the accepted ones.
    """
    from sateen.data.gguf_tokenizer import tokenizer_from_metadata

    file = read_gguf(path)
    if file.metadata.get("tokenizer.ggml.model") in (None, "none", "no_vocab"):
        return None
    return tokenizer_from_metadata(file.metadata, origin=str(path))


class GGUFShard:
    """A GGUF file with the face of an open safetensors file, under our names and with our row order."""

    def __init__(self, path: Path):
        self.file = read_gguf(path)
        self._names = _names(self.file)
        self._rotated = rotated_heads(self.file)

    def __enter__(self) -> GGUFShard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # each tensor maps the file for itself

    def keys(self) -> list[str]:
        return list(self._names)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.file.tensors[self._names[name]].shape)

    def get_tensor(self, name: str) -> Tensor:
        """The tensor, float32 if its blocks are quantised and as stored otherwise."""
        theirs = self._names[name]
        stored, rows = self.file.tensors[theirs], self.file.rows(theirs)
        if stored.kind.name in _FLOATS:
            # A copy, because a mapped file is read-only and torch's tensors are not.
            tensor = torch.from_numpy(np.array(rows)).view(_FLOATS[stored.kind.name])
        else:
            tensor = torch.from_numpy(_dequantize(rows, stored.kind.name, theirs, self.file.path))
        tensor = tensor.reshape(stored.shape)
        heads = self._rotated.get(theirs.split(".")[-2]) if theirs.startswith("blk.") else None
        return tensor if heads is None else _unpermute(tensor, heads)


@dataclass(frozen=True)
class _Slice:
    """What a loader asks of a tensor before it reads it."""

    shape: tuple[int, ...]

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"  # every format we read becomes, or fits in, float32


def _dequantize(rows: np.ndarray[Any, Any], kind: str, name: str, path: Path) -> np.ndarray[Any, Any]:
    try:
        from gguf import GGMLQuantizationType, dequantize
    except ImportError:
        raise BackendUnavailable(
            f"{path}: {name} is {kind}, and the package gguf turns blocks into numbers; it is not installed: "
            "pip install 'sateen[gguf]'"
        ) from None
    values: np.ndarray[Any, Any] = dequantize(rows, GGMLQuantizationType[kind])
    return values


def _unpermute(tensor: Tensor, heads: int) -> Tensor:
    """Rows (0, 1), (2, 3), ... of each head become rows (0, H/2), (1, H/2 + 1), ..."""
    ordered: Tensor = tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return ordered.contiguous()


def _names(file: GGUFFile) -> dict[str, str]:
    """Our name -> the file's name."""
    names: dict[str, str] = {}
    for theirs in file.tensors:
        if not _is_neutral(file, theirs) and (twin := names.setdefault(_our_name(theirs), theirs)) != theirs:
            raise CheckpointError(f"{file.path}: {twin} and {theirs} both stand for {_our_name(theirs)}")
    return names


def _our_name(name: str) -> str:
    if name in _GLOBAL:
        return _GLOBAL[name]
    head, _, rest = name.partition(".")
    index, _, leaf = rest.partition(".")
    stem, _, kind = leaf.rpartition(".")
    if head == "blk" and stem in _LAYER:
        return f"model.layers.{index}.{_LAYER[stem]}.{kind}"
    return name  # unknown; the loader lists those that the config does not account for


def _is_neutral(file: GGUFFile, name: str) -> bool:
    """Whether a tensor changes nothing: divisors of rotary frequencies that are all one."""
    if name != ROPE_FREQS:
        return False
    if file.tensors[name].kind.name != "F32" or not bool((file.rows(name).view("<f4") == 1).all()):
        raise ConfigError(
            f"{file.path}: {ROPE_FREQS} scales rotary frequencies (Llama 3.1's rope type 'llama3'), which is "
            "not supported; accepted: unscaled frequencies"
        )
    log.info("%s: %s is all ones and changes nothing", file.path, ROPE_FREQS)
    return True
