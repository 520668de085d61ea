"""What a recipe may say about stages that name each other: `name`, `start_from`, `teachers`."""

from pathlib import Path

import pytest

from sateen.config import MOPDConfig, RunConfig, load_recipe, resolved_toml
from sateen.errors import ConfigError

HEAD = """
name = "r"
model.preset = "p"
tokenizer.vocab_size = 256
[data.docs]
kind = "python_docs"
weight = 0.0
[data.sums]
kind = "chat_task"
task = "sums"
[data.sort]
kind = "chat_task"
task = "sort"
"""
START = '[[stages]]\nstage = "sft"\nname = "start"\ntokens = 1_000\n'
TEACHER = """[[stages]]
stage = "rl"
name = "adder"
start_from = "start"
tokens = 1_000
sources = { sums = 1.0 }
"""


def mopd(teachers: str, more: str = "") -> str:
    return f'[[stages]]\nstage = "mopd"\nstart_from = "start"\ntokens = 1_000\nteachers = {teachers}\n{more}'


def load(tmp_path: Path, *stages: str) -> RunConfig:
    (tmp_path / "r.toml").write_text(HEAD + "".join(stages))
    return load_recipe([tmp_path / "r.toml"])


def test_teachers_are_earlier_stages_or_paths(tmp_path):
    student = mopd('{ sums = "adder", sort = "runs/sorter" }')
    config = load(tmp_path, START, TEACHER, student)
    stage = config.stages[2]
    assert isinstance(stage, MOPDConfig)
    assert stage.teachers == {"sums": Path("adder"), "sort": Path("runs/sorter")}
    assert [s.label for s in config.stages] == ["start", "adder", "mopd"]
    (tmp_path / "again.toml").write_text(resolved_toml(config))
    assert load_recipe([tmp_path / "again.toml"]) == config


def test_a_word_may_be_a_path_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sorter").mkdir()
    stages = load(tmp_path, START, TEACHER, mopd('{ sums = "adder", sort = "sorter" }')).stages
    assert isinstance(stages[2], MOPDConfig)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            (START, TEACHER, mopd('{ sums = "addre", sort = "start" }')),
            r"stages\.2\.teachers\.sums is neither an earlier stage nor a path that exists: "
            r"unknown stage 'addre'; did you mean adder\? \(known: adder, start\)",
        ),
        (
            (START, mopd('{ sums = "adder", sort = "start" }'), TEACHER),
            r"stages\.1\.teachers\.sums is neither an earlier stage",
        ),
        (
            (START, TEACHER, mopd('{ sums = "adder" }')),
            r"stages\.2\.teachers has none for sort; every source of the stage needs one",
        ),
        (
            (START, TEACHER, mopd('{ sums = "adder", sort = "start", sart = "start" }')),
            r"stages\.2\.teachers\.sart has no such source: unknown source 'sart'; did you mean sort",
        ),
        (
            (START, TEACHER, mopd('{ sums = "adder", sort = "start" }', "sources = { sums = 1.0 }\n")),
            r"stages\.2\.teachers\.sort has no such source",
        ),
        ((START, TEACHER, TEACHER), r"stages\.2\.name = 'adder' is the name of an earlier stage"),
        ((TEACHER,), r"stages\.0\.start_from names no earlier stage: unknown stage 'start'"),
        ((TEACHER, START), r"stages\.0\.start_from names no earlier stage"),
        ((START.replace("start", "../start"),), r"stages\.0\.name = '\.\./start' should match"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named(tmp_path, stages, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, *stages)
