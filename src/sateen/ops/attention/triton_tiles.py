"""Tile sizes of the Triton attention kernels: a small table, read at each call.

The table holds starting values that were never timed; `SATEEN_ATTENTION_TILES` overrides them for tuning, for
instance `forward=128,64,8,3 decode=16,64,4,3 query_gradient=64,64,4,2 key_gradient=64,64,4,2 parts=8`: rows
of queries, keys, warps, stages, and the parts that a decode step's keys are cut into. Rows and keys of a tile
are powers of two from 16.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

from sateen.errors import ConfigError

VARIABLE = "SATEEN_ATTENTION_TILES"
KERNELS = ("forward", "decode", "query_gradient", "key_gradient")
MIN_ROWS = 16  # of a tile: what a matrix product of Triton takes at least
MAX_PARTS = 64


@dataclass(frozen=True)
class Tile:
    """Rows of queries, keys, warps and pipeline stages of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """What the environment asks for: tiles by kernel, and the number of parts, None for the heuristic."""

    tiles: dict[str, Tile]
    parts: int | None = None


def tuning() -> Tuning:
    """The overrides of the environment.

    Raises:
        ConfigError: the variable does not read as described at the top of this file.
    """
    return _parsed(os.environ.get(VARIABLE, ""))


@cache
def _parsed(text: str) -> Tuning:
    tiles, parts = {}, None
    for item in text.split():
        name, _, value = item.partition("=")
        try:
            numbers = [int(number) for number in value.split(",")]
        except ValueError:
            numbers = []
        if name == "parts" and len(numbers) == 1 and 1 <= numbers[0] <= MAX_PARTS:
            parts = numbers[0]
        elif name in KERNELS and len(numbers) == 4 and all(_is_size(n) for n in numbers[:2]):
            tiles[name] = Tile(*numbers)
        else:
            raise ConfigError(
                f"{VARIABLE} has {item!r}; it takes KERNEL=ROWS,KEYS,WARPS,STAGES with KERNEL one of "
                f"{', '.join(KERNELS)} and powers of two from {MIN_ROWS}, and parts=1..{MAX_PARTS}"
            )
    return Tuning(tiles, parts)


def _is_size(number: int) -> bool:
    return number >= MIN_ROWS and number & (number - 1) == 0


def tile(kernel: str, *, width: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tile:
    """The tile of a kernel of `KERNELS`.

    Args:
        kernel: its name.
        width: the larger of the padded head sizes of keys and values.
        dtype: of the inputs.
        capability: of the device, (0, 0) for the interpreter.
    """
    found = tuning().tiles.get(kernel)
    return found or _default(kernel, width, dtype.itemsize, capability)


@cache
def _default(kernel: str, width: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    if itemsize == 4:
        # No tensor cores at full precision: products run on registers, which are the limit.
        keys = 32 if width <= 128 else 16
        return Tile(16 if kernel == "decode" else 32, keys, 4 if width <= 64 else 8, 2)
    is_hopper = capability >= (9, 0)
    if kernel == "decode":
        return Tile(16, 64, 4, 3 if width <= 128 else 2)
    if kernel == "forward":
        if width <= 128:
            return Tile(128, 64, 8 if width > 64 else 4, 3)
        return Tile(128 if is_hopper else 64, 64, 8, 2)
    if width <= 128:
        return Tile(64, 128 if is_hopper else 64, 8 if is_hopper else 4, 2)
    return Tile(64, 32, 8, 2) if kernel == "query_gradient" else Tile(32, 64, 8, 2)
