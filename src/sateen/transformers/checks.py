"""What callers of our models in transformers ask for: refused, checked, or turned into our words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sateen.errors import ConfigError, ShapeError
from sateen.transformers.cache import GrowingCache

# What transformers' own callers pass along; none of it changes what is loaded from a local directory.
FROM_CALLERS = frozenset(
    "_from_auto adapter_kwargs local_files_only low_cpu_mem_usage trust_remote_code use_safetensors".split()
)


def refuse(where: str, words: Mapping[str, Any]) -> None:
    """Nothing if every word is empty or one that callers pass along.

    Raises:
        ConfigError: it names the others.
    """
    if asked := sorted(word for word, value in words.items() if word not in FROM_CALLERS and _says(value)):
        raise ConfigError(f"{where}: {', '.join(asked)} is not supported by sateen's models in transformers")


def _says(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(value)


def one_device(device_map: Any) -> Any:
    """The device of `device_map`, or None.

    Raises:
        ConfigError: it spreads a model over devices.
    """
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ConfigError(f"device_map {device_map!r} is not supported; accepted: one device, as 'cpu'")
    return device_map


def check_positions(ids: Tensor, mask: Tensor | None, positions: Tensor, cache: GrowingCache | None) -> None:
    """Nothing, if the positions of new places are what `real_counts` counts.

    Raises:
        ShapeError: they are not.
    """
    real, counts = real_counts(ids, mask, cache)
    if not positions.expand_as(ids)[real].equal(counts[real].to(positions.dtype)):
        raise ShapeError(
            "position_ids must count the real tokens of attention_mask from 0, as they do when left out"
        )


def real_counts(ids: Tensor, mask: Tensor | None, cache: GrowingCache | None) -> tuple[Tensor, Tensor]:
    """Which of the new places hold tokens, and how many tokens stand before each; both [B, T]."""
    before = cache.width if cache is not None else 0
    if mask is None:
        mask = ids.new_ones(len(ids), before + ids.shape[1])
    if mask.shape != (len(ids), before + ids.shape[1]):
        raise ShapeError(
            f"attention_mask is {tuple(mask.shape)} for input_ids {tuple(ids.shape)} and "
            f"{before} cached places"
        )
    return mask.bool()[:, before:], (mask.bool().cumsum(1) - 1)[:, before:]


def real_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """The labels whose prediction is made at a real token; -100 elsewhere.

    Raises:
        ShapeError: a padded place has a label.
    """
    real = mask.bool()
    if not labels[~real].eq(-100).all():
        raise ShapeError("labels at padded places must be -100")
    is_predicted = torch.cat([real[:, :1], real[:, :-1]], 1)
    return labels.masked_fill(~is_predicted, -100)
