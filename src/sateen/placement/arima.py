"""ARIMA per layer and expert on block means, by statsforecast; a series whose fit looks wrong falls back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from sateen.errors import BackendUnavailable, ConfigError
from sateen.placement.trace import Floats

if TYPE_CHECKING:
    from sateen.placement.forecast import ForecastSettings

Fit = Callable[[Floats, int], Floats]


def arima(
    past_TLE: Floats, horizon: int, settings: ForecastSettings, *, fit: Fit | None = None
) -> tuple[Floats, int]:
    """The path [H, L, E] and how many series fell back to `wma`.

    Fits on means of `block` steps: raw loads carry a wiggle of a few steps that a moving-average term chases.
    A series falls back when its share is below a tenth of the mean one, its fit fails, or its forecast is not
    finite or leaves [0, 1] or the history by more than three deviations: statsforecast's CSS form returns
    zeros without a word, so finite is not enough.

    Args:
        fit: maps a history and a number of blocks to that many values; statsforecast's when None.

    Raises:
        BackendUnavailable: statsforecast is not installed.
        ConfigError: fewer blocks than the order can be fitted on.

    Source: Cong et al. 2024, arXiv 2404.16914 §IV-B, order (5, 1, 5); blocks and fall-back are ours.
    """
    from sateen.placement.forecast import wma

    fit = fit or statsforecast_fit(settings.order)
    blocks = min(len(past_TLE) // settings.block, settings.history_blocks)
    if blocks < 2 * (sum(settings.order) + 1):
        raise ConfigError(
            f"arima: {len(past_TLE)} steps make {blocks} blocks of {settings.block}; order {settings.order}"
            f" needs {2 * (sum(settings.order) + 1)}"
        )
    _, L, E = past_TLE.shape
    tail = past_TLE[-blocks * settings.block :].reshape(blocks, settings.block, L, E).mean(1)
    path = np.repeat(wma(past_TLE, horizon, settings), horizon, axis=0)
    steps, fell_back = -(-horizon // settings.block), 0
    for l in range(L):
        for e in range(E):
            series = tail[:, l, e]
            ahead = _try(fit, series, steps) if series.mean() >= 0.1 / E else None
            if ahead is None:
                fell_back += 1
            else:
                path[:, l, e] = np.repeat(ahead, settings.block)[:horizon]
    return path, fell_back


def statsforecast_fit(order: tuple[int, int, int]) -> Fit:
    """A fit by statsforecast with its default, CSS then maximum likelihood."""
    try:
        from statsforecast.models import ARIMA
    except ModuleNotFoundError:
        raise BackendUnavailable(
            "method arima needs the package statsforecast: pip install 'sateen[arima]'; wma needs nothing"
        ) from None

    def fit(series: Floats, steps: int) -> Floats:
        return np.asarray(ARIMA(order=order).forecast(y=series, h=steps)["mean"], np.float64)

    return fit


def _try(fit: Fit, series: Floats, steps: int) -> Floats | None:
    try:
        ahead = fit(series, steps)
    except (ValueError, ArithmeticError, IndexError, np.linalg.LinAlgError):
        return None
    slack = 3 * series.std()
    low, high = max(0.0, series.min() - slack), min(1.0, series.max() + slack)
    return (
        ahead if bool(np.isfinite(ahead).all() and (ahead >= low).all() and (ahead <= high).all()) else None
    )
