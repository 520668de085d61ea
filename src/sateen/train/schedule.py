"""Learning-rate schedules: a factor of the peak rate as a function of tokens seen.

The training loop asks before each step; nothing else is remembered, so resuming needs no schedule state.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sateen.config import ConstantSchedule, CosineSchedule, WSDSchedule

Schedule = Callable[[float], float]
"""Tokens seen -> factor in [0, 1]."""


def constant(warmup: int) -> Schedule:
    """Linear from 0 over `warmup` tokens, then 1."""
    return lambda tokens: tokens / warmup if tokens < warmup else 1.0


def cosine(total: int, warmup: int, final: float) -> Schedule:
    """Linear from 0 over `warmup` tokens, then half a cosine to `final` at `total`."""

    def factor(tokens: float) -> float:
        if tokens < warmup:
            return tokens / warmup
        progress = _progress(tokens, warmup, total)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


def warmup_stable_decay(total: int, warmup: int, decay: int, final: float) -> Schedule:
    """Linear from 0 over `warmup` tokens, 1, then linear to `final` over the last `decay` of `total`."""

    def factor(tokens: float) -> float:
        if tokens < warmup:
            return tokens / warmup
        return 1.0 - (1.0 - final) * _progress(tokens, total - decay, total)

    return factor


def _progress(tokens: float, start: int, end: int) -> float:
    """How far `tokens` is from `start` to `end`, 0 before and 1 behind."""
    if tokens <= start or end <= start:
        return 0.0
    return min(1.0, (tokens - start) / (end - start))


def build_schedule(config: ConstantSchedule | CosineSchedule | WSDSchedule, total_tokens: int) -> Schedule:
    """The configured schedule of a stage of `total_tokens`."""
    if isinstance(config, CosineSchedule):
        return cosine(total_tokens, config.warmup_tokens, config.final_fraction)
    if isinstance(config, WSDSchedule):
        return warmup_stable_decay(
            total_tokens, config.warmup_tokens, config.decay_tokens, config.final_fraction
        )
    return constant(config.warmup_tokens)
