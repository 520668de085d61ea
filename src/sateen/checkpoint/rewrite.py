"""A stored model under another config, dtype or number of MTP heads, tensor by tensor: no model is built.

Everything is compared with the config from headers before a file is written; a tensor is in memory only while
it is copied, cast or dequantised.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sateen.checkpoint.folder import replace_folder
from sateen.checkpoint.fp8 import BLOCK
from sateen.checkpoint.gguf import gguf_bytes, is_gguf
from sateen.checkpoint.hf import carry, name_dtype
from sateen.checkpoint.load import Stored, float32_names
from sateen.checkpoint.scales import SUFFIX
from sateen.checkpoint.shards import DTYPES, by_file
from sateen.checkpoint.write import Outgoing, write_shards
from sateen.errors import ConfigError
from sateen.models.mimo_v2_flash_dialects import in_dialect
from sateen.models.quant_config import KEY as QUANT

log = logging.getLogger("sateen.checkpoint")
CPU = torch.device("cpu")


def rewrite(
    stored: Stored, folder: Path, *, dtype: torch.dtype | None = None, dialect: str | None = None
) -> None:
    """Writes a model's directory from another one, atomically.

    Args:
        stored: what `check` returned for the source.
        folder: see `save`.
        dtype: what floating-point tensors are cast to and FP8 weights become; routers and the scales of
            packed weights become float32. None keeps every byte, FP8 codes and their scales included; a
            GGUF file becomes float32 then.
        dialect: `hub` or `transformers`, how the config of MiMo-V2-Flash is spelt; as it is when None.

    Raises:
        CheckpointError: see `Stored.read`, `refuse_foreign`.
        ConfigError: the dialect cannot say what this model is, or cannot hold its FP8 scales.
    """
    if is_gguf(stored.folder) and dtype is None:
        dtype = torch.float32
        log.info("%s: written as float32; ask for another dtype to round it", stored.folder)
    config = stored.model.config if dialect is None else in_dialect(stored.model.config, dialect)
    raw = config.to_hf()
    if dtype is not None:
        raw = name_dtype(raw, dtype)
    elif stored.scales:
        raw[QUANT] = stored.raw[QUANT]
        raw = {key: raw[key] for key in (*stored.raw, *raw) if key in raw}
        if dialect == "transformers":
            raw[QUANT] = _transformers_table(stored)
    outgoing = _as_stored(stored) if dtype is None else _cast(stored, dtype)

    def write(fresh: Path) -> None:
        write_shards(fresh, outgoing)
        (fresh / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        carry(stored.folder, fresh)

    replace_folder(folder, write)


def _transformers_table(stored: Stored) -> dict[str, Any]:
    """The `quantization_config` for transformers, which stacks experts and their scales as it loads.

    It finds the size of a block by dividing rows by scale rows, so a grid that is not whole blocks of 128
    would be read wrongly without a word. Layers without scales must be listed.
    """
    plain = []
    for key in stored.files.where:
        _, shape = stored.files.describe(key)
        if key in stored.scales:
            grid = stored.scales.shape(key)
            if any(n > 1 and n * BLOCK != size for n, size in zip(grid, shape, strict=True)):
                raise ConfigError(
                    f"{stored.files.where[key]}: {key}: transformers reads {grid[0]} x {grid[1]} FP8 scales "
                    f"of a weight of {shape[0]} x {shape[1]} as equal blocks, which they are not; use "
                    "--dtype bfloat16"
                )
        elif len(shape) == 2 and key.endswith(".weight"):
            plain.append(key.removesuffix(".weight"))
    table = dict(stored.raw[QUANT])
    return table if "ignored_layers" in table else {"modules_to_not_convert": plain} | table


def _as_stored(stored: Stored) -> list[Outgoing]:
    """Every tensor as it is, the scales of FP8 weights beside them."""
    outgoing = []
    for keys in by_file(stored.files.where).values():
        for key in keys:
            for name, files in ((key, stored.files), (key + SUFFIX, stored.scales.files)):
                if name in files.where:
                    code, shape = files.describe(name)
                    outgoing.append(Outgoing(name, DTYPES[code], shape, partial(files.copied, name)))
    scales = f"; {len(stored.scales)} are FP8 and keep their scales" if stored.scales else ""
    log.info("%s: %d tensors kept as stored%s", stored.folder, len(stored.files.where), scales)
    return outgoing


def _cast(stored: Stored, dtype: torch.dtype) -> list[Outgoing]:
    """Every tensor in `dtype`, but for those that stay float32 and bytes that are no numbers."""
    float32 = float32_names(stored.model)
    outgoing: list[Outgoing] = []
    changes: Counter[tuple[str, torch.dtype]] = Counter()
    kinds = gguf_bytes(stored.folder) if is_gguf(stored.folder) else {}
    blocks = 0
    for keys in by_file(stored.files.where).values():
        for key in keys:
            code, shape = stored.files.describe(key)
            becomes = torch.float32 if stored.places[key][0] in float32 else dtype
            if not DTYPES[code].is_floating_point:
                becomes = DTYPES[code]
            blocks += math.prod(stored.scales.shape(key)) if key in stored.scales else 0
            changes[kinds.get(key, (code,))[0], becomes] += 1
            outgoing.append(Outgoing(key, becomes, shape, partial(stored.read, key, becomes, CPU)))
    for (code, becomes), count in changes.items():
        words = f"cast from {code} to"
        if code == "F8_E4M3":
            words = f"dequantised from FP8 ({blocks} blocks) to"
        elif code not in DTYPES:
            words = f"dequantised from {code} to"
        elif DTYPES[code] == becomes:
            words = "stay"
        log.info("%s: %d tensors %s %s", stored.folder, count, words, str(becomes).removeprefix("torch."))
    return outgoing
