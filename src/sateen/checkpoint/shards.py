"""Model directories as they are on disk: which one is meant, its config, which file holds which tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sateen.checkpoint.gguf import GGUFShard, gguf_tensor_names, is_gguf, read_gguf_config
from sateen.errors import CheckpointError, ConfigError
from sateen.models.presets import PRESETS

INDEX = "model.safetensors.index.json"
# safetensors' words.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn, "U8": torch.uint8,
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16")


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
        paths = {file: folder / file for file in sorted(set(weight_map.values()))}
        if missing := [file for file, path in paths.items() if not path.is_file()]:
            raise CheckpointError(f"{folder / INDEX}: names files that are not there: {', '.join(missing)}")
        return {name: paths[file] for name, file in weight_map.items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_shard(file) as shard:
            names = list(shard.keys())
        if twice := sorted(found.keys() & set(names)):
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


def by_file(where: Mapping[str, Path]) -> dict[Path, list[str]]:
    """File -> the names of its tensors, files in the order of their names."""
    found: dict[Path, list[str]] = {file: [] for file in sorted(set(where.values()))}
    for name, file in where.items():
        found[file].append(name)
    return found


class Files:
    """Tensors of a directory's files, by name. Only the file asked last stays open."""

    def __init__(self, where: Mapping[str, Path]):
        self.where = where
        self._file: Path | None = None
        self._shard: Any = None
        self._names: set[str] = set()
        self._header: dict[str, Any] | None = None

    def _turn_to(self, name: str) -> Path:
        file = self.where[name]
        if file != self._file:
            self._shard, self._header = open_shard(file), None
            self._names, self._file = set(self._shard.keys()), file
        if name not in self._names:
            raise CheckpointError(f"{file}: {name} is not in this file, where {INDEX} has it")
        return file

    def describe(self, name: str) -> tuple[str, tuple[int, ...]]:
        """A tensor's dtype, in safetensors' words, and shape."""
        self._turn_to(name)
        view = self._shard.get_slice(name)
        return view.get_dtype(), tuple(view.get_shape())

    def mapped(self, name: str) -> Tensor:
        """The tensor as a part of its file, which the system reads when it is used.

        What was read of a file stays resident until the last tensor mapped from it is gone: right for
        tensors that are kept as they are, but twice the memory for those that are cast or copied.
        """
        self._turn_to(name)
        tensor: Tensor = self._shard.get_tensor(name)
        return tensor

    def copied(self, name: str) -> Tensor:
        """The tensor in memory of its own; nothing else of its file becomes resident."""
        path = self._turn_to(name)
        if is_gguf(path):
            return self.mapped(name)  # quantised blocks become new tensors in any case
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if self._header is None:  # sound, since `open_shard` took the file
                self._header = json.loads(file.read(size))
            entry = self._header[name]
            begin, end = entry["data_offsets"]
            data = torch.empty(end - begin, dtype=torch.uint8, device="cpu")
            file.seek(8 + size + begin)
            if file.readinto(data.numpy().data) != end - begin:
                raise CheckpointError(f"{path}: ends inside {name}; fetch or write it again")
        return data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
