"""Forecasters, errors, floors and states against hand-worked numbers, plain loops and simulated noise."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from sateen.errors import BackendUnavailable, ConfigError
from sateen.placement import ForecastSettings, LoadTrace, evaluate, forecast, states
from sateen.placement.arima import arima
from sateen.placement.forecast import METHODS, predict
from sateen.placement.metrics import layer_errors, step_floor
from sateen.placement.state import dispersion, drift, drift_floor, variance_and_range


def made(counts, **more) -> LoadTrace:
    counts = np.asarray(counts)
    return LoadTrace(counts, np.arange(1, len(counts) + 1), tuple(range(counts.shape[1])), **more)


def noise(steps=600, tokens=4096, seed=0, layers=2, experts=8) -> LoadTrace:
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(experts, 3.0), layers)
    return made(np.stack([rng.multinomial(tokens, p) for _ in range(steps)]))


def test_hand_worked():
    past = np.array([[[0.5, 0.5]], [[0.2, 0.8]], [[0.8, 0.2]]])
    s = ForecastSettings(window=2, half_life=1.0)
    first = {m: predict(past, 2, m, s)[:, 0, 0] for m in ("last", "sw_flat", "sw_recursive", "wma", "ema")}
    assert first["last"] == pytest.approx([0.8])
    assert first["sw_flat"] == pytest.approx([0.5])
    assert first["sw_recursive"] == pytest.approx([0.5, 0.65])  # then the mean of 0.8 and 0.5
    assert first["wma"] == pytest.approx([(0.2 + 2 * 0.8) / 3])
    assert first["ema"] == pytest.approx([(0.25 * 0.5 + 0.5 * 0.2 + 0.8) / 1.75])


def test_recursive_tail_is_the_weighted_mean():
    past = np.random.default_rng(0).dirichlet(np.ones(5), (60, 2))
    s = ForecastSettings(window=20)
    np.testing.assert_allclose(
        predict(past, 200, "sw_recursive", s)[-1], predict(past, 1, "wma", s)[0], rtol=1e-6
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m != "arima"])
def test_forecasts_are_shares(method):
    s = ForecastSettings(window=20, look_back=10, updates=5, hidden_size=4)
    ahead = forecast(noise(120), 15, method, settings=s)
    np.testing.assert_allclose(ahead.path_HLE.sum(-1), 1, rtol=1e-6)
    assert (ahead.path_HLE >= 0).all()
    assert ahead.low_LE is not None
    assert (ahead.low_LE <= ahead.mean_LE).all()
    assert (ahead.mean_LE <= ahead.high_LE).all()


def test_the_interval_covers():
    trace, inside = noise(1500, layers=1), []
    for t in range(400, 1400, 50):
        past = made(trace.counts_TLE[:t])
        ahead = forecast(past, 50, "sw_flat", settings=ForecastSettings(window=50))
        truth = trace.shares_TLE[t : t + 50].mean(0)
        inside.append((ahead.low_LE <= truth) & (truth <= ahead.high_LE))
    assert 0.7 <= np.mean(inside) <= 0.95


def test_a_short_history_has_no_interval():
    assert forecast(noise(30), 29, "sw_flat").low_LE is None


@pytest.mark.parametrize("residual", [True, False])
def test_lstm_learns_a_rhythm(residual):
    # Loads alternate every 5 steps: the mean of the next 5 is the opposite of the last 5, a window sees 1/2.
    phase = (np.arange(200) // 5) % 2
    counts = np.stack([np.where(phase, 90, 10), np.where(phase, 10, 90)], -1)[:, None]
    s = ForecastSettings(look_back=10, updates=200, hidden_size=16, learning_rate=1e-2, residual=residual)
    ahead = predict(made(counts).shares_TLE, 5, "lstm", s)
    assert ahead[0, 0, 0] == pytest.approx(0.1, abs=0.1)


def test_lstm_starts_as_a_window():
    s = ForecastSettings(window=10, look_back=10, updates=1, learning_rate=1e-9)
    past = noise(60).shares_TLE
    np.testing.assert_allclose(predict(past, 5, "lstm", s), predict(past, 5, "sw_flat", s), atol=1e-5)


def test_arima_falls_back_on_what_looks_wrong():
    past = noise(200).shares_TLE
    s = ForecastSettings(order=(0, 1, 1))
    path, fell = arima(past, 25, s, fit=lambda series, steps: np.full(steps, series.mean()))
    assert fell == 0
    assert path.shape == (25, 2, 8)
    np.testing.assert_allclose(path[0], past.mean(0))
    for bad in (0.0, np.nan, 2.0):
        path, fell = arima(past, 25, s, fit=lambda series, steps, bad=bad: np.full(steps, bad))
        assert fell == 16
        np.testing.assert_allclose(path[0], predict(past, 1, "wma", s)[0])


def test_arima_names_its_extra():
    try:
        import statsforecast  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(BackendUnavailable, match=r"sateen\[arima\]"):
            forecast(noise(200), 10, "arima")
    else:
        assert forecast(noise(200), 10, "arima", interval=None).mean_LE.shape == (2, 8)


def test_errors_by_hand():
    truth = np.array([[[0.6, 0.4]], [[0.8, 0.2]]])
    e = layer_errors(truth, np.array([[[0.5, 0.5]]]))
    assert e["wape_agg"][0] == pytest.approx(0.4)
    assert e["wape_step"][0] == pytest.approx((0.2 + 0.6) / 2)
    assert e["mape_agg"][0] == pytest.approx((0.2 / 0.7 + 0.2 / 0.3) / 2)
    assert e["hot_err"][0] == pytest.approx(0.2 / 0.7)
    assert e["oracle_step"][0] == pytest.approx(0.2)
    assert e["bias"][0] == pytest.approx([-0.2, 0.2])


def test_the_floor_is_that_of_sampling():
    trace = noise(4000, seed=1)
    p = trace.shares_TLE.mean(0)
    seen = np.abs(trace.shares_TLE - p).sum(-1).mean(0)
    np.testing.assert_allclose(step_floor(p, trace.assignments_TL[0]), seen, rtol=0.02)


def test_skill_is_between_last_value_and_oracle():
    rows = evaluate(noise(), 50, "sw_flat", range(200, 500, 50))
    assert all(0.8 < row.skill <= 1 for row in rows)
    assert all(row.wape_step >= row.oracle_step for row in rows)
    last = evaluate(noise(), 50, "last", range(200, 500, 50))
    assert last[0].skill == pytest.approx(0, abs=1e-12)


def test_variance_and_range_are_a_loops():
    shares = noise(30).shares_TLE
    V, R = variance_and_range(shares, 10)
    for t in (0, 7, 20):
        w = shares[t : t + 10, 1, 3]
        assert V[t, 1, 3] == pytest.approx(sum((x - sum(w) / 10) ** 2 for x in w) / 10)
        assert R[t, 1, 3] == pytest.approx(max(w) - min(w))


def test_noise_has_its_floors():
    trace = noise(3000, experts=16)
    phi = dispersion(trace.shares_TLE, trace.assignments_TL, 100)
    assert phi.mean() == pytest.approx(1, abs=0.1)
    D = drift(trace.shares_TLE, 100).mean(0)
    D0 = drift_floor(trace.shares_TLE.mean(0), np.ones(2), trace.assignments_TL[0], 100)
    np.testing.assert_allclose(D, D0, rtol=0.15)


def test_states_of_noise_and_of_a_step():
    assert [s.state for s in states(noise(1000))] == ["stable", "stable"]
    a, b = noise(900), noise(60, seed=9)
    jump = made(np.concatenate([a.counts_TLE, b.counts_TLE]))
    found = states(jump)
    assert [s.state for s in found] == ["shifting", "shifting"]
    assert all(900 < s.alarms[0] <= 1000 and len(s.alarms) == 1 for s in found)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: forecast(noise(50), 10, "swflat"), "did you mean sw_flat"),
        (lambda: forecast(noise(50), 0), "at least 1"),
        (lambda: forecast(noise(50), 60, "lstm"), "shorten the horizon"),
        (lambda: forecast(noise(50), 5, interval=1.0), "between 0 and 1"),
        (lambda: ForecastSettings(window=0), "window = 0"),
        (lambda: states(noise(150)), "two windows"),
        (lambda: evaluate(noise(50), 10, "last", [45]), "do not fit"),
        (lambda: arima(noise(50).shares_TLE, 5, ForecastSettings(), fit=lambda s, n: s), "needs 24"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_no_torch():
    code = "import sys, sateen.placement, sateen.placement.faces; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
