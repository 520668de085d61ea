"""Expert loads: recorded traces, forecasts of them, and where to put the experts. Needs numpy, no torch."""

from __future__ import annotations

from sateen.placement.balance import (
    PlacementPlan,
    balancedness_mean_of_ratios,
    balancedness_ratio_of_sums,
    contiguous,
    plan,
)
from sateen.placement.forecast import METHODS, Forecast, ForecastSettings, forecast
from sateen.placement.metrics import Errors, evaluate
from sateen.placement.simulate import Advice, CostModel, advise, simulate
from sateen.placement.state import LayerState, StateSettings, states
from sateen.placement.trace import LoadTrace, load_trace, save_trace

__all__ = [
    "METHODS",
    "Advice",
    "CostModel",
    "Errors",
    "Forecast",
    "ForecastSettings",
    "LayerState",
    "LoadTrace",
    "PlacementPlan",
    "StateSettings",
    "advise",
    "balancedness_mean_of_ratios",
    "balancedness_ratio_of_sums",
    "contiguous",
    "evaluate",
    "forecast",
    "load_trace",
    "plan",
    "save_trace",
    "simulate",
    "states",
]
