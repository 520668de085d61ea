"""Averaged weights of several models: the baseline that distilling several teachers is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sateen.checkpoint.load import load
from sateen.checkpoint.shards import read_config, resolve
from sateen.errors import ConfigError
from sateen.models.decoder import Decoder


def average(models: Sequence[str | Path], weights: Sequence[float] | None = None) -> Decoder:
    """A model whose every parameter is the weighted mean of these models' parameters.

    Args:
        models: model directories or run folders of one config.
        weights: one per model, scaled to sum to 1; equal when None.

    Returns:
        A float32 model that carries the first one's tokenizer when it is saved. Sums are formed in float64.

    Raises:
        CheckpointError: a model cannot be loaded.
        ConfigError: no models, other configs, or weights that do not fit.
    """
    if not models:
        raise ConfigError("average needs at least one model")
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or any(share < 0 for share in shares) or not sum(shares) > 0:
        raise ConfigError(
            f"average of {len(models)} models has weights {shares}; give one per model, none below 0, "
            "not all 0"
        )
    folders = [resolve(model) for model in models]
    first = read_config(folders[0])
    for folder in folders[1:]:
        theirs = read_config(folder)
        if theirs != first:
            key = next(k for k in {**first, **theirs} if first.get(k) != theirs.get(k))
            raise ConfigError(
                f"{folder}: its {key} is {theirs.get(key)}, that of {folders[0]} {first.get(key)}; "
                "only models of one config have an average"
            )
    result = load(folders[0], dtype=torch.float32)
    means = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in result.state_dict().items()}
    for folder, share in zip(folders, shares, strict=True):
        for name, tensor in load(folder, dtype=torch.float32).state_dict().items():
            means[name] += share / sum(shares) * tensor.double()
    result.load_state_dict(means)
    result.source = folders[0]
    return result.eval()
