"""Discrete choices of every token of a request, so that training can repeat them.

`Runner` hands over what a step chose; the request gives it to its output.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Recording:
    """One kind of choice, in some layers.

    Attributes:
        layers: which they are made in.
        num_tokens: tokens whose choices are known, from the first.
    """

    def __init__(self, layers: tuple[int, ...]):
        self.layers = layers
        self.num_tokens = 0
        self._pieces: list[Tensor] = []

    def add(self, choices: Tensor, start: int, end: int) -> None:
        """Keeps the choices of the tokens from `start` to `end`; the first ones of a token stand.

        A preempted request computes its tokens again, maybe by newer weights; the first choices are those
        that its log-probabilities belong to.

        Args:
            choices: int32 [T, layers, ...], from token `start` on; rows behind `end` are not used.
        """
        if end > self.num_tokens:
            self._pieces.append(choices[self.num_tokens - start : end - start])
            self.num_tokens = end

    def by_layer(self, count: int) -> dict[int, Tensor] | None:
        """Layer -> int32 [count, ...], -1 for tokens that were never computed; None before the first."""
        if not self._pieces:
            return None
        known = torch.cat(self._pieces)
        missing = known.new_full((count - len(known), *known.shape[1:]), -1)
        return dict(zip(self.layers, torch.cat([known, missing]).unbind(1), strict=True))
