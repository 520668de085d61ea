"""Whether a layer's loads are transient, stable or shifting, from two numbers with known noise floors.

Neither looks at forecast errors. The paper names variance and range over a window and reads the switch off a
plot; the dispersion index, the drift and all thresholds are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sateen.errors import ConfigError
from sateen.placement.trace import Floats, Ints, LoadTrace


@dataclass(frozen=True)
class StateSettings:
    """Thresholds of the detector; source: ours, set on three small training runs.

    Attributes:
        window: steps of one window.
        stable_floors, stable_drift: stable when drift is at most max(floors * noise, drift).
        transient_floors, transient_drift: transient again when it exceeds max(floors * noise, drift) once.
        hold_windows: windows that the stable condition must hold.
        check_every: steps between checks of the state.
        alarm_drift, alarm_factor: alarm above max(drift, factor * median of the last `alarm_steps`).
        alarm_after: first step at which the alarm is armed.
    """

    window: int = 100
    stable_floors: float = 2.0
    stable_drift: float = 0.03
    transient_floors: float = 4.0
    transient_drift: float = 0.06
    hold_windows: int = 3
    check_every: int = 10
    alarm_drift: float = 0.06
    alarm_factor: float = 2.5
    alarm_steps: int = 300
    alarm_after: int = 600


@dataclass(frozen=True)
class LayerState:
    """What the detector says of one layer at the trace's end.

    Attributes:
        layer: the model's index. `state`: transient, stable or shifting (an alarm in the last window).
        drift: share of the load that moved between the last two windows, 0 to 1. `floor`: drift of noise.
        dispersion: variance over multinomial variance in the last window; 1 is pure sampling noise.
        stable_since: step at which the layer last became stable, or None.
        alarms: first step of each shift alarm.
    """

    layer: int
    state: str
    drift: float
    floor: float
    dispersion: float
    stable_since: int | None
    alarms: tuple[int, ...]


def variance_and_range(shares_TLE: Floats, window: int) -> tuple[Floats, Floats]:
    """Population variance and range of each expert's last `window` shares, both [T - window + 1, L, E].

    Source: Cong et al. 2024, arXiv 2404.16914 §III.
    """
    view = np.lib.stride_tricks.sliding_window_view(shares_TLE, window, axis=0)
    return view.var(-1), view.max(-1) - view.min(-1)


def dispersion(shares_TLE: Floats, assignments_TL: Floats, window: int) -> Floats:
    """Variance over multinomial variance [T - window + 1, L] of each window."""
    mean, square = _means(shares_TLE, window), _means(shares_TLE**2, window)
    noise = (mean * (1 - mean)).sum(-1) / _means(assignments_TL, window)
    result: Floats = np.maximum((square - mean**2).sum(-1), 0) / np.maximum(noise, 1e-30)
    return result


def drift(shares_TLE: Floats, window: int) -> Floats:
    """Total variation [T - 2 window + 1, L] between the means of each window and the one before."""
    mean = _means(shares_TLE, window)
    result: Floats = 0.5 * np.abs(mean[window:] - mean[:-window]).sum(-1)
    return result


def drift_floor(mean_LE: Floats, dispersion_L: Floats, assignments_L: Floats, window: int) -> Floats:
    """The expected drift of loads that do not change, for a given dispersion."""
    spread = 2 * dispersion_L[..., None] * mean_LE * (1 - mean_LE) / (assignments_L[..., None] * window)
    floor: Floats = 0.5 * np.sqrt(2 / np.pi) * np.sqrt(spread).sum(-1)
    return floor


def states(trace: LoadTrace, settings: StateSettings | None = None) -> list[LayerState]:
    """Each layer's state at the end of the trace.

    Raises:
        ConfigError: the trace is shorter than two windows.
    """
    s = settings or StateSettings()
    shares, N, w = trace.shares_TLE, trace.assignments_TL, s.window
    if len(shares) < 2 * w:
        raise ConfigError(f"the trace has {len(shares)} steps; the state needs two windows of {w}")
    phi = dispersion(shares, N, w)
    settled = np.minimum.accumulate(phi, axis=0)
    moved = drift(shares, w)
    floor = drift_floor(_means(shares, w)[w:], settled[w:], _means(N, w)[w:], w)
    steps = trace.steps_T[2 * w - 1 :]
    found = []
    for l, layer in enumerate(trace.layers):
        since = _stable_since(moved[:, l], floor[:, l], steps, s)
        alarms = _alarms(moved[:, l], steps, s)
        state = "transient" if since is None else "stable"
        if alarms and alarms[-1] > trace.steps_T[-w]:
            state = "shifting"
        found.append(
            LayerState(
                layer, state, float(moved[-1, l]), float(floor[-1, l]), float(phi[-1, l]), since,
                tuple(alarms),
            )
        )  # fmt: skip
    return found


def _stable_since(moved: Floats, floor: Floats, steps: Ints, s: StateSettings) -> int | None:
    held, since = 0, None
    for i in range(0, len(moved), s.check_every):
        if moved[i] <= max(s.stable_floors * floor[i], s.stable_drift):
            held += s.check_every
            if since is None and held >= s.hold_windows * s.window:
                since = int(steps[i])
        else:
            held = 0
            if moved[i] > max(s.transient_floors * floor[i], s.transient_drift):
                since = None
    return since


def _alarms(moved: Floats, steps: Ints, s: StateSettings) -> list[int]:
    alarms: list[int] = []
    for i in range(1, len(moved)):
        if steps[i] < s.alarm_after:
            continue
        usual = np.median(moved[max(0, i - s.alarm_steps) : i])
        rings = moved[i] > max(s.alarm_drift, s.alarm_factor * usual)
        # One alarm per shift: the windows that straddle it stay loud for two windows.
        if rings and (not alarms or steps[i] - alarms[-1] > 2 * s.window):
            alarms.append(int(steps[i]))
    return alarms


def _means(x: Floats, window: int) -> Floats:
    sums = np.concatenate([np.zeros((1, *x.shape[1:])), np.cumsum(x, axis=0)])
    result: Floats = (sums[window:] - sums[:-window]) / window
    return result
