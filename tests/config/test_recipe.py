"""Recipes: precedence, the sentences of errors, and the round trip through run.toml."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from sateen.config import (
    AdamWConfig,
    MTPConfig,
    MuonConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TaskSource,
    WSDSchedule,
    load_recipe,
    resolved_toml,
)
from sateen.config.stages import STAGES
from sateen.errors import ConfigError

STAGE_NAMES = ", ".join(sorted(STAGES))

RECIPE = """
name = "small"
[model]
preset = "tiny"
overrides = { rope_scaling = { type = "none" }, layers = [{ a = 1 }, { b = [] }] }
[tokenizer]
vocab_size = 1024
[data.docs]
kind = "python_docs"
[data."held back"]
kind = "task"
task = "sums"
parameters = { num_digits = 2 }
weight = 0.5
[[stages]]
stage = "pretrain"
tokens = 2e6
[stages.optimizer]
learning_rate = 0.01
[[stages]]
stage = "sft"
tokens = 100_000
losses = { mtp_weight = 0.2 }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def load(recipe: Path, *sets: str) -> RunConfig:
    return load_recipe([recipe], sets)


def message(recipe: Path, *sets: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(recipe, *sets)
    assert caught.value.exit_code == 2
    return str(caught.value)


def overlay(tmp_path: Path, text: str, name: str = "over.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_reads_every_part_of_a_recipe(recipe: Path) -> None:
    config = load(recipe)
    assert config.name == "small"
    assert config.model.overrides == {"rope_scaling": {"type": "none"}, "layers": [{"a": 1}, {"b": []}]}
    assert config.data["held back"] == TaskSource(task="sums", parameters={"num_digits": 2}, weight=0.5)
    pretrain, sft = config.stages
    assert isinstance(pretrain, PretrainConfig)
    assert isinstance(sft, SFTConfig)
    assert (pretrain.tokens, type(pretrain.tokens)) == (2_000_000, int)


def test_a_table_given_in_part_keeps_the_rest_of_that_stages_defaults(recipe: Path) -> None:
    pretrain, sft = load(recipe).stages
    assert pretrain.optimizer == MuonConfig(learning_rate=0.01)
    assert pretrain.optimizer.adamw_learning_rate == MuonConfig().adamw_learning_rate
    assert sft.losses.mtp_weight == 0.2
    assert sft.losses.balance_weight == 1e-6  # MiMo-V2-Flash §4.2, not the 1e-5 of pre-training
    changed = load(recipe, "stages.sft.optimizer.weight_decay=0").stages[1].optimizer
    assert changed == AdamWConfig(learning_rate=3e-5, weight_decay=0.0)


def test_another_optimizer_starts_from_its_own_defaults(recipe: Path, tmp_path: Path) -> None:
    change = overlay(tmp_path, '[stages.sft]\noptimizer = { name = "muon" }')
    assert load_recipe([recipe, change]).stages[1].optimizer == MuonConfig()


def test_published_defaults() -> None:
    pretrain, sft, mtp = PretrainConfig(tokens=1), SFTConfig(tokens=1), MTPConfig(tokens=1)
    losses = pretrain.losses
    # MiMo-V2-Flash §3.2: 0.3, 1e-5, 1e-3. MiMo-7B §3.1: constant 3e-5.
    assert (losses.mtp_weight, losses.balance_weight, losses.router_bias_update_rate) == (0.3, 1e-5, 1e-3)
    assert (sft.optimizer.learning_rate, sft.schedule.name) == (3e-5, "constant")
    assert sft.losses.router_bias_update_rate == 1e-4
    assert (mtp.num_heads, mtp.losses.detach_trunk) == (3, True)
    assert (sft.optimizer.betas, sft.optimizer.weight_decay, sft.optimizer.clip_norm) == (
        (0.9, 0.95),
        0.1,
        1.0,
    )


def test_precedence_is_default_recipe_overlays_flags(recipe: Path, tmp_path: Path) -> None:
    first = overlay(tmp_path, "seed = 1\nthreads = 1\ndtype = 'bfloat16'", "first.toml")
    second = overlay(tmp_path, "seed = 2\nthreads = 2", "second.toml")
    config = load_recipe([recipe, first, second], ["seed=3"])
    assert (config.seed, config.threads, config.dtype, config.device) == (3, 2, "bfloat16", "cpu")
    assert load_recipe([recipe, second, first]).seed == 1
    assert load(recipe, "seed=3", "seed=4").seed == 4


def test_overlays_address_stages_by_name_or_index_and_leave_the_rest(recipe: Path, tmp_path: Path) -> None:
    change = overlay(tmp_path, "[stages.sft]\ntokens = 5\n[stages.0]\nseq_len = 64")
    config = load_recipe([recipe, change], ["stages.1.keep_checkpoints=9"])
    assert [s.tokens for s in config.stages] == [2_000_000, 5]
    assert config.stages[0].seq_len == 64
    assert config.stages[0].optimizer == MuonConfig(learning_rate=0.01)
    assert config.stages[1].keep_checkpoints == 9


def test_an_overlay_with_a_list_replaces_the_list(recipe: Path, tmp_path: Path) -> None:
    change = overlay(tmp_path, '[[stages]]\nstage = "mtp"\ntokens = 7\ntrain = "new"')
    assert load_recipe([recipe, change]).stages == (MTPConfig(tokens=7, train="new"),)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("name=other", "other"), ('name="other"', "other"), ("name='a.b-c'", "a.b-c")],
)
def test_set_takes_toml_values_and_bare_words(recipe: Path, flag: str, value: str) -> None:
    assert load(recipe, flag).name == value


def test_a_table_in_a_flag_replaces_and_one_in_an_overlay_merges(recipe: Path, tmp_path: Path) -> None:
    change = overlay(tmp_path, "[stages.0]\noptimizer = { eps = 1e-6 }")
    assert load_recipe([recipe, change]).stages[0].optimizer == MuonConfig(learning_rate=0.01, eps=1e-6)
    assert load(recipe, "stages.0.optimizer={eps = 1e-6}").stages[0].optimizer == MuonConfig(eps=1e-6)
    flag = 'stages.0.optimizer={name = "adamw"}'
    assert load(recipe, flag).stages[0].optimizer == AdamWConfig()


def test_set_without_a_value_takes_a_setting_or_a_stage_away(recipe: Path) -> None:
    config = load(recipe, "model.preset=", "model.config=shapes/config.json", "stages.pretrain=")
    assert (config.model.preset, config.model.config) == (None, Path("shapes/config.json"))
    assert [s.stage for s in config.stages] == ["sft"]


def test_run_toml_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load(
        recipe,
        "stages.0.schedule={name = 'wsd', decay_tokens = 1000, final_fraction = 0.1}",
        "stages.sft.sources={docs = 1e-3}",
        'model.overrides.odd="tab\\t quote\\" \\u007f é"',
    )
    written = overlay(tmp_path, resolved_toml(config), "run.toml")
    again = load_recipe([written])
    assert again == config
    assert isinstance(again.stages[0].schedule, WSDSchedule)
    assert resolved_toml(again) == resolved_toml(config)


def test_run_toml_writes_defaults_out(recipe: Path) -> None:
    text = resolved_toml(load(recipe))
    assert 'device = "cpu"\n' in text
    assert "adamw_learning_rate = 0.003\n" in text
    assert '[data."held back"]\n' in text


def test_an_unknown_key_names_its_file_and_the_nearest_key(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE.replace("learning_rate", "lerning_rate"))
    assert message(recipe) == (
        f"{recipe}: stages.0.optimizer.lerning_rate is not a setting; "
        "did you mean stages.0.optimizer.learning_rate?"
    )
    recipe.write_text(RECIPE)
    change = overlay(tmp_path, "sead = 3")
    with pytest.raises(ConfigError) as caught:
        load_recipe([recipe, change])
    assert str(caught.value) == f"{change}: sead is not a setting; did you mean seed?"


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("stages.0.tokns=1", "stages.0.tokns is not a setting; did you mean stages.0.tokens?"),
        ("data.docs.wieght=1", "data.docs.wieght is not a setting; did you mean data.docs.weight?"),
        ("model.preest=x", "model.preest is not a setting; did you mean model.preset?"),
        (
            "stages.sft.optimizer.momentum=0.9",
            "stages.1.optimizer.momentum is not a setting "
            "(known: name, learning_rate, betas, eps, weight_decay, clip_norm)",
        ),
        ("seed=x", "seed = 'x' should be a valid integer"),
        ("seed=true", "seed = True should be a valid integer"),
        ("seed=1.5", "seed = 1.5 should be a valid integer"),
        ("seed=-1", "seed = -1 should be greater than or equal to 0"),
        ("name=3", "name = 3 should be a valid string"),
        ("name=a/b", "name = 'a/b' should match ^[A-Za-z0-9][A-Za-z0-9_.-]*$"),
        ("device=gpu", "device = 'gpu' should match ^(cpu|mps|cuda(:\\d+)?)$"),
        ("dtype=fp8", "dtype = 'fp8' should be 'float32' or 'bfloat16'"),
        ("stages.0.tokens=0", "stages.0.tokens = 0 should be greater than or equal to 1"),
        ("stages.0.tokens=1.5", "stages.0.tokens = 1.5 should be a valid integer"),
        ("stages.0.compile=1", "stages.0.compile = 1 should be a valid boolean"),
        ("stages.0.optimizer.betas=x", "stages.0.optimizer.betas = 'x' should be a valid list"),
        ("stages.0.optimizer.eps=nan", "stages.0.optimizer.eps = nan should be a finite number"),
        ("stages.0.optimizer=3", "stages.0.optimizer = 3 should be a table"),
        ("model=3", "model = 3 should be a table"),
        ("stages=3", "stages = 3 should be a valid list"),
        ("tokenizer.vocab_size=12", "tokenizer.vocab_size = 12 should be greater than or equal to 256"),
        (
            "stages.0.optimizer.name=adam",
            "stages.0.optimizer.name = 'adam': unknown optimizer 'adam'; did you mean adamw? "
            "(known: adamw, muon)",
        ),
        (
            "stages.0.schedule.name=cosin",
            "stages.0.schedule.name = 'cosin': unknown schedule 'cosin'; did you mean cosine? "
            "(known: constant, cosine, wsd)",
        ),
        (
            "stages.0.stage=pre-train",
            "stages.0.stage = 'pre-train': unknown stage 'pre-train'; did you mean pretrain? "
            f"(known: {STAGE_NAMES})",
        ),
        (
            "data.docs.kind=python_doc",
            "data.docs.kind = 'python_doc': unknown data kind 'python_doc'; did you mean python_docs? "
            "(known: chat_task, python_docs, speech, task, text_dir)",
        ),
        ("stages.0.stage=", f"stages.0.stage is missing; choose one of {STAGE_NAMES}"),
        (
            "stages.1.sources.doc=1",
            "stages.1.sources.doc names no source: unknown data source 'doc'; did you mean docs? "
            "(known: docs, held back)",
        ),
        ("stages.1.sources.docs=0", "stages.1 has no source with a weight above 0"),
        (
            "stages.0.schedule.name=wsd",
            "stages.0.schedule.decay_tokens is missing; "
            "set it in the recipe or with --set stages.0.schedule.decay_tokens=VALUE",
        ),
        (
            "stages.0.schedule.warmup_tokens=3e6",
            "stages.0.schedule warms up for 3000000 and decays for 0 tokens, "
            "which is more than the stage's 2000000",
        ),
        (
            "stages.0.seq_len=10000",
            "stages.0.seq_len = 10000 does not fit into a micro-batch of 8192 tokens; "
            "raise tokens_per_batch or lower micro_batches",
        ),
        (
            "stages.0.micro_batches=3",
            "stages.0.tokens_per_batch = 8192 is not a multiple of micro_batches = 3",
        ),
        ("stages.rl.tokens=1", "stages has no item 'rl' (known: 0 (pretrain), 1 (sft))"),
        ("stages.7.tokens=1", "stages has no item '7' (known: 0 (pretrain), 1 (sft))"),
    ],
)
def test_each_mistake_has_its_sentence(recipe: Path, flag: str, sentence: str) -> None:
    said = message(recipe, flag)
    # What a whole-table check finds is put down to the file that opened the table.
    assert said in (f"--set {flag}: {sentence}", f"{recipe}: {sentence}")


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("seed", "--set seed: expected KEY=VALUE, for example --set seed=1"),
        ("a..b=1", "--set a..b=1: expected KEY=VALUE, for example --set seed=1"),
        (
            "seed=[1",
            "--set seed=[1: '[1' is not a TOML value; numbers, true, \"text\" and [1, 2] are",
        ),
        (
            "seed=1\nname=2",
            "--set seed=1\nname=2: '1\\nname=2' is not a TOML value; numbers, true, \"text\" and [1, 2] are",
        ),
    ],
)
def test_each_broken_flag_has_its_sentence(recipe: Path, flag: str, sentence: str) -> None:
    assert message(recipe, flag) == sentence


def test_one_line_for_each_problem_with_its_own_origin(recipe: Path, tmp_path: Path) -> None:
    change = overlay(tmp_path, "seed = 'one'")
    with pytest.raises(ConfigError) as caught:
        load_recipe([recipe, change], ["dtype=fp8", "tokenizer="])
    assert str(caught.value).splitlines() == [
        f"{change}: seed = 'one' should be a valid integer",
        "--set dtype=fp8: dtype = 'fp8' should be 'float32' or 'bfloat16'",
        "--set tokenizer=: tokenizer is missing; set it in the recipe or with --set tokenizer=VALUE",
    ]


def test_a_shape_and_a_tokenizer_have_exactly_one_origin(recipe: Path) -> None:
    assert message(recipe, "model.config=c.json") == (
        f"{recipe}: model has both preset and config; give one of them"
    )
    assert message(recipe, "model.preset=") == (
        f"{recipe}: model has neither preset nor config; give one of them"
    )
    assert message(recipe, "tokenizer.path=t") == (
        f"{recipe}: tokenizer has both vocab_size and path; give one of them"
    )
    assert message(recipe, "tokenizer.vocab_size=") == (
        f"{recipe}: tokenizer has neither vocab_size nor path; give one of them"
    )


def test_two_stages_of_one_name_need_an_index(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + '[[stages]]\nstage = "sft"\ntokens = 1\n')
    assert message(recipe, "stages.sft.tokens=2") == (
        "--set stages.sft.tokens=2: stages has 2 items called 'sft'; use an index"
    )
    assert load(recipe, "stages.2.tokens=3").stages[2].tokens == 3


def test_broken_toml_names_file_and_line(recipe: Path) -> None:
    recipe.write_text('name = "x"\nseed = = 1\n')
    said = message(recipe)
    assert said.startswith(f"{recipe}: not valid TOML: ")
    assert "line 2" in said
    recipe.write_bytes(b"name = '\xff'")
    assert message(recipe).startswith(f"{recipe}: not valid TOML: ")


def test_recipes_go_by_name_and_a_miss_names_the_known_ones(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.parent / "recipes"
    folder.mkdir()
    (folder / "small.toml").write_text(RECIPE)
    recipe.unlink()
    monkeypatch.chdir(folder.parent)
    assert load_recipe(["small"]) == load_recipe(["small.toml"]) == load_recipe(["recipes/small.toml"])
    with pytest.raises(ConfigError) as caught:
        load_recipe(["smal"])
    said = str(caught.value)
    assert said.startswith("there is no recipe 'smal'; did you mean small? (known: ")
    assert " small" in said
    assert said.endswith("; or give the path of a .toml file)")
    with pytest.raises(ConfigError, match=r"no recipe 'elsewhere/small\.toml'; did you mean small"):
        load_recipe(["elsewhere/small.toml"])


def test_settings_are_frozen_and_python_use_is_checked_alike(recipe: Path) -> None:
    config = load(recipe)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="unknown_key"):
        PretrainConfig(tokens=1, lerning_rate=1)  # type: ignore[call-arg]


def test_source_weights_are_the_stages_or_the_sources_own(recipe: Path) -> None:
    config = load(recipe, "stages.sft.sources={docs = 3}")
    assert config.source_weights(config.stages[0]) == {"docs": 1.0, "held back": 0.5}
    assert config.source_weights(config.stages[1]) == {"docs": 3.0}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("balance_weight", 0.1),
        ("router_bias_update_rate", 0.001),
        ("detach_trunk", False),
        ("detach_head", False),
        ("mtp_weight", 0.0),
    ],
)
def test_the_mtp_stage_refuses_what_would_do_nothing_or_move_its_trunk(name: str, value: float) -> None:
    with pytest.raises(ValidationError, match=f"(?s)losses.{name}.*in the mtp stage"):
        MTPConfig(tokens=1, losses={name: value})  # type: ignore[arg-type]
