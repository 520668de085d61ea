"""The kernel table: every operator of the ops room is asked with a call it accepts."""

import json

import pytest
import torch

from sateen.ops.table import CALLS, main, operators, rows


def test_every_operator_has_a_call_and_its_reference_runs_it() -> None:
    assert set(CALLS) == set(operators())
    for name, op in operators().items():
        args, options = CALLS[name]("cpu")
        out = op.backends["reference"].function(*args, **options)
        for part in out if isinstance(out, tuple) else (out,):
            assert torch.equal(part, torch.zeros_like(part))  # of zeros, whatever the operator


def test_rows_list_each_backend_best_first() -> None:
    table = [row for row in rows() if row["device"] == "cpu"]
    for name, op in operators().items():
        mine = [row for row in table if row["op"] == name]
        assert {row["backend"] for row in mine} == set(op.backends)
        assert mine[-1]["backend"] == "reference"
        assert mine[-1]["status"] == "ok"


def test_the_verb_prints_rows_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(json=True) == 0
    assert json.loads(capsys.readouterr().out) == rows()
    assert main() == 0
    header, first, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["op", "backend", "device", "status"]
    assert first.split()[:3] == [rows()[0][key] for key in ("op", "backend", "device")]
