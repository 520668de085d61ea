"""The `mopd` stage on a tiny model: routing to teachers, the identity of equal teacher, and its refusals."""

import random
from pathlib import Path

import pytest
import torch

from sateen.checkpoint import hf
from sateen.config import RunConfig, Silent, StageContext, stage_function
from sateen.data.tasks import Sums
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import CheckpointError, ConfigError
from sateen.post.mopd import TeacherScores, teacher_folder
from sateen.post.rollouts.source import by_domain
from sateen.post.types import Rollout
from sateen.train.metrics import read_metrics

SFT = {
    "stage": "sft",
    "name": "start",
    "tokens": 8 * 512,
    "seq_len": 64,
    "tokens_per_batch": 512,
    "optimizer": {"name": "muon", "weight_decay": 0.0},
    "losses": {"mtp_weight": 0.0, "balance_weight": 0.0, "router_bias_update_rate": 0.0},
}


def recipe(folder: Path, seed: int = 0, **mopd) -> RunConfig:
    folder.mkdir(exist_ok=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            "the warp crosses the weft once in four threads of satin\n" * 3 + str(i)
        )
    task = {"kind": "chat_task", "task": "sums", "num_examples": 40}
    stage = {
        "stage": "mopd",
        "tokens": 800,
        "seq_len": 64,
        "max_tokens": 8,
        "group_size": 2,
        "prompts_per_batch": 4,
        "max_groups": 4,
        "outcome_weight": 0.0,
        "teachers": {"one": "start", "two": "start"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0},
    }
    return RunConfig.model_validate(
        {
            "name": "mopd-test",
            "seed": seed,
            "threads": 1,
            "model": {
                "preset": "mimo-v2-flash-tiny",
                "overrides": {"num_nextn_predict_layers": 0, "vocab_size": 280, "moe_layer_freq": [0] * 6},
            },
            "tokenizer": {"vocab_size": 275},
            "data": {
                "text": {"kind": "text_dir", "path": str(folder), "weight": 0.0},
                "one": task | {"parameters": {"num_digits": 1}},
                "two": task | {"parameters": {"num_digits": 2}},
            },
            "stages": [SFT, stage | mopd],
        }
    )


def run(config: RunConfig, folder: Path, *stages: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in stages:
        stage = config.stages[index]
        stage_function(stage.stage)(StageContext(config, stage, index, folder, Silent()))


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, Path]:
    """Two SFT models of one tokenizer: the student's start and a foreign teacher."""
    root = tmp_path_factory.mktemp("mopd")
    for name, seed in (("student", 0), ("teacher", 1)):
        run(recipe(root / "texts", seed), root / name, 0)
    return {"texts": root / "texts", "student": root / "student", "teacher": root / "teacher"}


def student(starts, tmp_path) -> Path:
    run(recipe(starts["texts"]), tmp_path / "run", 0)
    return tmp_path / "run"


def test_a_teacher_equal_to_the_student_changes_nothing(starts, tmp_path):
    folder = student(starts, tmp_path)
    before = hf.load(folder / "model").state_dict()
    teachers = {"one": str(starts["student"]), "two": str(starts["student"])}
    tokens = {"tokens": 1}  # a single update: after it, rounding would make student and teacher differ
    run(recipe(starts["texts"], teachers=teachers, **tokens), folder, 1)
    line = read_metrics(folder)[-1]
    assert abs(line["loss_policy"]) < 1e-4
    assert line["grad_norm"] < 1e-3
    after = hf.load(folder / "model").state_dict()
    assert before.keys() == after.keys()


def test_the_student_moves_towards_its_teacher(starts, tmp_path):
    folder = student(starts, tmp_path)
    teachers = {"one": str(starts["teacher"]), "two": str(starts["teacher"])}
    config = recipe(
        starts["texts"],
        teachers=teachers,
        tokens=12_000,
        optimizer={"name": "adamw", "learning_rate": 3e-4, "weight_decay": 0.0},
    )
    before = divergence(folder, starts["teacher"])
    run(config, folder, 1)
    after = divergence(folder, starts["teacher"])
    assert after < 0.7 * before, (before, after)


def divergence(student: Path, teacher: Path) -> float:
    """KL(student || teacher) per token, exact over the vocabulary, along answers that the student samples."""
    llm = LLM(student, max_num_seqs=16)
    rng = random.Random(7)
    tasks = [Sums(num_digits=1), Sums(num_digits=2)]
    asked = [[{"role": "user", "content": task.sample(rng).prompt}] for task in tasks for _ in range(16)]
    prompts = [llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in asked]
    params = [SamplingParams(temperature=1.0, max_tokens=8, seed=i) for i in range(len(prompts))]
    total = count = 0
    for output in llm.generate(prompts, params):
        ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0].log_softmax(-1) for m in (llm.model, hf.load_model(teacher)))
        rows = slice(len(output.prompt_token_ids) - 1, ids.shape[1] - 1)
        total += float((p.exp() * (p - q)).sum(-1)[rows].sum())
        count += rows.stop - rows.start
    return total / count


def test_each_rollout_is_scored_by_its_own_teacher(starts):
    engines = {"one": LLM(starts["student"]), "two": LLM(starts["teacher"])}
    rollouts = [
        Rollout([5, 6], [7, 8, 9], [0.0] * 3, domain="two"),
        Rollout([5], [6, 7], [0.0] * 2, domain="one"),
        Rollout([9, 9, 9], [4], [0.0], domain="two"),
    ]
    scored = TeacherScores(engines)(rollouts)
    for rollout, result in zip(rollouts, scored, strict=True):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
        with torch.no_grad():
            logprobs = engines[rollout.domain].model(ids).logits[0].log_softmax(-1)
        expected = [
            float(logprobs[len(rollout.prompt_ids) - 1 + i, token])
            for i, token in enumerate(rollout.completion_ids)
        ]
        assert result.teacher_logprobs == pytest.approx(expected, abs=1e-5)
        assert result.completion_ids == rollout.completion_ids


def test_a_word_means_the_earlier_stage_and_anything_else_a_path(starts, tmp_path):
    folder = student(starts, tmp_path)
    config = recipe(starts["texts"], teachers={"one": "start", "two": str(starts["teacher"])})
    context = StageContext(config, config.stages[1], 1, folder, Silent())
    assert teacher_folder(context, Path("start")) == folder / "stages" / "start"
    assert teacher_folder(context, starts["teacher"]) == starts["teacher"]
    (folder / "stages" / "start").rename(folder / "stages" / "elsewhere")
    with pytest.raises(CheckpointError, match=r"no stage left its model here \(there are: elsewhere\)"):
        run(config, folder, 1)


def test_metrics_speak_of_every_domain():
    """Means over tokens, not over answers; a domain without a teacher has no divergence."""
    rollouts = [
        Rollout(
            [1], [2, 3, 4], [-1.0, -2.0, -3.0], domain="a", reward=1.0, teacher_logprobs=[-2.0, -2.0, -2.0]
        ),
        Rollout([1], [2], [-1.0], domain="a", teacher_logprobs=[-4.0]),
        Rollout([1], [2], [-1.0], domain="b", reward=1.0),
    ]
    assert by_domain(rollouts) == {
        "reward_mean_a": 0.5,
        "reverse_kl_a": pytest.approx((1 + 0 - 1 + 3) / 4),
        "reward_mean_b": 1.0,
    }
    assert by_domain(rollouts[2:]) == {}


def test_a_teacher_of_another_tokenizer_is_refused(starts, tmp_path):
    other = tmp_path / "other"
    config = recipe(tmp_path / "texts")
    (tmp_path / "texts" / "more.txt").write_text("quite other words, zigzag and quilt " * 20)
    run(config, other, 0)
    config = recipe(starts["texts"], teachers={"one": str(other), "two": str(other)})
    with pytest.raises(ConfigError, match="teacher's tokenizer is not the student's"):
        run(config, tmp_path / "run", 1)
