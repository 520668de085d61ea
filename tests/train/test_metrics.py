"""metrics.jsonl and the expert-load trace, across a resume."""

import json

import numpy as np
import torch

from sateen.train.metrics import LoadTrace, MetricsWriter, read_metrics


def test_one_line_per_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.5, "stage": "pretrain"})
        writer.write(2, {"loss": 2.25, "stage": "pretrain"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 2.5, "stage": "pretrain"},
        {"step": 2, "loss": 2.25, "stage": "pretrain"},
    ]


def test_resume_cuts_lines_behind_the_checkpoint_and_a_torn_one(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [m["step"] for m in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, {"loss": 40.0})
    assert [(m["step"], m["loss"]) for m in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
    ]


def test_no_metrics_is_an_empty_list(tmp_path):
    assert read_metrics(tmp_path) == []


def test_trace_keeps_counts_by_step_layer_expert_and_continues(tmp_path):
    trace = LoadTrace(tmp_path)
    for step in (1, 2, 3):
        trace.add(step, {4: torch.tensor([step, 0]), 2: torch.tensor([0, 10 * step])})
    trace.save()
    again = LoadTrace(tmp_path, resume_step=2)
    again.add(3, {2: torch.tensor([7, 7]), 4: torch.tensor([8, 8])})
    again.save()
    with np.load(tmp_path / "traces" / "expert_load.npz") as saved:
        assert saved["train__steps"].tolist() == [1, 2, 3]
        assert saved["train__counts"].tolist() == [[[0, 10], [1, 0]], [[0, 20], [2, 0]], [[7, 7], [8, 8]]]
        assert json.loads(str(saved["train__meta"]))["layers"] == [2, 4]


def test_models_without_experts_leave_no_trace_file(tmp_path):
    trace = LoadTrace(tmp_path)
    trace.add(1, {})
    trace.save()
    assert not (tmp_path / "traces").exists()
