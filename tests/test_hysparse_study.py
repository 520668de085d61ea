"""`benchmarks/hysparse_study.py`: arms differ in layers alone, the table's numbers are worked by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from sateen.config import load_recipe
from sateen.config.toml import as_table
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.models.registry import preset
from sateen.run import first_difference

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "hysparse_study.py"
SPEC = importlib.util.spec_from_file_location("benchmarks_hysparse_study", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
sys.path.insert(0, str(SCRIPT.parent))
study = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = study
SPEC.loader.exec_module(study)


def config(arm):
    return load_recipe(study.EVERY[arm].recipes, study.EVERY[arm].sets)


def built(arm):
    source = config(arm).model
    return ModelConfig.from_hf(preset(source.preset) | source.overrides)


@pytest.mark.parametrize("arm", study.EVERY)
def test_an_arm_reads_the_same_and_differs_in_its_layers_alone(arm):
    base, other = (as_table(config(name)) for name in ("hysparse", arm))
    for table in (base, other):
        del table["name"], table["model"]
    assert first_difference(base, other) is None
    with torch.device("meta"):
        total = count_parameters(Decoder(built(arm)))["total"]
    assert total >= 4_000_000
    assert max(stage.seq_len for stage in config(arm).stages) == 1024
    raw = built(arm).raw
    assert (raw["sparse_block_size"], raw["sparse_topk_tokens"], raw["sliding_window"]) == (16, 128, 32)
    kinds = raw["layer_types"]
    assert kinds.count("full_attention") == {"full": 8, "hysparse2": 2}.get(arm, 1)
    assert len(kinds) == 8


def test_hysparse2_has_another_full_layer_and_as_many_bytes_of_them():
    paged = {
        arm: sum(layout.row_elements for layer in built(arm).kv_layouts() for layout in layer
                 if layout.kind == "paged")
        for arm in ("hysparse", "sliding", "hysparse2")
    }  # fmt: skip
    assert paged == dict.fromkeys(paged, 2 * (64 + 64))


def test_hybrids_have_their_full_layers_in_the_same_places():
    places = [
        [i for i, kind in enumerate(built(arm).raw["layer_types"]) if kind == "full_attention"]
        for arm in study.EVERY
        if arm not in ("full", "hysparse2")
    ]
    assert all(found == places[0] for found in places)
    kinds = {spec.attention for spec in built("hysparse2").specs}
    assert kinds == {"gated_sliding_attention", "oracle_attention", "sparse_attention"}


def row(arm, seed, bits, accuracy):
    tasks = {task: {"256": {"accuracy": accuracy}} for task in study.TASKS}
    return {"arm": arm, "seed": seed, "bits_per_byte": bits, "tasks": tasks}


ROWS = [
    row("full", 0, 2.0, 0.9), row("full", 1, 2.2, 1.0), row("full", 2, 2.1, 0.95),
    row("sliding", 0, 2.1, 0.5), row("sliding", 1, 2.3, 0.5), row("sliding", 2, 2.2, 0.55),
    row("hysparse", 0, 2.05, 0.8), row("hysparse", 1, 2.26, 0.9), row("hysparse", 2, 2.14, 0.8),
]  # fmt: skip


def test_means_errors_pairs_and_gaps_by_hand():
    arms = study.summary(ROWS, [256])
    bits = arms["hysparse"]["bits_per_byte"]
    assert bits["mean"] == pytest.approx(2.15)
    # Deviations -0.10, 0.11, -0.01: sqrt(0.0222 / 2 / 3).
    assert bits["standard_error"] == pytest.approx((0.0222 / 6) ** 0.5)
    # Pairs 0.05, 0.06, 0.04: mean 0.05, deviations 0, 0.01, -0.01.
    assert bits["minus_full"]["mean"] == pytest.approx(0.05)
    assert bits["minus_full"]["standard_error"] == pytest.approx((0.0002 / 6) ** 0.5)
    assert bits["gap_closed"] == pytest.approx(0.5)  # -0.05 of -0.10
    needle = arms["hysparse"]["needle@256"]
    assert needle["minus_sliding"]["values"] == pytest.approx([0.3, 0.4, 0.25])
    assert needle["gap_closed"] == pytest.approx((0.95 / 3) / (1.3 / 3))
    assert arms["hysparse"]["all@256"] == needle  # every task has the same number here
    assert "gap_closed" not in arms["sliding"]["needle@256"]
    assert "minus_full" not in arms["full"]["bits_per_byte"]


def test_a_gap_within_two_errors_is_none():
    rows = [
        row("full", 0, 2.0, 0.9), row("full", 1, 2.0, 0.5),
        row("sliding", 0, 2.1, 0.8), row("sliding", 1, 2.2, 0.5),
        row("hysparse", 0, 2.0, 0.9), row("hysparse", 1, 2.0, 0.9),
    ]  # fmt: skip
    arms = study.summary(rows, [256])
    assert arms["hysparse"]["needle@256"]["gap_closed"] is None  # 0.05 +- 0.05
    assert arms["hysparse"]["bits_per_byte"]["gap_closed"] == pytest.approx(1.0)
    single = study.summary([r for r in rows if r["seed"] == 0], [256])
    assert single["hysparse"]["needle@256"]["gap_closed"] is None
    assert single["hysparse"]["needle@256"]["standard_error"] is None


def test_the_table_has_a_column_per_arm():
    table = list(study.lines(study.summary(ROWS, [256]), [256]))
    assert table[0] == "| mean ± standard error over seeds | full | sliding | hysparse |"
    assert "| bits_per_byte, minus full |  | +0.1000 ± 0.0000 | +0.0500 ± 0.0058 |" in table
    assert "| bits_per_byte, gap closed |  |  | 50% |" in table
    assert {line.count("|") for line in table} == {5}


def test_finished_runs_are_neither_repeated_nor_measured_again(monkeypatch, tmp_path):
    calls = []

    def call(command, log):
        calls.append(command)
        if "--measure" in command:
            folder = Path(command[command.index("--measure") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            asked = study.asked([256], 5)
            (folder / study.MEASURED).write_text(
                json.dumps({"asked": asked, "numbers": {"bits_per_byte": 2}})
            )

    monkeypatch.setattr(study, "call", call)
    monkeypatch.setattr(study, "read_progress", lambda *_: [{"cpu_s": 2.0, "wall_s": 3.0}] * 2)
    found = study.one_run("own-kv", 1, tmp_path, ["threads=1"], [256], 5)
    assert (found["arm"], found["seed"], found["cpu_s"], found["wall_s"]) == ("own-kv", 1, 4.0, 6.0)
    assert found["bits_per_byte"] == 2
    assert calls[0][2:] == [
        "sateen.cli", "train", "hysparse-study", "--set", "seed=1",
        "--set", "model.overrides.share_kv_sa=false", "--set", "threads=1",
        "--out", str(tmp_path / "own-kv-seed1"),
    ]  # fmt: skip
    assert len(calls) == 2
    monkeypatch.setattr(study, "is_finished", lambda *_: True)
    assert study.one_run("own-kv", 1, tmp_path, ["threads=1"], [256], 5) == found
    assert len(calls) == 2
    study.one_run("own-kv", 1, tmp_path, ["threads=1"], [512], 5)
    assert len(calls) == 3


def test_counts_shrink_with_the_length():
    parameters = study.parameters(config("full"), "multikey", 256)
    assert (parameters["length"], parameters["num_keys"]) == (254, 12)
    assert study.parameters(config("full"), "multikey", 1024)["num_keys"] == 49
    assert (
        study.parameters(config("full"), "vt", 256)["num_chains"] == 4
    )  # but for chains, of which there are few


def test_the_mean_over_tasks_weighs_them_alike():
    uneven = row("full", 0, 2.0, 0.5)
    uneven["tasks"]["vt"]["256"]["accuracy"] = 0.9
    assert study.quantities(uneven, [256])["all@256"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("given", "names"), [("full,own-kv", 2), ("ablation", 3), ("all", 7), ("full,all", 7)]
)
def test_arms_are_chosen_by_name_and_group(given, names):
    assert len(study.chosen(given)) == names


def test_unknown_arms_and_numbers_are_refused():
    with pytest.raises(ValueError, match="ful is not one of full, sliding"):
        study.chosen("ful")
    with pytest.raises(ValueError, match="'1,x' is not a list of whole numbers"):
        study.numbers("1,x")
