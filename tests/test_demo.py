"""The demo's own logic: budgets for every length, and which of its two processes gets the blame."""

import subprocess
import sys

import pytest

from sateen import demo
from sateen.config import load_recipe
from sateen.errors import ConfigError, SateenError


@pytest.mark.parametrize("minutes", [0.001, 0.13, 0.37, 1.0, 10.0, 60.0])
def test_budgets_of_any_length_make_valid_recipes(minutes):
    for recipe in demo.MODELS.values():
        plain, scaled = load_recipe(recipe), load_recipe(recipe, demo.overrides(minutes))
        for whole, part in zip(plain.stages, scaled.stages, strict=True):
            assert part.tokens % part.tokens_per_batch == 0
            exact = whole.tokens * minutes / demo.DEFAULT_MINUTES
            assert abs(part.tokens - exact) <= part.tokens_per_batch


def test_the_process_that_failed_is_named_not_the_one_that_was_stopped(tmp_path, monkeypatch):
    """The first model's process is healthy and gets stopped; the second's fails at once."""
    programs = {"hybrid": "import time; time.sleep(60)", "twin": "raise SystemExit('the disk is full')"}
    real = subprocess.Popen

    def start(command, **options):
        return real([sys.executable, "-c", programs[command[-1].rsplit("/", 1)[-1]]], **options)

    monkeypatch.setattr(demo.subprocess, "Popen", start)
    monkeypatch.setattr(demo.os, "cpu_count", lambda: 2)
    with pytest.raises(SateenError, match=r"training twin failed \(.*twin\.log\): the disk is full"):
        demo.train(tmp_path, {"minutes": 0.1})


def test_a_folder_of_something_else_is_refused_untouched(tmp_path):
    (tmp_path / "thesis.txt").write_text("two years")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match="is no demo folder"):
            demo.begin(tmp_path, 10.0, fresh)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_demo_that_was_begun_keeps_its_length_unless_fresh(tmp_path):
    assert demo.begin(tmp_path / "run", 3.0, False)["minutes"] == 3.0
    (tmp_path / "run" / "hybrid.log").write_text("old")
    assert demo.begin(tmp_path / "run", 10.0, False)["minutes"] == 3.0
    assert demo.begin(tmp_path / "run", 10.0, True)["minutes"] == 10.0
    assert not (tmp_path / "run" / "hybrid.log").exists()
