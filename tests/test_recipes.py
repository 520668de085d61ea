"""`benchmarks/recipes.py`: plans fit recipes, finished runs are not repeated, the table has the numbers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from sateen.config import load_recipe

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "recipes.py"
SPEC = importlib.util.spec_from_file_location("benchmarks_recipes", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
recipes = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = recipes
SPEC.loader.exec_module(recipes)


@pytest.mark.parametrize("name", recipes.PLANS)
def test_a_plan_fits_its_recipe(name):
    plan = recipes.PLANS[name]
    config = load_recipe(plan.recipes)
    assert config.name == name
    assert {m.stage for m in plan.measures if m.stage} <= {stage.name for stage in config.stages}
    assert bool(plan.measures) != bool(plan.study)
    assert plan.study is None or (SCRIPT.parent / plan.study).is_file()


@pytest.fixture
def calls(monkeypatch):
    """Commands instead of runs; every evaluation finds 30 % of 10."""
    made = []

    def sateen(*words):
        made.append(words)
        return json.dumps({"tasks": {"sums": {"accuracy": 0.3, "n": 10, "chance": 0.0}}})

    monkeypatch.setattr(recipes, "sateen", sateen)
    monkeypatch.setattr(recipes, "kept_model", lambda run, stage: run / "stages" / stage)
    seconds = [{"stage": "sft", "wall_s": 2.5, "cpu_s": 2.0}, {"stage": "rl", "wall_s": 10.0, "cpu_s": 9.0}]
    monkeypatch.setattr(recipes, "read_progress", lambda folder, config: seconds)
    return made


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_finished_run_is_measured_and_not_repeated(calls, monkeypatch, tmp_path, is_finished):
    monkeypatch.setattr(recipes, "is_finished", lambda config, folder: is_finished)
    run = recipes.one_run("rl-tiny", recipes.PLANS["rl-tiny"], 2, tmp_path, False)
    folder = str(tmp_path / "rl-tiny-seed2")
    trained = [words for words in calls if words[0] == "train"]
    assert trained == ([] if is_finished else [("train", "rl-tiny", "--set", "seed=2", "--out", folder)])
    assert [words[1] for words in calls if words[0] == "eval"] == [f"{folder}/stages/start", folder]
    assert (run["seed"], run["wall_s"], run["cpu_s"]) == (2, 12.5, 11.0)
    assert run["before"] == run["after"] == {"tasks": {"sums": {"accuracy": 0.3, "n": 10, "chance": 0.0}}}
    (row,) = recipes.table("rl-tiny", [run])
    assert "before sums 30.0%   after sums 30.0%" in row


def test_fresh_deletes_only_the_run(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "is_finished", lambda config, folder: folder.exists())
    (tmp_path / "rl-tiny-seed0").mkdir()
    (tmp_path / "rl-tiny-seed1").mkdir()
    recipes.one_run("rl-tiny", recipes.PLANS["rl-tiny"], 0, tmp_path, True)
    assert [path.name for path in tmp_path.iterdir()] == ["rl-tiny-seed1"]
    assert calls[0][0] == "train"


def test_unknown_recipes_and_seeds_are_refused(monkeypatch, capsys):
    for arguments in (["--only", "rl-tiny,x"], ["--seeds", "0,a"]):
        monkeypatch.setattr(sys, "argv", ["recipes.py", *arguments])
        with pytest.raises(SystemExit):
            recipes.main()
    said = capsys.readouterr().err
    assert "x is not one of" in said
    assert "not a list of whole numbers" in said
