"""The forecast and placement part of a report's expert section, from the run's own load trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sateen.errors import SateenError
from sateen.placement import LoadTrace, balancedness_ratio_of_sums, contiguous, evaluate, load_trace, plan
from sateen.placement.forecast import CHEAP, ForecastSettings, past_origins
from sateen.report.page import missing, share, table

RANKS = 4


def expert_forecast(folder: Path) -> str:
    """Forecast errors per method and a placement on four ranks, or a line that says what is missing."""
    try:
        trace = load_trace(folder / "traces" / "expert_load.npz")
        horizon = min(100, len(trace.steps_T) // 4)
        settings = ForecastSettings(window=max(1, min(100, len(trace.steps_T) // 4)))
        origins = past_origins(len(trace.steps_T), horizon, settings.window) if horizon else []
        if not origins:
            return missing("a forecast of expert loads; the trace is too short")
        return _errors(trace, horizon, settings, origins) + _placement(trace, horizon, settings)
    except SateenError as error:
        return missing(f"a forecast of expert loads ({error})")


def _errors(trace: LoadTrace, horizon: int, settings: ForecastSettings, origins: list[int]) -> str:
    rows = []
    for method in CHEAP:
        found = evaluate(trace, horizon, method, origins, settings=settings)
        means = [
            float(np.mean([getattr(e, name) for e in found]))
            for name in ("wape_agg", "mape_agg", "wape_step", "oracle_step", "floor_step")
        ]
        rows.append((method, *map(share, means)))
    caption = (
        f"Forecasts of expert loads {horizon} steps ahead, window {settings.window}, {len(origins)} origins,"
        " mean over layers; the last two columns are what a known mean and pure sampling would give per step"
    )
    head = ("method", "WAPE of the mean", "MAPE of the mean", "WAPE per step", "known mean", "sampling")
    return table(caption, head, rows)


def _placement(trace: LoadTrace, horizon: int, settings: ForecastSettings) -> str:
    shares, (_, L, E) = trace.shares_TLE, trace.counts_TLE.shape
    if E % RANKS:
        return missing(f"a placement; {E} experts do not fill {RANKS} ranks evenly")
    past, truth = shares[-horizon - settings.window : -horizon].mean(0), shares[-horizon:]
    rows = []
    for slots in (E, E + RANKS):
        plans = (contiguous(L, E, RANKS, slots), plan(past, RANKS, slots), plan(truth.mean(0), RANKS, slots))
        marks = (share(balancedness_ratio_of_sums(p.rank_loads(truth))) for p in plans)
        rows.append((str(slots), *marks))
    caption = (
        f"Balancedness (ratio of sums) on {RANKS} ranks over the last {horizon} steps, simulated on the loads"
    )
    return table(caption, ("slots", "in order", "placed by sw_flat", "placed by the truth"), rows)
