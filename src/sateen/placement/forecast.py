"""Forecasts of expert shares: one function per method, a registry of names, and the interval around them.

A method maps past shares [T, L, E] to a path [H, L, E], or [1, L, E] when the path is constant. `forecast`
clips at 0 and renormalises each layer. Letters are in `trace.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sateen.errors import ConfigError, unknown_name
from sateen.placement.trace import Floats, LoadTrace


@dataclass(frozen=True)
class ForecastSettings:
    """What the methods may be told; every value is ours unless a source is named.

    Attributes:
        window: steps that sliding windows and `wma` look back; the paper does not state its own.
        half_life: steps after which `ema` counts a past share half.
        block: steps averaged before `arima` and long `lstm` forecasts.
        order: (p, d, q) of `arima`; the paper's runs use (5, 1, 5).
        history_blocks: blocks that `arima` fits on.
        residual: `lstm` adds to the window mean; otherwise it predicts the shares through a softmax.
        look_back, hidden_size, updates, batch_size, learning_rate, seed: of `lstm`.
    """

    window: int = 100
    half_life: float = 100.0
    block: int = 10
    order: tuple[int, int, int] = (5, 1, 5)
    history_blocks: int = 60
    residual: bool = True
    look_back: int = 50
    hidden_size: int = 64
    updates: int = 250
    batch_size: int = 32
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("window", "block", "history_blocks", "look_back", "hidden_size", "updates", "batch_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} should be at least 1")
        if not (self.half_life > 0 and self.learning_rate > 0):
            raise ConfigError("half_life and learning_rate should be above 0")


@dataclass(frozen=True)
class Forecast:
    """Expected shares over the coming steps.

    Attributes:
        mean_LE: mean over the horizon; each layer sums to 1.
        low_LE, high_LE: 80 % interval of the horizon's mean from this method's own past errors at this
            horizon; None when fewer than `MIN_ERRORS` of them fit into the history.
        path_HLE: the steps one by one; H is 1 for a constant path.
        method: name of the method. `horizon`: steps ahead.
    """

    mean_LE: Floats
    low_LE: Floats | None
    high_LE: Floats | None
    path_HLE: Floats
    method: str
    horizon: int


MIN_ERRORS = 5
_ERRORS = 20


def forecast(
    trace: LoadTrace, horizon: int, method: str = "sw_flat", *, settings: ForecastSettings | None = None,
    interval: float | None = 0.8,
) -> Forecast:  # fmt: skip
    """The expected shares over the `horizon` steps after the trace's end.

    Args:
        trace: the past. Recorded steps count as one apart.
        horizon: steps ahead, at least 1.
        method: a name of `METHODS`.
        settings: windows and sizes; defaults when None.
        interval: coverage of the interval, between 0 and 1; None skips it.

    Raises:
        ConfigError: an unknown method, a horizon below 1 or a trace that is too short for the method.
        BackendUnavailable: the method's package is not installed.

    Source: Cong et al. 2024, arXiv 2404.16914 §IV; the interval (split conformal) is ours.
    """
    settings = settings or ForecastSettings()
    if interval is not None and not 0 < interval < 1:
        raise ConfigError(f"interval = {interval} should lie between 0 and 1")
    past = trace.shares_TLE
    path = predict(past, horizon, method, settings)
    mean = path.mean(0)
    low = high = None
    origins = [] if interval is None else past_origins(len(past), horizon, settings.window)
    if method in ("arima", "lstm"):
        origins = origins[-MIN_ERRORS:]  # each one is a fit
    if interval is not None and len(origins) >= MIN_ERRORS:
        errors = [
            np.abs(past[t : t + horizon].mean(0) - predict(past[:t], horizon, method, settings).mean(0))
            for t in origins
        ]
        # The (n + 1)-corrected rank of split conformal prediction, at most the largest error seen.
        rank = min(int(np.ceil((len(errors) + 1) * interval)), len(errors))
        width = np.sort(np.stack(errors), axis=0)[rank - 1]
        low, high = np.clip(mean - width, 0, 1), np.clip(mean + width, 0, 1)
    return Forecast(mean, low, high, path, method, horizon)


def past_origins(length: int, horizon: int, window: int) -> list[int]:
    """At most 20 origins, evenly spaced over the later half, whose truth ends inside the history."""
    first, last = max(window, length // 2), length - horizon
    if last < first:
        return []
    return sorted({int(t) for t in np.linspace(first, last, _ERRORS)})


def predict(past_TLE: Floats, horizon: int, method: str, settings: ForecastSettings) -> Floats:
    """The path [H or 1, L, E] that follows these shares, clipped at 0, each layer summing to 1."""
    if method not in METHODS:
        raise ConfigError(unknown_name("forecast method", method, METHODS))
    if horizon < 1:
        raise ConfigError(f"horizon = {horizon} should be at least 1")
    path = np.clip(METHODS[method](past_TLE, horizon, settings), 0.0, None)
    total = path.sum(-1, keepdims=True)
    result: Floats = np.where(total > 0, path / np.where(total > 0, total, 1), 1.0 / path.shape[-1])
    return result


def last(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    """The last step's shares."""
    return past_TLE[-1:]


def sw_flat(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    """The mean of the last window."""
    mean: Floats = past_TLE[-settings.window :].mean(0, keepdims=True)
    return mean


def sw_recursive(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    """The paper's sliding window: each predicted step enters the window and pushes the oldest out (§IV-C)."""
    window = list(past_TLE[-settings.window :])
    w, total = len(window), np.sum(past_TLE[-settings.window :], axis=0)
    for t in range(horizon):
        mean = total / w
        total = total + mean - window[t]
        window.append(mean)
    return np.stack(window[w:])


def wma(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    """The linearly weighted mean, newest heaviest: the limit that `sw_recursive` converges to.

    Each of its repetitions keeps the sum of j times the j-th oldest entry; a constant window with that sum is
    this mean. Source: ours.
    """
    window = past_TLE[-settings.window :]
    weights = np.arange(1, len(window) + 1, dtype=np.float64)
    mean: Floats = np.tensordot(weights / weights.sum(), window, axes=1)[None]
    return mean


def ema(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    """The exponential mean over the whole history, with the given half-life, weights normalised."""
    weights = 0.5 ** (np.arange(len(past_TLE) - 1, -1, -1) / settings.half_life)
    mean: Floats = np.tensordot(weights / weights.sum(), past_TLE, axes=1)[None]
    return mean


def _arima(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    from sateen.placement.arima import arima

    return arima(past_TLE, horizon, settings)[0]


def _lstm(past_TLE: Floats, horizon: int, settings: ForecastSettings) -> Floats:
    from sateen.placement.lstm import lstm

    return lstm(past_TLE, horizon, settings)


METHODS: dict[str, Callable[[Floats, int, ForecastSettings], Floats]] = {
    "last": last,
    "sw_flat": sw_flat,
    "sw_recursive": sw_recursive,
    "wma": wma,
    "ema": ema,
    "arima": _arima,
    "lstm": _lstm,
}
# Those that need no fit: cheap enough to compare at every origin.
CHEAP = ("last", "sw_flat", "sw_recursive", "wma", "ema")
