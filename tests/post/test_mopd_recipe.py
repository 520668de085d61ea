"""The distillation recipe in small, with easy questions and tiny budgets: its stages, resume and table."""

import importlib.util
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch

from sateen.checkpoint import hf
from sateen.config import RunConfig, Silent, load_recipe
from sateen.data.tasks import task_class
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.run import run_recipe
from sateen.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
DOMAINS = {"sums": {"num_digits": 1}, "sort": {"num_digits": 2}, "reverse": {"num_digits": 2}}
TIMES = ("tokens_per_s", "step_s")


def recipe(texts: Path) -> RunConfig:
    """`recipes/mopd-tiny.toml` with fewer tokens and shorter questions."""
    sets = [f'data.docs={{kind="text_dir",path="{texts}"}}', "tokenizer.vocab_size=280"]
    sets += ["stages.start.tokens=40_000", "stages.start.tokens_per_batch=512"]
    sets += ["stages.start.schedule.warmup_tokens=1_000"]
    sets += [f"data.{name}.parameters.num_digits={p['num_digits']}" for name, p in DOMAINS.items()]
    sets += [f"data.{name}.num_examples=100" for name in DOMAINS]
    for name in DOMAINS:
        sets += [f"stages.{name}.{key}" for key in ("tokens=2_500", "group_size=4", "prompts_per_batch=6")]
        sets += [f"stages.{name}.optimizer.learning_rate=0.01"]
    sets += [f"stages.student.{key}" for key in ("tokens=20_000", "prompts_per_batch=30", "max_groups=30")]
    return load_recipe([ROOT / "recipes" / "mopd-tiny.toml"], sets)


class Stop(Silent):
    """Ends the run: without a word before a stage, or with Ctrl-C after some updates of it."""

    def __init__(self, label: str, after: int = 0):
        self.label, self.left, self.is_on = label, after, False

    def start(self, what: str, total: int, done: int = 0) -> None:
        self.is_on = what == self.label
        if self.is_on and not self.left:
            raise ZeroDivisionError

    def update(self, done: int, **values: float) -> None:
        if self.is_on:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"sort and reverse, user and assistant: a row of words {i}\n" * 3)
    return folder


@pytest.fixture(scope="module")
def taught(texts, tmp_path_factory) -> Path:
    """A run whose teachers are ready and whose student has not begun."""
    folder = tmp_path_factory.mktemp("taught") / "run"
    with pytest.raises(ZeroDivisionError):
        run_recipe(recipe(texts), folder, Stop("student"))
    return folder


@pytest.fixture(scope="module")
def finished(taught, texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    shutil.copytree(taught, folder, symlinks=True)
    run_recipe(recipe(texts), folder, Silent())
    return folder


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def test_each_teacher_is_scored_in_its_own_domain(finished):
    lines = [line for line in read_metrics(finished) if line["stage"] == "student"]
    assert len(lines) >= 6
    for name in DOMAINS:
        assert all(f"reverse_kl_{name}" in line and f"reward_mean_{name}" in line for line in lines)
    stages = [line["stage"] for line in read_metrics(finished)]
    assert list(dict.fromkeys(stages)) == ["start", "sums", "sort", "reverse", "student"]


def test_the_student_moves_towards_its_teachers(finished):
    before, after = (
        sum(divergence(finished, model, name) for name in DOMAINS) for model in ("start", "student")
    )
    assert after < 0.8 * before, (before, after)


def divergence(run: Path, model: str, domain: str) -> float:
    """KL(model || the domain's teacher) per token, exact over the vocabulary, along answers of the model."""
    llm = LLM(run / "stages" / model, draft="none", max_num_seqs=64)
    teacher = hf.load_model(run / "stages" / domain)
    rng = random.Random(7)
    task = task_class(domain)(is_heldout=True, **DOMAINS[domain])
    asked = [[{"role": "user", "content": task.sample(rng).prompt}] for _ in range(40)]
    prompts = [llm.tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in asked]
    params = [SamplingParams(temperature=1.0, max_tokens=8, seed=i) for i in range(len(prompts))]
    total = count = 0
    for output in llm.generate(prompts, params):
        ids = torch.tensor([output.prompt_token_ids + output.outputs[0].token_ids])
        with torch.no_grad():
            p, q = (m(ids).logits[0].log_softmax(-1) for m in (llm.model, teacher))
        rows = slice(len(output.prompt_token_ids) - 1, ids.shape[1] - 1)
        total += float((p.exp() * (p - q)).sum(-1)[rows].sum())
        count += rows.stop - rows.start
    return total / count


def test_an_interrupted_distillation_equals_the_unbroken_one(taught, finished, texts, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(taught, folder, symlinks=True)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(texts), folder, Stop("student", after=3))
    run_recipe(recipe(texts), folder, Silent())
    a, b = (hf.load(run / "stages" / "student").state_dict() for run in (finished, folder))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert untimed(finished) == untimed(folder)


def test_the_table_has_every_model_and_domain(finished):
    spec = importlib.util.spec_from_file_location("bench_mopd", ROOT / "benchmarks" / "mopd.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    found = bench.study(finished, num_examples=20, seed=1)
    labels = ["start", "teacher sums", "teacher sort", "teacher reverse", "student", "averaged teachers"]
    assert [row["model"] for row in found["rows"]] == labels
    for row in found["rows"]:
        assert list(row["domains"]) == list(DOMAINS)
        for cell in row["domains"].values():
            assert cell["accuracy"] * 20 == pytest.approx(round(cell["accuracy"] * 20))
            assert cell["standard_error"] ** 2 * 20 == pytest.approx(
                cell["accuracy"] * (1 - cell["accuracy"])
            )
    of = {row["model"]: row["domains"] for row in found["rows"]}
    for check in found["checks"]:
        mine = check["domain"]
        gain = 100 * (of[f"teacher {mine}"][mine]["accuracy"] - of["start"][mine]["accuracy"])
        loss = 100 * (of["student"][mine]["accuracy"] - of[f"teacher {mine}"][mine]["accuracy"])
        assert check["teacher_minus_start"] == pytest.approx(gain, abs=0.01)
        assert check["student_minus_teacher"] == pytest.approx(loss, abs=0.01)
        assert check["holds"] == (gain >= 20 and loss >= -5)
    assert [row["label"] for row in found["stages"]] == ["start", *DOMAINS, "student"]
    assert len("\n".join(bench.lines(found)).splitlines()) == 1 + 6 + 2 + 3
