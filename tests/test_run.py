"""Run folders: what is written, resumed, refused and locked. Stages are real functions of this file."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sateen.config import (
    STAGES,
    RunConfig,
    Silent,
    Stage,
    StageConfig,
    StageContext,
    load_recipe,
)
from sateen.errors import CheckpointError, ConfigError, SateenError
from sateen.receipt import Receipt
from sateen.run import RunBusy, first_difference, is_finished, lock, main, run_receipt, run_recipe

RECIPE = """
name = "small"
model.preset = "tiny"
tokenizer.vocab_size = 256
data.docs.kind = "python_docs"
[[stages]]
stage = "one"
tokens = 10
[[stages]]
stage = "two"
tokens = 20
"""


class Notes(Silent):
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stops = 0

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stop(self) -> None:
        self.stops += 1


class Broken(SateenError):
    pass


CALLS: list[StageContext] = []
BROKEN: set[Path] = set()


def one(context: StageContext) -> None:
    CALLS.append(context)


def two(context: StageContext) -> None:
    CALLS.append(context)
    if context.folder in BROKEN:
        raise Broken("the stage failed")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    CALLS.clear()
    BROKEN.clear()
    monkeypatch.setitem(sys.modules, "stages_of_this_test", sys.modules[__name__])
    monkeypatch.setitem(STAGES, "one", Stage("stages_of_this_test:one", StageConfig))
    monkeypatch.setitem(STAGES, "two", Stage("stages_of_this_test:two", StageConfig))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def config(recipe: Path) -> RunConfig:
    return load_recipe([recipe])


def test_stages_run_in_order_with_their_settings(config: RunConfig, tmp_path: Path) -> None:
    notes = Notes()
    run_recipe(config, tmp_path / "out", notes)
    assert [(c.stage_index, c.stage, c.folder) for c in CALLS] == [
        (0, config.stages[0], tmp_path / "out"),
        (1, config.stages[1], tmp_path / "out"),
    ]
    assert all(c.config == config and c.progress is notes for c in CALLS)
    assert notes.notes == ["stage 1 of 2: one", "stage 2 of 2: two"]
    assert load_recipe([tmp_path / "out" / "run.toml"]) == config
    done = json.loads((tmp_path / "out" / "progress.json").read_text())["done"]
    assert [(d["index"], d["stage"]) for d in done] == [(0, "one"), (1, "two")]


def test_a_failed_run_resumes_at_the_stage_that_failed(config: RunConfig, tmp_path: Path) -> None:
    folder, notes = tmp_path / "out", Notes()
    BROKEN.add(folder)
    with pytest.raises(Broken, match="the stage failed"):
        run_recipe(config, folder, notes)
    assert [c.stage_index for c in CALLS] == [0, 1]
    assert notes.stops == 2  # the bar is closed when a stage fails too
    assert not is_finished(config, folder)
    BROKEN.clear()
    CALLS.clear()
    run_recipe(config, folder, notes)
    assert [c.stage_index for c in CALLS] == [1]
    assert f"{folder}: resuming after 1 of 2 stages" in notes.notes
    assert is_finished(config, folder)


def test_a_finished_run_says_so_and_runs_nothing(config: RunConfig, tmp_path: Path) -> None:
    run_recipe(config, tmp_path / "out", Silent())
    CALLS.clear()
    notes = Notes()
    run_recipe(config, tmp_path / "out", notes)
    assert CALLS == []
    assert notes.notes == [f"{tmp_path / 'out'} is finished: all 2 stages are done; nothing to do"]


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("seed=1", "seed is 0 there and 1 here"),
        ("stages.1.tokens=5", "stages.1.tokens is 20 there and 5 here"),
        (
            "model.overrides.x=1",
            "model.overrides is not set there and a dict of 1 here",
        ),
        ("stages.one=", "stages is a list of 2 there and a list of 1 here"),
    ],
)
def test_a_folder_of_another_recipe_is_refused_with_the_first_difference(
    recipe: Path, tmp_path: Path, flag: str, difference: str
) -> None:
    folder = tmp_path / "out"
    run_recipe(load_recipe([recipe]), folder, Silent())
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for refused in (run_recipe, lambda c, f, _: is_finished(c, f)):
        with pytest.raises(ConfigError) as caught:
            refused(load_recipe([recipe], [flag]), folder, Silent())
        assert str(caught.value) == (
            f"{folder} belongs to another recipe: {difference}; "
            "choose another folder with --out, or delete this one"
        )
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_begun_before_a_setting_existed_still_resumes(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run_recipe(config, folder, Silent())
    text = (folder / "run.toml").read_text()
    assert text.count("compile = false\n") == 2
    (folder / "run.toml").write_text(text.replace("compile = false\n", ""))
    assert is_finished(config, folder)


def test_a_folder_with_other_things_is_refused_untouched(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").touch()
    with pytest.raises(ConfigError) as caught:
        run_recipe(config, folder, Silent())
    assert str(caught.value) == (
        f"{folder} exists and is no run folder (it has cat.jpg but no run.toml); "
        "choose another one with --out"
    )
    assert [path.name for path in folder.iterdir()] == ["cat.jpg"]
    with pytest.raises(ConfigError, match=r"cat\.jpg is a file; choose another folder with --out"):
        run_recipe(config, folder / "cat.jpg", Silent())


def test_what_a_killed_process_left_in_a_new_folder_is_no_obstacle(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".run.toml.123").touch()
    run_recipe(config, folder, Silent())
    assert is_finished(config, folder)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read"),
        ('{"done": [{"index": 0}]}', "cannot be read"),
        ('{"done": [{"stage": "two"}]}', r"its stages \['two'\] are not the run's"),
    ],
)
def test_a_damaged_progress_file_is_refused(
    config: RunConfig, tmp_path: Path, text: str, sentence: str
) -> None:
    folder = tmp_path / "out"
    run_recipe(config, folder, Silent())
    (folder / "progress.json").write_text(text)
    with pytest.raises(CheckpointError, match=sentence):
        run_recipe(config, folder, Silent())


def test_a_second_process_is_kept_out(config: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    holder = "import sys, pathlib, sateen.run\nwith sateen.run.lock(pathlib.Path(sys.argv[1])):\n"
    holder += "    print('held', flush=True)\n    sys.stdin.read()\n"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunBusy, match="another process is writing this run"):
            run_recipe(config, folder, Silent())
        assert CALLS == []
        other.kill()  # the lock goes with its process, however that ends
    run_recipe(config, folder, Silent())
    assert len(CALLS) == 2
    with lock(folder):
        pass


def test_dry_run_prints_the_settings_and_touches_nothing(
    recipe: Path, config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(str(recipe), sets=["seed=7"], out="elsewhere", dry_run=True) == 0
    printed = tmp_path / "printed.toml"
    assert sorted(tmp_path.rglob("*")) == before
    printed.write_text(capsys.readouterr().out)
    assert load_recipe([printed]) == config.model_copy(update={"seed": 7})
    assert CALLS == []


def test_the_verb_prints_the_run_folder(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(str(recipe)) == 0
    out, err = capsys.readouterr()
    assert out == "runs/small\n"
    assert "stage 2 of 2: two\n" in err
    assert Path("runs/small/run.toml").is_file()
    assert main(str(recipe), sets=["seed=1"], out="other") == 0
    assert capsys.readouterr().out == "other\n"


def test_first_difference() -> None:
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == (
        "a.1.b",
        2,
        3,
    )
    assert first_difference({"a": 1}, {"a": 1, "z": 2}) == ("z", None, 2)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])


def test_every_run_leaves_a_receipt_of_what_training_measured(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("name = 'x'\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345")
    rows = [
        {"stage": "pretrain", "tokens_per_s": s, "heldout_bits_per_byte": s / 100} for s in (100, 300, 200)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_receipt(config, tmp_path).write(tmp_path)
    receipt = Receipt.read(tmp_path)
    assert receipt.quality == {"bits_per_byte": 2.0}
    assert receipt.bytes == {"weights": 5}
    speed = {"what": "training, pretrain", "unit": "tokens/s", "median": 200, "p25": 150, "p75": 250, "n": 3}
    assert receipt.speed == [speed]
    assert receipt.seeds == {"run": config.seed}
    assert receipt.source["sha256"] == hashlib.sha256(b"name = 'x'\n").hexdigest()
