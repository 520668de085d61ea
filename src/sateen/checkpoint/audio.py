"""Audio tokenizers on disk: config.json and safetensors under the published names, codebooks included.

A directory may be a tokenizer, a run folder whose last checkpoint is one, or a model that carries its
tokenizer in `audio_tokenizer/`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sateen.checkpoint.folder import replace_folder
from sateen.checkpoint.load import mismatch
from sateen.checkpoint.shards import FLOATS, open_shard, read_config, shards
from sateen.errors import CheckpointError
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig

SUBFOLDER = "audio_tokenizer"


def resolve_audio_tokenizer(path: str | Path) -> Path:
    """The directory of the tokenizer that `path` names.

    Raises:
        CheckpointError: no tokenizer is there; the message says what was found instead.
    """
    folder = Path(path)
    places = [folder, folder / SUBFOLDER]
    places += [folder / name / sub for name in ("model", "hf") for sub in ("", SUBFOLDER)]
    found = []
    for place in places:
        if (place / "config.json").is_file():
            model_type = read_config(place).get("model_type")
            if model_type == AudioTokenizerConfig.model_type:
                return place
            found.append(f"{place} is {model_type!r}")
    what = "; ".join(found) or ("no config.json there" if folder.exists() else "there is no such folder")
    raise CheckpointError(
        f"{folder}: no audio tokenizer ({what}); accepted: a directory whose config.json has model_type "
        f"{AudioTokenizerConfig.model_type!r}, a run folder, or a model with a folder {SUBFOLDER}/"
    )


def load_audio_tokenizer(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> AudioTokenizer:
    """The tokenizer that `path` names, in evaluation mode.

    Args:
        dtype: of the parameters. Codebooks and the transform's window are float32 in any case: rounded
            entries would change codes.
        device: where tensors go; `meta` checks names and shapes without reading data.

    Raises:
        CheckpointError: no tokenizer is there, tensors are missing or unknown, or shapes differ.
    """
    folder = resolve_audio_tokenizer(path)
    config = AudioTokenizerConfig.from_hf(read_config(folder), origin=str(folder / "config.json"))
    with torch.device("meta"):
        tokenizer = AudioTokenizer(config)
    ours = tokenizer.state_dict()
    buffers = {name for name, _ in tokenizer.named_buffers()}
    where = shards(folder)
    unknown, missing = sorted(where.keys() - ours.keys()), sorted(ours.keys() - where.keys())
    if unknown or missing:
        raise CheckpointError(f"{folder}: {mismatch(unknown, missing)}")
    filled: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        with open_shard(file) as shard:
            for name in (name for name, home in where.items() if home == file):
                view = shard.get_slice(name)
                shape, wanted = tuple(view.get_shape()), tuple(ours[name].shape)
                is_flag = name.endswith(".inited")  # a flag may be stored as a number or as a truth value
                if shape != wanted:
                    raise CheckpointError(f"{file}: {name} has shape {shape}, the config asks for {wanted}")
                if view.get_dtype() not in FLOATS and not is_flag:
                    raise CheckpointError(
                        f"{file}: {name} is {view.get_dtype()}; readable: {', '.join(FLOATS)}"
                    )
                if torch.device(device).type != "meta":
                    kept = torch.float32 if name in buffers else dtype
                    filled[name] = shard.get_tensor(name).to(device, kept)
    if filled:
        tokenizer.load_state_dict(filled, assign=True)
    return tokenizer.eval()


def save_audio_tokenizer(tokenizer: AudioTokenizer, folder: str | Path) -> None:
    """Writes a tokenizer's directory, atomically.

    Raises:
        CheckpointError: `folder` holds something that is no model, which replacing would delete.
    """
    replace_folder(Path(folder), lambda fresh: write_files(tokenizer, fresh))


def write_files(tokenizer: AudioTokenizer, folder: Path) -> None:
    """The files of `save_audio_tokenizer`, straight into `folder`; for callers with an atomic one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tokenizer.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(tokenizer.config.to_hf(), indent=2) + "\n")


AudioTokenizer.saver = save_audio_tokenizer
AudioTokenizer.loader = load_audio_tokenizer
