"""MTP heads from a directory of their own: MiMo-7B's releases hold the first, a separate one the others."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sateen.errors import CheckpointError
from sateen.models.base import ModelConfig, family

log = logging.getLogger("sateen.checkpoint")

KEY = "num_nextn_predict_layers"


def add_heads(config: ModelConfig, names: Iterable[str], folder: Path) -> ModelConfig:
    """The config with the heads that `folder` holds behind the model's own.

    How the later heads are fed is not part of the files; see the family.

    Args:
        config: of the model in its own directory.
        names: the tensors of `folder`. They have the names that the model gives its heads, numbered on from
            its own; the directory holds nothing else and needs no config.json.
        folder: for messages.

    Raises:
        CheckpointError: the family has no heads, or `names` has anything else, a head that the model has
            already, or not the one that comes next.
    """
    chosen = family({"model_type": config.model_type}, str(folder))
    if chosen.mtp is None:
        raise CheckpointError(f"{folder}: a model of model_type {config.model_type!r} takes no MTP heads")
    path = chosen.mtp(config, 1).path
    heads = set()
    for name in names:
        match = re.match(rf"model\.{re.escape(path)}\.(\d+)\.", name)
        if match is None:
            raise CheckpointError(
                f"{folder}: holds {name}, which belongs to no MTP head; a directory with "
                f"model.{path}.N tensors alone is expected"
            )
        heads.add(int(match[1]))
    first, last = config.num_mtp_heads, config.num_mtp_heads + len(heads) - 1
    if heads != set(range(first, last + 1)):
        raise CheckpointError(
            f"{folder}: holds MTP heads {', '.join(map(str, sorted(heads)))} for a model that has "
            f"{first} of its own; heads numbered on from {first} without a gap are expected"
        )
    log.info("%s: MTP heads %d to %d behind %d of the model's own", folder, first, last, first)
    total = last + 1
    return replace(config, mtp=chosen.mtp(config, total), raw={**config.raw, KEY: total})
