"""Forecast and placement numbers of recorded expert loads: `sateen bench expert-loads TRACE`."""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
from _results import publish

from sateen.placement import balancedness_ratio_of_sums, evaluate, load_trace, plan, states
from sateen.placement.forecast import CHEAP


def main() -> None:
    """Prints one JSON object: states, errors of the cheap methods, what a plan earns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, help="an .npz file with one or more runs")
    parser.add_argument("--out", type=Path, help="also write the result here")
    flags = parser.parse_args()
    with np.load(flags.trace) as saved:
        runs = sorted(key.removesuffix("__counts") for key in saved.files if key.endswith("__counts"))
    result = {
        "trace": flags.trace.name, "machine": platform.machine(), "numpy": np.__version__,
        "runs": {run: measure(flags.trace, run) for run in runs}, "planning": planning(),
    }  # fmt: skip
    publish(result, flags.out, indent=1)


def measure(file: Path, run: str) -> dict[str, object]:
    """Numbers of one run; origins every 50 steps, from 1,200 on, or from 600 in a run under 2,500 steps."""
    trace = load_trace(file, run)
    T, shares = len(trace.steps_T), trace.shares_TLE
    first = 1200 if T >= 2500 else 600
    errors: dict[str, dict[str, float]] = {}
    for horizon in (h for h in (100, 300, 500, 1000) if first + h <= T):
        at = range(first, T - horizon + 1, 50)
        errors[str(horizon)] = {
            m: float(np.mean([e.wape_agg for e in evaluate(trace, horizon, m, at)])) for m in CHEAP
        }
    loads = []
    for t in range(first, T - 300 + 1, 50):
        loads.append(plan(shares[t - 100 : t].mean(0), 8, 32).rank_loads(shares[t : t + 300]))
    return {
        "first_origin": first,
        "states": [
            {"layer": s.layer, "stable_since": s.stable_since, "alarms": s.alarms} for s in states(trace)
        ],
        "wape_agg": errors,
        "plan_8_ranks_32_slots_300_steps_ratio_of_sums": balancedness_ratio_of_sums(np.concatenate(loads)),
    }


def planning() -> dict[str, float]:
    """CPU seconds of a plan for 58 layers of 256 experts in 288 slots on 32 ranks."""
    load = np.random.default_rng(0).lognormal(0, 0.8, (58, 256))
    begin = time.process_time()
    made = plan(load, 32, 288)
    spent = time.process_time() - begin
    return {"cpu_s": spent, "ratio_of_sums": balancedness_ratio_of_sums(made.rank_loads(load))}


if __name__ == "__main__":
    main()
