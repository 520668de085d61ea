"""Trace files: what is read, what is refused, and the verb that reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sateen.cli import main
from sateen.errors import ConfigError
from sateen.placement import (
    LoadTrace,
    balancedness_ratio_of_sums,
    evaluate,
    load_trace,
    plan,
    save_trace,
    simulate,
    states,
)
from sateen.train.metrics import LoadTrace as Recorder


@pytest.fixture
def file(tmp_path):
    """What the trainer writes: 260 steps, layers 1 and 3, loads skewed towards expert 0."""
    rng = np.random.default_rng(0)
    recorder = Recorder(tmp_path)
    for step in range(1, 261):
        counts = rng.multinomial(1000, [0.4, 0.3, 0.2, 0.1], 2)
        recorder.add(step, {1: torch.tensor(counts[0]), 3: torch.tensor(counts[1])})
    recorder.save()
    return recorder.path


def test_the_trainers_trace_is_read(file):
    trace = load_trace(file)
    assert (trace.counts_TLE.shape, trace.layers, trace.run) == ((260, 2, 4), (1, 3), "train")
    np.testing.assert_array_equal(trace.assignments_TL, 1000)
    assert trace.shares_TLE.mean(0)[0] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.01)


def test_saved_then_loaded(file, tmp_path):
    trace = load_trace(file)
    save_trace(tmp_path / "again.npz", trace)
    again = load_trace(tmp_path / "again.npz")
    np.testing.assert_array_equal(again.counts_TLE, trace.counts_TLE)
    assert (again.layers, again.steps_T.tolist()) == (trace.layers, trace.steps_T.tolist())


def test_bad_files(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ConfigError, match="not a readable npz"):
        load_trace(tmp_path / "text.npz")
    two = tmp_path / "two.npz"
    np.savez(two, a__counts=np.ones((2, 1, 2), int), b__counts=np.ones((2, 1, 2), float))
    with pytest.raises(ConfigError, match=r"several runs \(a, b\)"):
        load_trace(two)
    with pytest.raises(ConfigError, match="unknown run 'c'"):
        load_trace(two, "c")
    with pytest.raises(ConfigError, match="expected integers"):
        load_trace(two, "b")
    np.savez(two, loss=np.ones(3))
    with pytest.raises(ConfigError, match="RUN__counts"):
        load_trace(two)


@pytest.mark.parametrize(
    ("counts", "steps", "words"),
    [
        ([[[1, -1]]], [1], "negative count"),
        ([[[0, 0]]], [1], "no tokens in layer 0"),
        ([[[1, 1]], [[1, 1]]], [2, 2], "do not increase"),
    ],
)
def test_bad_counts(counts, steps, words):
    with pytest.raises(ConfigError, match=words):
        LoadTrace(np.array(counts), np.array(steps), (0,))


def test_the_verb(file, capsys):
    assert main(["experts", "trace", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["layers"]
    assert [(row["layer"], row["hottest_expert"]) for row in rows] == [(1, 0), (3, 0)]
    assert main(["experts", "forecast", str(file), "--horizon", "50", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["layers"][0]
    assert row["shares"] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.01)
    assert row["low"][0] < row["shares"][0] < row["high"][0]
    assert {"wape_step", "wape_agg", "mape_agg", "hot_err", "regret"} < set(row["metrics"])
    assert main(["experts", "place", str(file), "--ranks", "2", "--slots", "4", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    for row in out["phy2log"]:  # contiguous is 0.7 to 0.3; the best is {0, 3} and {1, 2}
        assert sorted(map(sorted, (row[:2], row[2:]))) == [[0, 3], [1, 2]]
    assert out["balancedness_ratio_of_sums"]["contiguous"] == pytest.approx(0.5 / 0.7, abs=0.02)
    assert out["moves"] == 4
    assert main(["experts", "simulate", str(file), "--ranks", "2", "--slots", "4", "--horizon", "30"]) == 0
    assert "policy never" in capsys.readouterr().out


def test_the_verbs_mistakes(file, capsys):
    assert main(["experts", "place", str(file), "--ranks", "3", "--slots", "4"]) == 2
    assert "multiple of ranks" in capsys.readouterr().err
    assert main(["experts", "forecast", str(file), "--horizon", "9", "--method", "oracle"]) == 2
    assert "known: arima, ema, last" in capsys.readouterr().err


def test_expensive_moves_are_not_advised(file, capsys):
    flags = ["--ranks", "2", "--slots", "4", "--expert-bytes", "1e15", "--json"]
    assert main(["experts", "place", str(file), *flags]) == 0
    out = json.loads(capsys.readouterr().out)
    assert not out["act"]
    assert out["advice"].startswith("do nothing")
    # By hand: two layers, 3 passes, 1000 assignments at 1e6/s, the fullest rank from 0.7 to 0.5.
    assert out["saved_s_per_step"] == pytest.approx(2 * 3 * 1000 * 0.2 / 1e6, rel=0.05)
    assert out["move_s"] == pytest.approx(4 * 1e15 / 5e10)


def test_policies(file):
    trace = load_trace(file)
    never, fixed = (simulate(trace, 2, 4, policy=p, horizon=30, start=100) for p in ("never", "fixed"))
    assert never["balancedness_ratio_of_sums"] == pytest.approx(0.5 / 0.7, abs=0.02)
    assert never["moves"] == never["net_s"] == 0
    assert fixed["balancedness_ratio_of_sums"] > 0.95
    with pytest.raises(ConfigError, match="did you mean never"):
        simulate(trace, 2, 4, policy="nevr")


GOLDEN = Path(__file__).parents[1] / "golden"


def test_recorded_cuts():
    # Cuts of the runs of `test_recorded_runs`; its bounds hold on them.
    stable, shift = (load_trace(GOLDEN / f"expert_loads_{name}.npz") for name in ("stable", "shift"))
    assert all(s.stable_since and not s.alarms for s in states(stable))
    assert all(1300 < s.alarms[0] <= 1400 for s in states(shift))  # the data changed after step 1,300
    for horizon in (100, 500):
        at = range(300, 1201 - horizon, 50)
        ours, last = (
            np.mean([e.wape_agg for e in evaluate(stable, horizon, m, at)]) for m in ("sw_flat", "last")
        )
        assert last >= 2 * ours
    for trace, horizon, at in ((stable, 300, range(200, 901, 50)), (shift, 200, range(150, 201, 10))):
        shares = trace.shares_TLE
        loads = [plan(shares[t - 100 : t].mean(0), 8, 32).rank_loads(shares[t : t + horizon]) for t in at]
        assert balancedness_ratio_of_sums(np.concatenate(loads)) >= 0.78


REAL = os.environ.get("SATEEN_MOE_TRACE", "")


@pytest.mark.skipif(not Path(REAL).is_file(), reason="needs SATEEN_MOE_TRACE, an npz of three recorded runs")
def test_recorded_runs():
    runs = {name: load_trace(REAL, name) for name in ("noaux_top1", "noaux_const_top2", "aux_const_shift")}
    assert [s.stable_since for s in states(runs["noaux_top1"])] == [2720, 1180, 1710, 1110]
    assert all(not s.alarms for name in list(runs)[:2] for s in states(runs[name]))
    assert all(1300 < s.alarms[0] <= 1400 for s in states(runs["aux_const_shift"]))
    for horizon, known in ((100, 4.0), (500, 5.3), (1000, 8.0)):
        at = range(1200, 3001 - horizon, 50)
        ours, last = (
            np.mean([e.wape_agg for e in evaluate(runs["noaux_top1"], horizon, m, at)])
            for m in ("sw_flat", "last")
        )
        assert 100 * ours == pytest.approx(known, abs=0.1)
        assert last >= 2 * ours
    for name, horizon, at in (
        ("noaux_top1", 500, range(1200, 2501, 50)),
        ("aux_const_shift", 300, range(600, 1201, 50)),
    ):
        shares = runs[name].shares_TLE
        loads = [plan(shares[t - 100 : t].mean(0), 8, 32).rank_loads(shares[t : t + horizon]) for t in at]
        assert balancedness_ratio_of_sums(np.concatenate(loads)) >= 0.78
