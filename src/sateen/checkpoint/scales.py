"""The scales of a directory's FP8 weights: which weights have them, where they are, what they make of codes.

A weight `<name>` has its scales in `<name>_scale_inv`. Shape letters as in `checkpoint.fp8`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sateen.checkpoint import fp8
from sateen.checkpoint.shards import FLOATS, Files
from sateen.errors import CheckpointError

SUFFIX = "_scale_inv"


def is_fp8(raw: Mapping[str, Any], origin: str) -> bool:
    """Whether a config.json says that weights are stored as FP8 blocks of the kind read here.

    Raises:
        CheckpointError: they are FP8 of another kind.
    """
    table = raw.get("quantization_config")
    if not isinstance(table, Mapping) or table.get("quant_method") != "fp8":
        return False
    block, form = table.get("weight_block_size"), table.get("fmt", "e4m3")
    if block is None or list(block) != [fp8.BLOCK, fp8.BLOCK] or form != "e4m3":
        raise CheckpointError(
            f"{origin}: quantization_config: FP8 weights with weight_block_size {block} and fmt {form!r} are "
            f"not readable; readable: [{fp8.BLOCK}, {fp8.BLOCK}] and 'e4m3'"
        )
    return True


class Scales:
    """Which weights of a directory are FP8, and their scales."""

    def __init__(self, homes: Mapping[str, Path]):
        """`homes`: name of a tensor of scales -> its file."""
        self.files = Files(homes)

    @classmethod
    def take(cls, raw: Mapping[str, Any], where: MutableMapping[str, Path], origin: str) -> Scales:
        """Takes the scales out of `where`, tensor name -> file, if the config says that there are any.

        Raises:
            CheckpointError: see `is_fp8`.
        """
        names = [name + SUFFIX for name in where if name + SUFFIX in where] if is_fp8(raw, origin) else []
        return cls({name: where.pop(name) for name in names})

    def __contains__(self, weight: str) -> bool:
        return weight + SUFFIX in self.files.where

    def __len__(self) -> int:
        return len(self.files.where)

    def shape(self, weight: str) -> tuple[int, ...]:
        """Rows and columns of a weight's scales."""
        return self.files.describe(weight + SUFFIX)[1]

    def check(self, weight: str, codes_shape: Sequence[int], head_dim: int | None) -> None:
        """Refuses scales of another dtype or number than the weight's.

        Raises:
            CheckpointError: they do not fit.
        """
        name = weight + SUFFIX
        dtype, shape = self.files.describe(name)
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{self.files.where[name]}: {name} is {dtype}; readable: {', '.join(FLOATS)}"
            )
        fp8.check_shapes(f"{self.files.where[name]}: {weight}", codes_shape, shape, head_dim)

    def reading(self, weight: str, codes_RC: Tensor, head_dim: int | None) -> str:
        """The name of the reading that the codes speak for; see `fp8.choose_reading`."""
        name = f"{self.files.where[weight + SUFFIX]}: {weight}"
        return fp8.choose_reading(name, codes_RC, self.shape(weight)[0], head_dim)

    def dequantize(self, weight: str, codes_RC: Tensor, dtype: torch.dtype, head_dim: int | None) -> Tensor:
        """See `fp8.dequantize`."""
        name = weight + SUFFIX
        scale_rc = self.files.copied(name)
        origin = f"{self.files.where[name]}: {weight}"
        return fp8.dequantize(origin, codes_RC, scale_rc, dtype, head_dim=head_dim)
