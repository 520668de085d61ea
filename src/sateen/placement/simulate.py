"""Whether a new placement pays: seconds saved per step against seconds of moving, and replays of a trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sateen.errors import ConfigError, unknown_name
from sateen.placement.balance import (
    PlacementPlan,
    balancedness_mean_of_ratios,
    balancedness_ratio_of_sums,
    contiguous,
    plan,
)
from sateen.placement.forecast import Forecast, ForecastSettings, predict
from sateen.placement.trace import Floats, LoadTrace

POLICIES = ("never", "fixed", "threshold", "forecast")


@dataclass(frozen=True)
class CostModel:
    """Prices of a step and of a move; the defaults are relative, not a machine's.

    A layer takes the time of its fullest rank: `passes` times its assignments over `tokens_per_s`, with 3 for
    training (the backward pass is two forwards) and 1 for serving. The exchange of tokens is left out.

    Attributes:
        tokens_per_s: assignments one rank's experts process per second.
        expert_bytes: what moves with an expert; training adds its optimizer's state.
        bytes_per_s: of one rank's link.
        passes: see above.

    Source: Pro-Prophet's layer cost, without its communication term.
    """

    tokens_per_s: float = 1e6
    expert_bytes: float = 1e8
    bytes_per_s: float = 5e10
    passes: int = 3

    def __post_init__(self) -> None:
        for name in ("tokens_per_s", "expert_bytes", "bytes_per_s", "passes"):
            if not 0 < getattr(self, name) < np.inf:
                raise ConfigError(f"{name} = {getattr(self, name)} should be above 0")

    def step_s(self, loads: Floats) -> float:
        """Seconds of a step with rank loads [L, G] in assignments; a mean over a leading axis of steps."""
        peak = loads.max(-1).sum(-1)
        return float(self.passes * np.mean(peak) / self.tokens_per_s)

    def move_s(self, moves: int) -> float:
        """Seconds of moving that many experts one after the other."""
        return moves * self.expert_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Advice:
    """Whether to move now.

    Attributes:
        act: the move pays within the horizon, at the lower end of the forecast's interval.
        saved_s: seconds saved per step under the forecast; `saved_low_s` at that lower end.
        move_s: seconds of moving. `break_even_steps`: steps that repay it, None when none do.
        text: the same in one sentence.
    """

    act: bool
    saved_s: float
    saved_low_s: float
    move_s: float
    break_even_steps: float | None
    text: str


def advise(
    current: PlacementPlan, new: PlacementPlan, expected: Forecast, assignments_L: Floats, cost: CostModel
) -> Advice:
    """Advice on going from one plan to another under a forecast, for `assignments_L` per step.

    The lower end takes, per layer, the forecast's interval width as load that lands on the new plan's fullest
    rank and leaves the old one's. Without an interval there is no lower end, and the advice is to stay.
    """
    moved = new.moves_L
    if moved is None:
        raise ConfigError("the new plan does not know its moves; make it with previous=")
    load = expected.mean_LE * assignments_L[:, None]
    saved = cost.step_s(current.rank_loads(load)) - cost.step_s(new.rank_loads(load))
    move = cost.move_s(int(moved.sum()))
    if expected.low_LE is None or expected.high_LE is None:
        low, note = -np.inf, "the history is too short for an interval"
    else:
        width = (expected.high_LE - expected.low_LE) / 2 * assignments_L[:, None]
        old_G, new_G = current.shares_LEG(), new.shares_LEG()
        g_old, g_new = current.rank_loads(load).argmax(-1), new.rank_loads(load).argmax(-1)
        rows = np.arange(len(load))
        # Errors of experts are taken as independent, so they add up as squares on a rank.
        slack = np.sqrt(((width[:, :, None] * (new_G - old_G)) ** 2).sum(1))
        risk = np.maximum(slack[rows, g_old], slack[rows, g_new]) * moved.astype(bool)
        low = saved - cost.passes * float(np.sqrt((risk**2).sum())) / cost.tokens_per_s
        note = "the forecast is too uncertain"
    even = move / saved if saved > 0 else None
    act = bool(moved.sum()) and low > 0 and move / low < expected.horizon
    if not moved.sum():
        text = "do nothing: the placement in force is already the best one found"
    elif even is None:
        text = "do nothing: the new placement saves no time"
    elif even >= expected.horizon:
        text = f"do nothing: the move pays after {even:.0f} steps, the forecast reaches {expected.horizon}"
    elif not act:
        text = f"do nothing: the move would pay after {even:.0f} steps, but {note}"
    else:
        text = f"move {int(moved.sum())} experts: it pays after {even:.0f} of {expected.horizon} steps"
    return Advice(act, saved, float(low), move, even, text)


def simulate(
    trace: LoadTrace, ranks: int, slots: int, *, policy: str = "forecast", method: str = "sw_flat",
    horizon: int = 300, start: int = 200, threshold: float = 0.9, cost: CostModel | None = None,
    settings: ForecastSettings | None = None,
) -> dict[str, float]:  # fmt: skip
    """What a policy would have earned on a recorded trace.

    From `start` on, every `horizon` steps, it may place anew on a forecast: `never`; `fixed` always;
    `threshold` when the last period's balancedness fell below `threshold`; `forecast` when the move pays
    within the horizon. Loads are the recorded ones, so nothing here is a model of traffic.

    Returns:
        `balancedness_ratio_of_sums`, `balancedness_mean_of_ratios`, `moves`, `plans`, `step_s` and `move_s`
        summed, and `net_s`, seconds saved over the contiguous placement, moves paid.

    Raises:
        ConfigError: an unknown policy, or a trace that ends before `start`.
    """
    if policy not in POLICIES:
        raise ConfigError(unknown_name("policy", policy, POLICIES))
    shares, counts, cost = trace.shares_TLE, trace.counts_TLE.astype(np.float64), cost or CostModel()
    settings = settings or ForecastSettings()
    T, L, E = shares.shape
    if horizon < 1 or start < 1 or start >= T:
        raise ConfigError(f"start {start} and horizon {horizon} do not fit into {T} steps")
    base = current = contiguous(L, E, ranks, slots)
    loads: list[Floats] = []
    moves = plans = 0
    for t in range(start, T, horizon):
        before = current.rank_loads(counts[max(0, t - horizon) : t])
        wanted = policy in ("fixed", "forecast") or (
            policy == "threshold" and balancedness_ratio_of_sums(before) < threshold
        )
        if wanted:
            mean = predict(shares[:t], horizon, method, settings).mean(0)
            new = plan(mean, ranks, slots, previous=current)
            moved = 0 if new.moves_L is None else int(new.moves_L.sum())
            load = mean * trace.assignments_TL[t - 1][:, None]
            saved = cost.step_s(current.rank_loads(load)) - cost.step_s(new.rank_loads(load))
            if moved and (policy != "forecast" or saved * min(horizon, T - t) > cost.move_s(moved)):
                current, moves, plans = new, moves + moved, plans + 1
        loads.append(current.rank_loads(counts[t : t + horizon]))
    all_ = np.concatenate(loads)
    spent = cost.step_s(all_) * len(all_)
    paid = cost.move_s(moves)
    return {
        "balancedness_ratio_of_sums": balancedness_ratio_of_sums(all_),
        "balancedness_mean_of_ratios": balancedness_mean_of_ratios(all_),
        "moves": moves,
        "plans": plans,
        "step_s": spent,
        "move_s": paid,
        "net_s": cost.step_s(base.rank_loads(counts[start:])) * len(all_) - spent - paid,
    }
