"""Loading: every tensor of a checkpoint finds its place and every parameter is filled, or nothing is read.

`check` compares a directory with its config from headers alone; `load` then streams tensors one at a time
from the shards into the parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sateen.checkpoint import fp8
from sateen.checkpoint.gguf import is_gguf
from sateen.checkpoint.mtp import KEY, add_heads
from sateen.checkpoint.scales import Scales
from sateen.checkpoint.shards import DTYPES, FLOATS, Files, by_file, read_config, shards
from sateen.errors import CheckpointError, nearest
from sateen.models.base import Entry, ModelConfig, family
from sateen.models.decoder import Decoder
from sateen.nn.attention import Attention
from sateen.nn.moe import Router
from sateen.nn.quant import PackedLinear

log = logging.getLogger("sateen.checkpoint")


@dataclass(frozen=True)
class Stored:
    """A directory or GGUF file whose tensors and config have been found to belong together.

    Attributes:
        folder: where it is.
        raw: its config.json.
        model: its model on the meta device.
        files: of its tensors, without scales.
        places: tensor name -> our parameter's name, and the part of it that the tensor holds.
        scales: of its FP8 weights.
    """

    folder: Path
    raw: Mapping[str, Any]
    model: Decoder
    files: Files
    places: dict[str, tuple[str, Entry]]
    scales: Scales

    def head_dim(self, key: str) -> int | None:
        """See `head_dim_of`."""
        return head_dim_of(self.model, self.places[key][0])

    def read(
        self, key: str, dtype: torch.dtype | None, device: torch.device, *, may_map: bool = False
    ) -> Tensor:
        """One tensor, dequantised if it is FP8.

        Args:
            key: its name in the checkpoint.
            dtype: of the result; as stored when None, and always for bytes that are no numbers.
            device: where it goes, and where it is cast.
            may_map: a tensor that needs no change may stay a part of its file.
        """
        if key in self.scales:
            codes = self.files.copied(key).to(device)
            return self.scales.dequantize(key, codes, dtype or fp8.DTYPE, self.head_dim(key))
        stored = DTYPES[self.files.describe(key)[0]]
        wanted = dtype if dtype is not None and stored.is_floating_point else stored
        is_kept = may_map and wanted == stored and device.type == "cpu"
        tensor = self.files.mapped(key) if is_kept else self.files.copied(key)
        return tensor.to(device).to(wanted)


def check(folder: Path, *, mtp: str | Path | None = None) -> Stored:
    """Compares names, shapes and dtypes of all tensors with what the config asks for; reads no data.

    Args:
        mtp: a directory with further MTP heads of the model in `folder`; see `add_heads`.

    Raises:
        CheckpointError: unknown or missing tensors, wrong shapes, damaged files, unsupported dtypes.
    """
    own = shards(folder)
    heads = {} if mtp is None else shards(Path(mtp))
    where = {**heads, **own}
    origin = folder if folder.is_file() else folder / "config.json"
    stated = read_config(folder)
    scales = Scales.take(stated, where, str(origin))
    # What is loaded is not FP8 any more, and its config must not say so.
    raw = {key: value for key, value in stated.items() if not scales or key != "quantization_config"}
    config = ModelConfig.from_hf(raw, tensor_names=own, origin=str(origin))
    if mtp is not None:
        config = add_heads(config, heads, Path(mtp))
        stated = {**stated, KEY: config.num_mtp_heads}
    model = Decoder.build_empty(config)
    places = {entry.name: (name, entry) for name, _, entry in parameter_entries(model)}
    unknown = sorted(where.keys() - places.keys())
    if config.tie_word_embeddings and "lm_head.weight" in unknown:
        unknown.remove("lm_head.weight")  # some writers repeat the tied matrix
        where.pop("lm_head.weight")
        log.info("%s: lm_head.weight is left out, the config ties it to the embedding", folder)
    missing = sorted(places.keys() - where.keys())
    if unknown or missing:
        raise CheckpointError(f"{folder}: {mismatch(unknown, missing)}")
    stored = Stored(folder, stated, model, Files(where), places, scales)
    _check_headers(stored)
    return stored


def _check_headers(stored: Stored) -> None:
    ours = stored.model.state_dict(keep_vars=True)
    for file, keys in by_file(stored.files.where).items():
        for key in keys:
            name, entry = stored.places[key]
            place = entry.part(ours[name])
            dtype, shape = stored.files.describe(key)
            if shape != tuple(place.shape):
                raise CheckpointError(
                    f"{file}: {key} has shape {shape}, the config asks for {tuple(place.shape)}"
                )
            is_fp8, is_packed = key in stored.scales, place.dtype == torch.uint8
            readable = ("F8_E4M3",) if is_fp8 else ("U8",) if is_packed else FLOATS
            if dtype not in readable:
                raise CheckpointError(f"{file}: {key} is {dtype}; readable: {', '.join(readable)}")
            if is_fp8:
                stored.scales.check(key, shape, stored.head_dim(key))


def load(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    mtp: str | Path | None = None,
    may_map: bool = True,
) -> Decoder:
    """The model stored in `folder`, a directory or a GGUF file.

    Peak memory is the model and its largest tensor, as stored and as it becomes. Tensors that need no cast
    stay mapped on the CPU: their pages are the model's memory, and become resident as they are used.

    Args:
        dtype: of the parameters; None keeps each tensor's stored dtype. Two kinds of blocks cannot be kept:
            a GGUF file becomes float32, which holds all of its values, and FP8 weights become bfloat16.
            Routers and the scales of packed weights become float32 where a dtype is given.
        device: where parameters go; `meta` checks names and shapes without reading data.
        mtp: a directory with further MTP heads of this model.
        may_map: False gives every tensor memory of its own, for callers that will let tensors go one by one.

    Raises:
        CheckpointError: unknown or missing tensors, wrong shapes, damaged files, unsupported dtypes.
    """
    stored = check(folder, mtp=mtp)
    device = torch.device(device or "cpu")
    if device.type == "meta":
        return stored.model
    if is_gguf(folder) and dtype is None:
        dtype = torch.float32
        log.info("%s: loaded as float32; ask for another dtype to round it", folder)
    if stored.scales:
        log.info("%s: %d FP8 weights become %s", folder, len(stored.scales), dtype or fp8.DTYPE)
    _fill(stored, dtype, device, may_map)
    return stored.model


def _fill(stored: Stored, dtype: torch.dtype | None, device: torch.device, may_map: bool) -> None:
    model = stored.model
    ours = model.state_dict(keep_vars=True)
    float32 = float32_names(model)
    filled: dict[str, Tensor] = {}
    for keys in by_file(stored.files.where).values():
        for key in keys:
            name, entry = stored.places[key]
            becomes = torch.float32 if dtype is not None and name in float32 else dtype
            tensor = stored.read(key, becomes, device, may_map=may_map and entry.is_whole)
            if entry.is_whole:
                filled[name] = tensor
            else:
                if name not in filled:
                    filled[name] = torch.empty(ours[name].shape, dtype=tensor.dtype, device=device)
                entry.part(filled[name]).copy_(tensor)
    model.adopt(filled)


def parameter_entries(model: Decoder) -> Iterator[tuple[str, Tensor, Entry]]:
    """For each tensor a checkpoint of this model holds: our name, our tensor, and its place there."""
    entries = family({"model_type": model.config.model_type}, "config.json").entries
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for entry in entries(name, tuple(tensor.shape)):
            yield name, tensor, entry


def float32_names(model: Decoder) -> set[str]:
    """Routers (MiMo-V2-Flash §2.1) and scales of packed weights: float32, whatever dtype is asked for."""
    leaves = {Router: ("weight", "e_score_correction_bias"), PackedLinear: ("scales",)}
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for kind, kept in leaves.items()
        if isinstance(module, kind)
        for leaf in kept
    }


def head_dim_of(model: Decoder, name: str) -> int | None:
    """Rows of one head in a projection of queries, keys or values; None for every other parameter."""
    owner, _, leaf = name.removesuffix(".weight").rpartition(".")
    attention = model.get_submodule(owner) if leaf in ("q_proj", "k_proj", "v_proj") else None
    if not isinstance(attention, Attention):
        return None
    return attention.spec.v_head_dim if leaf == "v_proj" else attention.spec.head_dim


def mismatch(unknown: list[str], missing: list[str]) -> str:
    """One line that names the tensors a config does not account for and those it misses."""

    def some(names: list[str]) -> str:
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

    parts = []
    if unknown:
        hint = nearest(unknown[0], missing)
        parts.append(f"{len(unknown)} tensors the config does not account for: {some(unknown)}{hint}")
    if missing:
        parts.append(f"{len(missing)} tensors are missing: {some(missing)}")
    return "; ".join(parts) + "; the config and the tensors do not belong together"
