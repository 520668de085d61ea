"""The verb `experts`: show a recorded trace, forecast it, place experts by it, replay policies on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from sateen.errors import ConfigError
from sateen.placement.balance import (
    balancedness_mean_of_ratios,
    balancedness_ratio_of_sums,
    bound,
    contiguous,
    plan,
)
from sateen.placement.forecast import CHEAP, Forecast, ForecastSettings, forecast, past_origins
from sateen.placement.metrics import evaluate
from sateen.placement.simulate import POLICIES, CostModel, advise, simulate
from sateen.placement.state import StateSettings, states
from sateen.placement.trace import LoadTrace, load_trace

Rows = dict[str, Any]


def main(action: str, trace: str, run: str | None = None, **flags: Any) -> None:
    """Prints what one action of `experts` finds in a trace."""
    as_json = flags.pop("json", False)
    loaded = load_trace(trace, run)
    action_of: dict[str, Callable[..., Rows]] = {
        "trace": show,
        "forecast": predict,
        "place": place,
        "simulate": replay,
    }
    result = {"run": loaded.run, **action_of[action](loaded, **flags)}
    print(_json(result) if as_json else _text(result))


def show(trace: LoadTrace) -> Rows:
    """Size, tokens and state of each layer."""
    T, L, E = trace.counts_TLE.shape
    recent = trace.shares_TLE[-100:].mean(0)
    rows = _states(trace)
    for l in range(L):
        rows[l] |= {
            "assignments_per_step": float(trace.assignments_TL[:, l].mean()),
            "hottest_expert": int(recent[l].argmax()),
            "hottest_over_mean": float(recent[l].max() * E),
            "dead_experts": int((recent[l] < 0.1 / E).sum()),
        }
    return {"steps": T, "experts": E, "layers": rows}


def predict(trace: LoadTrace, horizon: int, method: str = "sw_flat", window: int = 100) -> Rows:
    """Shares, interval, state and the errors the method made so far, per layer."""
    settings = ForecastSettings(window=window)
    ahead = forecast(trace, horizon, method, settings=settings)
    rows = _states(trace)
    origins = past_origins(len(trace.steps_T), horizon, window)
    if method not in CHEAP:
        origins = origins[-5:]
    errors = evaluate(trace, horizon, method, origins, settings=settings) if origins else None
    rival = evaluate(trace, horizon, "last", origins, settings=settings) if origins else None
    for l, row in enumerate(rows):
        row["shares"] = ahead.mean_LE[l].tolist()
        row["low"] = None if ahead.low_LE is None else ahead.low_LE[l].tolist()
        row["high"] = None if ahead.high_LE is None else ahead.high_LE[l].tolist()
        row["metrics"] = None if errors is None else asdict(errors[l])
        row["last_value_wape_agg"] = None if rival is None else rival[l].wape_agg
    return {
        "method": method, "horizon": horizon, "window": window, "interval": 0.8, "origins": len(origins),
        "layers": rows,
    }  # fmt: skip


def place(
    trace: LoadTrace, ranks: int, slots: int, method: str = "sw_flat", horizon: int = 500,
    balance: str = "ours",
    groups: int = 1, nodes: int = 1, window: int = 100, tokens_per_s: float = 1e6, expert_bytes: float = 1e8,
    bytes_per_s: float = 5e10,
) -> Rows:  # fmt: skip
    """A plan in EPLB's maps, what it gives, and whether going there from contiguous experts pays."""
    E, L = trace.counts_TLE.shape[2], trace.counts_TLE.shape[1]
    now = contiguous(L, E, ranks, slots)
    ahead: Forecast = forecast(trace, horizon, method, settings=ForecastSettings(window=window))
    new = plan(ahead.mean_LE, ranks, slots, method=balance, groups=groups, nodes=nodes, previous=now)
    cost = CostModel(tokens_per_s, expert_bytes, bytes_per_s)
    told = advise(now, new, ahead, trace.assignments_TL[-window:].mean(0), cost)
    loads = {"contiguous": now.rank_loads(ahead.mean_LE), "plan": new.rank_loads(ahead.mean_LE)}
    assert new.moves_L is not None
    return {
        "method": method, "horizon": horizon, "balance": balance, "ranks": ranks, "slots": slots,
        "phy2log": new.phy2log_LP.tolist(), "log2phy": new.log2phy_LEC.tolist(),
        "logcnt": new.logcnt_LE.tolist(),
        "balancedness_ratio_of_sums": {k: balancedness_ratio_of_sums(v) for k, v in loads.items()},
        "balancedness_mean_of_ratios": {k: balancedness_mean_of_ratios(v) for k, v in loads.items()},
        "bound_without_copies": bound(ahead.mean_LE, ranks),
        "moves": int(new.moves_L.sum()), "moves_per_layer": new.moves_L.tolist(),
        "advice": told.text, "act": told.act, "break_even_steps": told.break_even_steps,
        "saved_s_per_step": told.saved_s,
        "saved_low_s_per_step": told.saved_low_s if np.isfinite(told.saved_low_s) else None,
        "move_s": told.move_s,
    }  # fmt: skip


def replay(
    trace: LoadTrace, ranks: int, slots: int, method: str = "sw_flat", horizon: int = 300, start: int = 200,
    threshold: float = 0.9, window: int = 100, tokens_per_s: float = 1e6, expert_bytes: float = 1e8,
    bytes_per_s: float = 5e10,
) -> Rows:  # fmt: skip
    """What each policy would have earned on the trace."""
    cost, settings = CostModel(tokens_per_s, expert_bytes, bytes_per_s), ForecastSettings(window=window)
    rows = [
        {"policy": policy}
        | simulate(
            trace, ranks, slots, policy=policy, method=method, horizon=horizon, start=start,
            threshold=threshold, cost=cost, settings=settings,
        )
        for policy in POLICIES
    ]  # fmt: skip
    return {"method": method, "horizon": horizon, "ranks": ranks, "slots": slots, "policies": rows}


def _states(trace: LoadTrace) -> list[Rows]:
    """State rows; below two windows they say so instead of guessing."""
    try:
        found = states(trace, StateSettings())
    except ConfigError:
        return [{"layer": layer, "state": "unknown: under 200 steps"} for layer in trace.layers]
    return [asdict(state) for state in found]


def _json(result: Rows) -> str:
    # A skill over a last value that is the oracle has no number; JSON has no NaN either.
    def clean(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [clean(v) for v in x]
        return None if isinstance(x, float) and not np.isfinite(x) else x

    return json.dumps(clean(result), indent=1)


def _text(result: Rows) -> str:
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for row in value:
                lines.append("  ".join(f"{k} {_short(v)}" for k, v in row.items()))
        else:
            lines.append(f"{key}: {_short(value)}")
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + " ".join(map(_short, value)) + "]"
    return "-" if value is None else str(value)
