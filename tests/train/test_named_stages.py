"""Named stages: their models stay, later stages begin from them, and a killed run finds them again."""

import shutil
from pathlib import Path

import pytest
import torch

from sateen.checkpoint import hf
from sateen.checkpoint.state import keep_model, kept_model, latest_checkpoint
from sateen.config import RunConfig, Silent
from sateen.errors import CheckpointError
from sateen.run import read_progress, run_receipt, run_recipe
from sateen.train.metrics import read_metrics

TOKENS = 128


def stage(steps: int, **changes) -> dict:
    return {
        "stage": "pretrain",
        "tokens": steps * TOKENS,
        "seq_len": 32,
        "tokens_per_batch": TOKENS,
        "keep_checkpoints": 1,
    } | changes


def recipe(texts: Path, *stages: dict) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "named",
            "seed": 3,
            "threads": 1,
            "model": {
                "preset": "mimo-v2-flash-tiny",
                "overrides": {"num_nextn_predict_layers": 0, "vocab_size": 300},
            },
            "tokenizer": {"vocab_size": 300},
            "data": {"text": {"kind": "text_dir", "path": str(texts)}},
            "stages": list(stages),
        }
    )


def fork(texts: Path, left_steps: int = 2) -> RunConfig:
    """A trunk and two branches that both begin with its model."""
    return recipe(
        texts,
        stage(3, name="trunk"),
        stage(left_steps, name="left", start_from="trunk"),
        stage(2, name="right", start_from="trunk"),
    )


@pytest.fixture(scope="module")
def forked(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forked") / "run"
    run_recipe(fork(texts), folder, Silent())
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return hf.load(folder).state_dict()


def differing(a: Path, b: Path) -> list[str]:
    x, y = weights(a), weights(b)
    assert x.keys() == y.keys()
    return [name for name in x if not torch.equal(x[name], y[name])]


class Kill(Silent):
    """Dies without a word when a stage of this label begins, or after a number of its updates."""

    def __init__(self, label: str, after: int = 0):
        self.label, self.left, self.is_on = label, after, False

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.is_on = what == self.label
        self._die()

    def update(self, done: int, **values: float) -> None:
        self.left -= self.is_on
        self._die()

    def _die(self) -> None:
        if self.is_on and self.left <= 0:
            raise ZeroDivisionError


def test_every_named_stage_leaves_its_model(forked):
    assert sorted(p.name for p in (forked / "stages").iterdir()) == ["left", "right", "trunk"]
    for name in ("trunk", "left", "right"):
        assert {p.name for p in (forked / "stages" / name).iterdir()} >= {"config.json", "tokenizer.json"}
    assert not differing(forked / "model", forked / "stages" / "right")
    assert differing(forked / "stages" / "left", forked / "stages" / "trunk")
    assert differing(forked / "stages" / "left", forked / "stages" / "right")


def test_a_kept_model_outlives_its_checkpoint(forked):
    """One checkpoint is kept, so the trunk's is gone; its model's files are whole."""
    steps = sorted(p.name for p in (forked / "checkpoints").iterdir())
    assert steps == ["step_7"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(forked / "stages" / "trunk").values())


def test_a_branch_equals_the_same_steps_taken_straight_from_the_trunk(forked, texts, tmp_path):
    """`left` follows the trunk anyway, so it must not matter whether it says so."""
    plain = recipe(texts, stage(3), stage(2))
    run_recipe(plain, tmp_path / "run", Silent())
    assert not differing(tmp_path / "run" / "model", forked / "stages" / "left")


def test_a_branch_ignores_the_stage_before_it(forked, texts, tmp_path):
    """With a left branch of another length, the right one still ends where it did."""
    run_recipe(fork(texts, left_steps=4), tmp_path / "run", Silent())
    assert differing(tmp_path / "run" / "stages" / "left", forked / "stages" / "left")
    assert not differing(tmp_path / "run" / "stages" / "right", forked / "stages" / "right")


@pytest.mark.parametrize(("label", "after"), [("left", 0), ("left", 1), ("right", 0), ("right", 1)])
def test_a_killed_run_resumes_to_the_same_models(forked, texts, tmp_path, label, after):
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        run_recipe(fork(texts), folder, Kill(label, after))
    run_recipe(fork(texts), folder, Silent())
    for name in ("trunk", "left", "right"):
        assert not differing(folder / "stages" / name, forked / "stages" / name)


def test_a_model_lost_between_saving_and_keeping_is_kept_on_resume(forked, texts, tmp_path):
    """Killed after the checkpoint of the stage's last step and before its model was kept."""
    folder = tmp_path / "run"
    with pytest.raises(ZeroDivisionError):
        run_recipe(fork(texts), folder, Kill("left", 0))
    (folder / "progress.json").unlink()
    shutil.rmtree(folder / "stages" / "trunk")
    run_recipe(fork(texts), folder, Silent())
    assert not differing(folder / "stages" / "trunk", forked / "stages" / "trunk")
    assert not differing(folder / "stages" / "right", forked / "stages" / "right")


def test_metrics_progress_and_receipt_call_stages_by_their_names(forked, texts):
    assert [m["stage"] for m in read_metrics(forked)] == ["trunk"] * 3 + ["left"] * 2 + ["right"] * 2
    done = read_progress(forked, fork(texts))
    assert [row["label"] for row in done] == ["trunk", "left", "right"]
    assert all(row["cpu_s"] >= 0 for row in done)
    receipt = run_receipt(fork(texts), forked)
    assert [row["what"] for row in receipt.speed] == ["training, trunk", "training, left", "training, right"]


def test_a_kept_model_is_kept_once(forked, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(forked, run, symlinks=True)
    saved = latest_checkpoint(run)
    assert saved is not None
    keep_model(run, "again", saved)
    before = (run / "stages" / "again" / "config.json").stat().st_ino
    keep_model(run, "again", saved)
    assert (run / "stages" / "again" / "config.json").stat().st_ino == before
    assert not list((run / "stages").glob(".*"))
    assert kept_model(run, "again") == run / "stages" / "again"


def test_a_model_that_was_not_kept_is_named(forked, tmp_path):
    with pytest.raises(CheckpointError, match=r"stages/midle: .*there are: left, right, trunk"):
        kept_model(forked, "midle")
    with pytest.raises(CheckpointError, match=r"there are: none"):
        kept_model(tmp_path, "trunk")
