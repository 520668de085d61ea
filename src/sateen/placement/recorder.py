"""A recorder of expert loads for models of transformers, by forward hooks on their routers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from sateen.errors import ConfigError
from sateen.placement.trace import LoadTrace

if TYPE_CHECKING:
    from torch import Tensor, nn


class LoadRecorder:
    """Counts collected so far; one step is whatever happened between two calls of `step()`."""

    def __init__(self, layers: int) -> None:
        self._steps: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        self._now: list[Tensor | None] = [None] * layers

    def add(self, layer: int, ids: Tensor, experts: int) -> None:
        """Adds the chosen expert ids of one forward pass of a layer."""
        counts, before = ids.detach().flatten().bincount(minlength=experts), self._now[layer]
        self._now[layer] = counts if before is None else before + counts

    def step(self) -> None:
        """Ends a step.

        Raises:
            ConfigError: a router did not run in it; hooks do not fire when a CUDA graph is replayed.
        """
        if any(counts is None for counts in self._now):
            raise ConfigError(
                "a step without tokens in every router; hooks do not fire in CUDA graph replays"
            )
        self._steps.append(np.stack([c.cpu().numpy() for c in self._now if c is not None]).astype(np.int64))
        self._now = [None] * len(self._now)

    def trace(self) -> LoadTrace:
        """The recorded steps.

        Raises:
            ConfigError: no step was recorded.
        """
        if not self._steps:
            raise ConfigError("no step was recorded; call step() after each forward pass")
        counts = np.stack(self._steps)
        return LoadTrace(
            counts, np.arange(1, len(counts) + 1), tuple(range(counts.shape[1])), "recorded",
            {"padding": "counted"},
        )  # fmt: skip


@contextmanager
def record(model: nn.Module) -> Iterator[LoadRecorder]:
    """A recorder that is attached while the block runs: `with record(model) as r: model(ids); r.step()`.

    It hooks modules whose class is named `...Router` and whose output holds the float logits [T, E] and the
    integer ids [T, k] of the experts chosen. Padding is counted: mask nothing, or feed none. Layers are
    numbered in the model's order. Runs of our own trainer record themselves.

    Raises:
        ConfigError: the model has no such module, or its output holds no ids.
    """
    routers = [module for module in model.modules() if type(module).__name__.endswith("Router")]
    if not routers:
        raise ConfigError(f"{type(model).__name__} has no module whose class name ends in Router")
    recorder = LoadRecorder(len(routers))

    def hook(layer: int) -> Any:
        def count(module: nn.Module, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            ids = [part for part in parts if not part.dtype.is_floating_point]
            logits = [part for part in parts if part.dtype.is_floating_point]
            if len(ids) != 1 or not logits:
                raise ConfigError(f"{type(module).__name__} does not return the ids of the experts it chose")
            recorder.add(layer, ids[0], max(part.shape[-1] for part in logits))

        return count

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(routers)]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
