"""The table of stages: each name, its class and its function belong together."""

from pathlib import Path

import pytest

from sateen.config import STAGES, Config, Stage, StageConfig, load_recipe, stage_function
from sateen.config.data import SOURCES
from sateen.config.optim import OPTIMIZERS, SCHEDULES
from sateen.errors import ConfigError


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_key_is_the_name_its_class_accepts(name: str) -> None:
    assert STAGES[name].config(stage=name, tokens=1).stage == name


@pytest.mark.parametrize("table", [OPTIMIZERS, SCHEDULES, SOURCES], ids=["optimizer", "schedule", "source"])
def test_a_choices_key_is_the_name_its_class_accepts(table: dict[str, type[Config]]) -> None:
    for name, cls in table.items():
        assert cls.choice is not None
        assert cls.model_fields[cls.choice].default == name


def test_a_new_stage_is_a_class_and_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distill(StageConfig):
        teacher: str

    monkeypatch.setitem(STAGES, "distill", Stage("pathlib:PurePath.as_posix", Distill))
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        'name = "r"\nmodel.preset = "p"\ntokenizer.vocab_size = 256\ndata.d.kind = "python_docs"\n'
        '[[stages]]\nstage = "distill"\ntokens = 1\nteacher = "big"\n'
    )
    (stage,) = load_recipe([recipe]).stages
    assert stage == Distill(stage="distill", tokens=1, teacher="big")
    assert stage_function("distill").__name__ == "as_posix"
    with pytest.raises(
        ConfigError, match=r"stages\.0\.teachr is not a setting; did you mean stages\.0\.teacher"
    ):
        load_recipe([recipe], ["stages.distill.teachr=1"])


def test_a_micro_batch_is_a_part_of_the_batch() -> None:
    assert (
        StageConfig(stage="x", tokens=1, tokens_per_batch=4096, micro_batches=4).tokens_per_micro_batch
        == 1024
    )
