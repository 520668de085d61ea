"""Errors of a forecast, five of them and always all, beside what noise alone would give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sateen.errors import ConfigError
from sateen.placement.balance import balancedness_ratio_of_sums, plan
from sateen.placement.forecast import ForecastSettings, predict
from sateen.placement.trace import Floats, LoadTrace


@dataclass(frozen=True)
class Errors:
    """Errors of one layer as fractions; averages over origins.

    Attributes:
        wape_step: mean over steps of the summed share errors; twice the total variation.
        wape_agg: summed errors of the horizon's mean shares; what a placement needs.
        mape_agg: mean relative error of them, shares floored at a tenth of the mean one; closest to the
            paper's words, which give no formula.
        hot_err: relative error on the most loaded expert.
        regret: balancedness (ratio of sums) lost by placing on the forecast and not on the truth.
        oracle_step: `wape_step` of the horizon's own mean; no forecast that is constant does better.
        floor_step: `wape_step` that multinomial sampling alone would give.
        skill: 1 - (wape_step - oracle) / (last value's - oracle); 0 is the last value, 1 the oracle.
    """

    wape_step: float
    wape_agg: float
    mape_agg: float
    hot_err: float
    regret: float
    oracle_step: float
    floor_step: float
    skill: float


def layer_errors(truth_HLE: Floats, path_HLE: Floats) -> dict[str, Floats]:
    """`wape_step`, `wape_agg`, `mape_agg`, `hot_err`, `oracle_step` [L] and signed `bias` [L, E]."""
    M, guess, E = truth_HLE.mean(0), path_HLE.mean(0), truth_HLE.shape[-1]
    gap = np.abs(M - guess)
    hot = M.argmax(-1)[:, None]
    return {
        "wape_step": np.abs(truth_HLE - path_HLE).sum(-1).mean(0),
        "wape_agg": gap.sum(-1),
        "mape_agg": (gap / np.maximum(M, 0.1 / E)).mean(-1),
        "hot_err": (np.take_along_axis(gap, hot, -1) / np.take_along_axis(M, hot, -1))[:, 0],
        "oracle_step": np.abs(truth_HLE - M).sum(-1).mean(0),
        "bias": guess - M,
    }


def step_floor(share_LE: Floats, assignments_L: Floats) -> Floats:
    """The expected `wape_step` of someone who knows the probabilities, for multinomial counts."""
    spread = share_LE * (1 - share_LE) / assignments_L[..., None]
    floor: Floats = np.sqrt(2 / np.pi) * np.sqrt(spread).sum(-1)
    return floor


def evaluate(
    trace: LoadTrace, horizon: int, method: str, origins: Iterable[int], *, ranks: int | None = None,
    slots: int | None = None, settings: ForecastSettings | None = None,
) -> list[Errors]:  # fmt: skip
    """Errors per layer, averaged over origins; an origin is the number of recorded steps it may see.

    `regret` places on `ranks` (the largest of 8, 4, 2, 1 that divides the experts when None) with `slots`
    (half as many again as experts when None, rounded down to a multiple of the ranks).

    Raises:
        ConfigError: no origin, or one whose horizon leaves the trace.
    """
    settings, shares = settings or ForecastSettings(), trace.shares_TLE
    E, at = shares.shape[-1], list(origins)
    if not at or min(at) < 1 or max(at) + horizon > len(shares):
        raise ConfigError(
            f"origins {at[:1]}..{at[-1:]} with horizon {horizon} do not fit into {len(shares)} steps"
        )
    ranks = ranks or next(n for n in (8, 4, 2, 1) if E % n == 0)
    slots = slots or max(E, (E + E // 2) // ranks * ranks)
    rows: list[dict[str, Floats]] = []
    for t in at:
        truth, path = shares[t : t + horizon], predict(shares[:t], horizon, method, settings)
        row = layer_errors(truth, path)
        row["last_step"] = np.abs(truth - shares[t - 1]).sum(-1).mean(0)
        row["floor_step"] = step_floor(truth.mean(0), trace.assignments_TL[t : t + horizon].mean(0))
        ours, best = plan(path.mean(0), ranks, slots), plan(truth.mean(0), ranks, slots)
        loads = (best.rank_loads(truth), ours.rank_loads(truth))
        row["regret"] = np.array(
            [
                balancedness_ratio_of_sums(loads[0][:, l]) - balancedness_ratio_of_sums(loads[1][:, l])
                for l in range(truth.shape[1])
            ]
        )
        rows.append(row)
    mean = {key: np.mean([row[key] for row in rows], axis=0) for key in rows[0]}
    gap = mean["last_step"] - mean["oracle_step"]
    mean["skill"] = 1 - (mean["wape_step"] - mean["oracle_step"]) / np.where(gap > 0, gap, np.nan)
    names = Errors.__dataclass_fields__
    return [Errors(**{name: float(mean[name][l]) for name in names}) for l in range(shares.shape[1])]
