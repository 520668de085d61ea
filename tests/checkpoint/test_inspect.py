"""`sateen inspect`: presets without data, directories from their headers, JSON and text."""

from __future__ import annotations

import json

import pytest
import torch

from sateen.checkpoint.hf import load_model
from sateen.checkpoint.inspect import inspect, main
from sateen.errors import CheckpointError


def test_a_directory_is_sized_by_its_stored_tensors(tmp_path):
    load_model("mimo-v2-flash-tiny", dtype="bfloat16").save(tmp_path / "model")
    model = load_model(tmp_path / "model")
    sizes = {"F32": 0, "BF16": 0}
    for tensor in model.state_dict().values():
        sizes["F32" if tensor.dtype == torch.float32 else "BF16"] += tensor.nbytes
    found = inspect(tmp_path / "model", context=[64])
    assert found["weight_bytes"] == sizes
    assert sizes["F32"] == 5 * 4 * (8 * 64 + 8)  # five routers
    assert found["parameters"] == inspect("mimo-v2-flash-tiny")["parameters"]


def test_a_broken_directory_is_refused(tmp_path):
    load_model("mimo-7b-tiny").save(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match="12 tensors are missing"):
        inspect(tmp_path / "model")


def test_json_is_what_inspect_returns(capsys):
    assert main("mimo-7b-tiny", context=[7, 9], kv_dtype="fp8", json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == inspect("mimo-7b-tiny", context=[7, 9], kv_dtype="fp8")
    assert [row["context"] for row in printed["kv"]] == [7, 9]


def test_the_text_shows_counts_bytes_and_savings(capsys):
    assert main("mimo-v2-flash", context=[32768], kv_dtype="bf16") == 0
    out = capsys.readouterr().out
    assert "parameters  308.78B, of which 15.45B active per token; MTP heads 987.82M" in out
    assert "sliding_attention  64/8        192/128    129     yes   10000" in out
    row = next(line for line in out.splitlines() if line.startswith("32768"))
    assert row.split() == ["32768", "744.57", "MiB", "1.89", "MiB", "3.75", "GiB", "5.16x"]
    assert "note: the config's window 128" in out
