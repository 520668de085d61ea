"""What another server must offer to stand in for ours, and how new weights reach an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sateen.checkpoint.hf import load_model
from sateen.engine.request import RequestOutput, SamplingParams
from sateen.errors import CheckpointError
from sateen.models.decoder import Decoder

Prompt = str | Sequence[int]


class WeightUpdate(NamedTuple):
    """New weights for an engine.

    Attributes:
        version: number that later outputs carry.
        source: parameters by the model's names, a model directory, or None when the engine's own model object
            was changed in place.
    """

    version: int
    source: Mapping[str, Tensor] | str | Path | None = None


class Engine(Protocol):
    """What rollouts and evaluations need of an engine."""

    def generate(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """One output per prompt, in order."""
        ...

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probabilities of all tokens but the first of each sequence."""
        ...

    def update_weights(self, update: WeightUpdate) -> None:
        """Uses new weights from the next token on."""
        ...


@torch.no_grad()
def copy_weights(model: Decoder, source: Mapping[str, Tensor] | str | Path) -> None:
    """Overwrites the model's parameters in place.

    Raises:
        CheckpointError: names or shapes that are not the model's; nothing has changed then.
    """
    if isinstance(source, str | Path):
        source = load_model(source, device=str(model.device)).state_dict()
    own = model.state_dict(keep_vars=True)
    missing, unknown = sorted(own.keys() - source.keys()), sorted(source.keys() - own.keys())
    if model.config.tie_word_embeddings and missing == ["lm_head.weight"]:
        missing = []
    if missing or unknown:
        raise CheckpointError(
            f"the weights are not this model's: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    for name, tensor in source.items():
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(own[name].shape)} here, {tuple(tensor.shape)} in the update"
            raise CheckpointError(f"the weights are not this model's: {name} is {shapes}")
    for name, tensor in source.items():
        own[name].copy_(tensor)
