"""The report's part on expert loads: from a trace, and without one."""

from __future__ import annotations

import numpy as np

from sateen.placement import LoadTrace, save_trace
from sateen.report.experts import expert_forecast


def test_from_a_trace_and_without(tmp_path):
    assert "Missing: a forecast of expert loads" in expert_forecast(tmp_path)
    counts = np.random.default_rng(0).multinomial(1000, np.array([4, 3, 2, 1, 1, 1, 1, 1]) / 14, (80, 2))
    (tmp_path / "traces").mkdir()
    save_trace(tmp_path / "traces" / "expert_load.npz", LoadTrace(counts, np.arange(1, 81), (1, 2)))
    page = expert_forecast(tmp_path)
    assert all(f">{method}<" in page for method in ("last", "sw_flat", "sw_recursive", "wma", "ema"))
    assert "on 4 ranks over the last 20 steps" in page
    assert "Missing" not in page
