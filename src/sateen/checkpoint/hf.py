"""Hugging Face directories in and out: config.json, safetensors shards with their index, tokenizer files.

Tensors stream one at a time from the shards into the parameters; every tensor of the checkpoint must find its
place and every parameter must be filled, or the load fails with the names. A directory is written beside its
place and renamed, so a failed save leaves the old one.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sateen.checkpoint import fp8
from sateen.checkpoint.gguf import (
    GGUFShard,
    gguf_tensor_names,
    is_gguf,
    load_gguf_tokenizer,
    read_gguf_config,
)
from sateen.errors import CheckpointError, ConfigError, nearest
from sateen.models.base import Entry, ModelConfig, family
from sateen.models.decoder import Decoder
from sateen.models.presets import PRESETS
from sateen.models.registry import preset
from sateen.nn.attention import Attention
from sateen.nn.moe import Router
from sateen.nn.quant import PackedLinear

log = logging.getLogger("sateen.checkpoint")

SHARD_BYTES = 5 * 2**30
INDEX = "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files a model directory carries beside its tensors, as patterns; copied byte for byte. Receipts are not
# among them: they speak of the weights they were measured on.
CARRIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json merges.txt added_tokens.json "
    "tokenizer.model chat_template.jinja generation_config.json configuration_*.py modeling_*.py "
    "README.md LICENSE*"
).split()


def resolve(path: str | Path) -> Path:
    """What `path` names: a model directory, the last checkpoint of a run folder, or a GGUF file.

    Raises:
        CheckpointError: neither a config.json nor a run folder's `model` is there, nor the GGUF file.
    """
    folder = Path(path)
    if is_gguf(folder):
        if not folder.exists():
            raise CheckpointError(f"{folder}: no such file")
        return folder
    for candidate in (folder, folder / "model", folder / "hf"):
        if (candidate / "config.json").is_file():
            return candidate
    if (folder / "run.toml").is_file():
        raise CheckpointError(f"{folder}: this run has no checkpoint yet; run `sateen train` on it first")
    names = ", ".join(sorted(PRESETS))
    raise CheckpointError(
        f"{folder}: no config.json here; a model is a directory with one, a run folder or a preset ({names})"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The dictionary of a directory's config.json, or what a GGUF file's metadata amount to."""
    if folder.is_file():
        return read_gguf_config(folder)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: cannot be read ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{folder / 'config.json'}: a JSON object is expected")
    return raw


def shards(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, from the index or from the files themselves.

    Raises:
        CheckpointError: no tensors, a file the index names is missing, or a file is damaged.
    """
    if folder.is_file():
        return dict.fromkeys(gguf_tensor_names(folder), folder)
    if (folder / INDEX).is_file():
        try:
            weight_map = dict(json.loads((folder / INDEX).read_text())["weight_map"])
            if not all(isinstance(file, str) and "/" not in file for file in weight_map.values()):
                raise TypeError("weight_map maps tensors to names of files beside it")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / INDEX}: not a safetensors index ({error!r}); fetch or write it again"
            ) from None
        missing = sorted({file for file in weight_map.values() if not (folder / file).is_file()})
        if missing:
            raise CheckpointError(f"{folder / INDEX}: names files that are not there: {', '.join(missing)}")
        return {name: folder / file for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_shard(file) as shard:
            names = set(shard.keys())
        if twice := sorted(names & found.keys()):
            raise CheckpointError(
                f"{file}: {twice[0]} is in {found[twice[0]].name} too, and no {INDEX} says which one counts"
            )
        found.update(dict.fromkeys(names, file))
    if not found:
        raise CheckpointError(f"{folder}: no .safetensors file here")
    return found


def open_shard(file: Path) -> Any:
    """An open safetensors or GGUF file; a damaged one is a CheckpointError that names it."""
    if is_gguf(file):
        return GGUFShard(file)
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error}); fetch or write it again"
        ) from None


def parameter_entries(model: Decoder) -> Iterator[tuple[str, Tensor, Entry]]:
    """For each tensor a checkpoint of this model holds: our name, our tensor, and its place there."""
    entries = family({"model_type": model.config.model_type}, "config.json").entries
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for entry in entries(name, tuple(tensor.shape)):
            yield name, tensor, entry


def _float32_names(model: Decoder) -> set[str]:
    """Routers (MiMo-V2-Flash §2.1) and the scales of packed weights stay float32, whatever is asked for."""
    leaves = {Router: ("weight", "e_score_correction_bias"), PackedLinear: ("scales",)}
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for kind, kept in leaves.items()
        if isinstance(module, kind)
        for leaf in kept
    }


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Decoder:
    """The model stored in `folder`, a directory or a GGUF file.

    Args:
        dtype: of the parameters; None keeps each tensor's stored dtype. Two kinds of blocks cannot be kept:
            a GGUF file becomes float32, which holds all of its values, and FP8 weights become bfloat16.
            Routers stay float32.
        device: where parameters go; `meta` checks names and shapes without reading data.

    Raises:
        CheckpointError: unknown or missing tensors, wrong shapes, damaged files, unsupported dtypes.
    """
    where = shards(folder)
    origin = folder if folder.is_file() else folder / "config.json"
    raw = read_config(folder)
    scales: dict[str, Path] = {}
    if fp8.is_fp8(raw, str(origin)):
        # What is loaded is not FP8 any more, and its config must not say so.
        raw = {key: value for key, value in raw.items() if key != "quantization_config"}
        scales = {name: where.pop(name) for name in [f"{key}{fp8.SUFFIX}" for key in where] if name in where}
    config = ModelConfig.from_hf(raw, tensor_names=where, origin=str(origin))
    with torch.device("meta"):
        model = Decoder.build(config)
    places = {entry.name: (name, entry) for name, _, entry in parameter_entries(model)}
    unknown = sorted(where.keys() - places.keys())
    if config.tie_word_embeddings and "lm_head.weight" in unknown:
        unknown.remove("lm_head.weight")  # some writers repeat the tied matrix
        where.pop("lm_head.weight")
    missing = sorted(places.keys() - where.keys())
    if unknown or missing:
        raise CheckpointError(f"{folder}: {mismatch(unknown, missing)}")
    device = torch.device(device or "cpu")
    if is_gguf(folder) and dtype is None:
        dtype = torch.float32
        if device.type != "meta":
            log.info("%s: loaded as float32; ask for another dtype to round it", folder)
    if scales and device.type != "meta":
        log.info("%s: %d FP8 weights become %s", folder, len(scales), dtype or fp8.DTYPE)
    _fill(model, where, places, dtype, device, scales)
    return model


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


def _fill(
    model: Decoder,
    where: dict[str, Path],
    places: dict[str, tuple[str, Entry]],
    dtype: torch.dtype | None,
    device: torch.device,
    scales: Mapping[str, Path],
) -> None:
    ours = model.state_dict(keep_vars=True)
    float32 = _float32_names(model)
    filled: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        with open_shard(file) as shard:
            keys = [name for name, home in where.items() if home == file]
            if absent := sorted(set(keys) - set(shard.keys())):
                raise CheckpointError(
                    f"{file}: {', '.join(absent[:5])} is not in this file, where {INDEX} has it"
                )
            for key in keys:
                name, entry = places[key]
                kept = torch.float32 if name in float32 else dtype
                _check(file, shard, key, entry.part(ours[name]), key + fp8.SUFFIX in scales)
                head_dim = head_dim_of(model, name)
                if device.type == "meta":
                    if key + fp8.SUFFIX in scales:
                        fp8.check_shapes(key, *_shapes(shard, key, scales), head_dim)
                    continue
                tensor = _read(shard, key, kept, scales, head_dim)
                if entry.is_whole:
                    filled[name] = tensor.to(device)
                else:
                    if name not in filled:
                        filled[name] = torch.empty(ours[name].shape, dtype=tensor.dtype, device=device)
                    entry.part(filled[name]).copy_(tensor)
    if device.type != "meta":
        model.load_state_dict(filled, assign=True, strict=not model.config.tie_word_embeddings)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight


def _check(file: Path, shard: Any, key: str, place: Tensor, is_fp8: bool) -> None:
    view = shard.get_slice(key)
    stored, shape = view.get_dtype(), tuple(view.get_shape())
    if shape != tuple(place.shape):
        raise CheckpointError(f"{file}: {key} has shape {shape}, the config asks for {tuple(place.shape)}")
    is_packed = place.dtype == torch.uint8
    readable = ("F8_E4M3",) if is_fp8 else ("U8",) if is_packed else ("F64", "F32", "BF16", "F16")
    if stored not in readable:
        raise CheckpointError(f"{file}: {key} is {stored}; readable: {', '.join(readable)}")


def _read(
    shard: Any, key: str, dtype: torch.dtype | None, scales: Mapping[str, Path], head_dim: int | None
) -> Tensor:
    tensor: Tensor = shard.get_tensor(key)
    if key + fp8.SUFFIX in scales:
        with open_shard(scales[key + fp8.SUFFIX]) as home:
            scale = home.get_tensor(key + fp8.SUFFIX)
        return fp8.dequantize(key, tensor, scale, dtype or fp8.DTYPE, head_dim=head_dim)
    return tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor


def _shapes(shard: Any, key: str, scales: Mapping[str, Path]) -> tuple[list[int], list[int]]:
    with open_shard(scales[key + fp8.SUFFIX]) as home:
        return shard.get_slice(key).get_shape(), home.get_slice(key + fp8.SUFFIX).get_shape()


def head_dim_of(model: Decoder, name: str) -> int | None:
    """Rows of one head in a projection of queries, keys or values; None for every other parameter."""
    owner, _, leaf = name.removesuffix(".weight").rpartition(".")
    attention = model.get_submodule(owner) if leaf in ("q_proj", "k_proj", "v_proj") else None
    if not isinstance(attention, Attention):
        return None
    return attention.spec.v_head_dim if leaf == "v_proj" else attention.spec.head_dim


def load_model(
    path_or_preset: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Decoder:
    """A model from a directory, a run folder's last checkpoint, a GGUF file, or a preset with fresh weights.

    Args:
        path_or_preset: what to load; fresh weights have seed 0.
        dtype: `float32`, `bfloat16`, `float16` or a torch dtype; None keeps the stored ones (presets and
            GGUF files: float32; FP8 weights: bfloat16).
        device: torch device; `meta` builds without data.

    Raises:
        CheckpointError: see `load`; also a preset larger than half of the free memory.
        ConfigError: an unknown dtype.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not accepted; accepted: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if str(path_or_preset) in PRESETS and not Path(path_or_preset).exists():
        return _from_preset(str(path_or_preset), dtype or torch.float32, torch.device(device or "cpu"))
    folder = resolve(path_or_preset)
    model = load(folder, dtype=dtype, device=device)
    model.source = folder
    return model.eval()


def _from_preset(name: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    config = ModelConfig.from_hf(preset(name), origin=f"preset {name}")
    with torch.device("meta"):
        model = Decoder.build(config).to(dtype)
    if device.type == "meta":
        return model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    free = free_bytes(device)
    if size > free / 2:
        raise CheckpointError(
            f"preset {name} needs {size / 2**30:.1f} GiB in {dtype}, more than half of the "
            f"{free / 2**30:.1f} GiB free; "
            'use device="meta" to look at it without data'
        )
    routers = _float32_names(model)
    model = model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in routers:
            tensor.data = tensor.data.float()
    return model.init_weights(0).eval()


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device, in bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def save(model: Decoder, folder: str | Path, *, carry_from: str | Path | None = None) -> None:
    """Writes the model as a Hugging Face directory, atomically: config.json, tensors, carried files.

    Args:
        folder: replaced once the new one is complete, if it exists and holds a model or nothing.
        carry_from: directory whose `CARRIED` files (tokenizer, template) come along, or a GGUF file whose
            metadata become such files; the model's own source if None.

    Raises:
        CheckpointError: `folder` holds something else, which replacing would delete.
    """
    replace_folder(Path(folder), lambda fresh: write_files(model, fresh, carry_from=carry_from))


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a new folder, then puts that in the place of `folder`, so that no half is ever there.

    Raises:
        CheckpointError: see `refuse_foreign`.
    """
    folder = folder.resolve()
    refuse_foreign(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        write(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        try:
            fresh.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        shutil.rmtree(old)
    else:
        fresh.rename(folder)


def refuse_foreign(folder: Path) -> None:
    """Nothing where `save` may write.

    Raises:
        CheckpointError: `folder` holds something that is no model, which replacing would delete.
    """
    if (
        folder.exists()
        and not (folder / "config.json").is_file()
        and not (folder.is_dir() and not any(folder.iterdir()))
    ):
        raise CheckpointError(
            f"{folder}: exists and is not a model directory; name another place, or remove it first"
        )


def write_files(model: Decoder, folder: Path, *, carry_from: str | Path | None = None) -> None:
    """The files of `save`, straight into `folder`; for callers that have their own atomic directory."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for _, tensor, entry in parameter_entries(model):
        part = entry.part(tensor).detach().cpu().contiguous()
        nbytes = part.numel() * part.element_size()
        if size and size + nbytes > SHARD_BYTES:
            groups.append({})
            size = 0
        groups[-1][entry.name] = part
        size += nbytes
    total = sum(t.numel() * t.element_size() for group in groups for t in group.values())
    weight_map = {}
    for i, group in enumerate(groups):
        file = (
            "model.safetensors" if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        )
        save_file(group, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(_config_of(model), indent=2) + "\n")
    source = carry_from or model.source
    if is_gguf(source):
        tokenizer = load_gguf_tokenizer(Path(str(source)))
        if tokenizer is not None:
            tokenizer.save(folder)
    elif source is not None:
        for file_path in (file for pattern in CARRIED for file in Path(source).glob(pattern)):
            shutil.copyfile(file_path, folder / file_path.name)


def _config_of(model: Decoder) -> dict[str, Any]:
    """The config.json of a model: as it was read, but for a dtype that is no longer that of the tensors."""
    raw = model.config.to_hf()
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return {key: dtype if key in ("dtype", "torch_dtype") and value else value for key, value in raw.items()}


Decoder.saver = save
