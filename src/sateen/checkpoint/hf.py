"""The face of checkpoints: `load_model` and `save`, in Hugging Face's form."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sateen.checkpoint.folder import replace_folder
from sateen.checkpoint.gguf import is_gguf, load_gguf_tokenizer
from sateen.checkpoint.load import float32_names, load, parameter_entries
from sateen.checkpoint.shards import resolve
from sateen.checkpoint.write import Outgoing, write_shards
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.lowbit import lowbit_weights
from sateen.models.presets import PRESETS
from sateen.models.registry import preset

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Files a model directory carries beside its tensors, as patterns; copied byte for byte. Receipts are not
# among them: they speak of the weights they were measured on.
CARRIED = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json vocab.json merges.txt added_tokens.json "
    "tokenizer.model chat_template.jinja generation_config.json configuration_*.py modeling_*.py "
    "README.md LICENSE*"
).split()
CARRIED_FOLDERS = ("audio_tokenizer",)  # a speech model brings its own


def load_model(
    path_or_preset: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    mtp: str | Path | None = None,
    may_map: bool = True,
) -> Decoder:
    """A model from a directory, a run folder's last checkpoint, a GGUF file, or a preset with fresh weights.

    Args:
        path_or_preset: what to load; fresh weights have seed 0.
        dtype: `float32`, `bfloat16`, `float16` or a torch dtype; None keeps the stored ones (presets and
            GGUF files: float32; FP8 weights: bfloat16).
        device: torch device; `meta` builds without data.
        mtp: a directory with further MTP heads of this model, as the separate release of MiMo-7B's second
            and third is.
        may_map: see `load`.

    Raises:
        CheckpointError: see `load`; also a preset larger than half of the free memory.
        ConfigError: an unknown dtype.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype {dtype!r} is not accepted; accepted: {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if is_preset(path_or_preset):
        if mtp is not None:
            raise ConfigError(f"mtp adds heads to a stored model; the preset {path_or_preset} has fresh ones")
        return _from_preset(str(path_or_preset), dtype or torch.float32, torch.device(device or "cpu"))
    folder = resolve(path_or_preset)
    model = load(folder, dtype=dtype, device=device, mtp=mtp, may_map=may_map)
    model.source = folder
    return model.eval()


def is_preset(path_or_preset: str | Path) -> bool:
    """Whether `load_model` would take this for a preset: a name of one, with nothing stored under it."""
    return str(path_or_preset) in PRESETS and not Path(path_or_preset).exists()


def _from_preset(name: str, dtype: torch.dtype, device: torch.device) -> Decoder:
    config = ModelConfig.from_hf(preset(name), origin=f"preset {name}")
    model = Decoder.build_empty(config).to(dtype)
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
    routers = float32_names(model)
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


def write_files(model: Decoder, folder: Path, *, carry_from: str | Path | None = None) -> None:
    """The files of `save`, straight into `folder`; for callers that have their own atomic directory."""
    if (weights := lowbit_weights(model)) is not None:
        raise CheckpointError(
            f"a model with {weights} weights is for serving and is not saved; save the one it was made from"
        )
    outgoing = []
    for _, tensor, entry in parameter_entries(model):
        part = entry.part(tensor)
        outgoing.append(Outgoing(entry.name, part.dtype, tuple(part.shape), partial(entry.part, tensor)))
    write_shards(folder, outgoing)
    (folder / "config.json").write_text(json.dumps(_config_of(model), indent=2) + "\n")
    carry(carry_from or model.source, folder)


def carry(source: str | Path | None, folder: Path) -> None:
    """Copies the `CARRIED` files and folders of a directory, or writes what a GGUF file tells of them."""
    if is_gguf(source):
        tokenizer = load_gguf_tokenizer(Path(str(source)))
        if tokenizer is not None:
            tokenizer.save(folder)
    elif source is not None:
        for file in (file for pattern in CARRIED for file in Path(source).glob(pattern)):
            shutil.copyfile(file, folder / file.name)
        for name in CARRIED_FOLDERS:
            if (Path(source) / name).is_dir():
                shutil.copytree(Path(source) / name, folder / name)


def _config_of(model: Decoder) -> dict[str, Any]:
    """The config.json of a model: as it was read, but for a dtype that is no longer that of the tensors."""
    return name_dtype(model.config.to_hf(), model.model.embed_tokens.weight.dtype)


def name_dtype(raw: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A config whose dtype, where it states one, is this."""
    word = str(dtype).removeprefix("torch.")
    return {key: word if key in ("dtype", "torch_dtype") and value else value for key, value in raw.items()}


Decoder.saver = save
