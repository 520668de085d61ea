"""Whole stages on a tiny run: bit-exact resume, kill, Ctrl-C, and the order of stages."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sateen.checkpoint import hf
from sateen.checkpoint.state import latest_checkpoint
from sateen.config import RunConfig, Silent, StageContext, resolved_toml, stage_function
from sateen.errors import ConfigError
from sateen.train.metrics import read_metrics
from sateen.train.mtp import copy_first_head

TIMES = ("tokens_per_s", "step_s")
WORDS = ["warp", "weft", "loom", "thread", "satin", "weave", "silk", "cotton", "shuttle", "reed", "heddle"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A hundred small documents of random words."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for i in range(100):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=60)))
    return folder


def recipe(texts: Path, *stages: dict, heads: int = 1) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "seed": 3,
            "threads": 1,
            "model": {
                "preset": "mimo-v2-flash-tiny",
                "overrides": {"num_nextn_predict_layers": heads, "vocab_size": 300},
            },
            "tokenizer": {"vocab_size": 300},
            "data": {
                "text": {"kind": "text_dir", "path": str(texts)},
                "sums": {"kind": "chat_task", "task": "sums", "num_examples": 50, "weight": 0.0},
            },
            "stages": list(stages),
        }
    )


def pretrain_stage(steps: int, **changes) -> dict:
    stage = {
        "stage": "pretrain",
        "tokens": steps * 128,
        "seq_len": 32,
        "tokens_per_batch": 128,
        "micro_batches": 2,
    }
    return stage | {"schedule": {"name": "cosine", "warmup_tokens": 256}} | changes


def run(config: RunConfig, folder: Path, index: int = 0, progress=None) -> None:
    folder.mkdir(exist_ok=True)
    stage = config.stages[index]
    stage_function(stage.stage)(StageContext(config, stage, index, folder, progress or Silent()))


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder)]


def assert_same_run(one: Path, two: Path) -> None:
    """Parameters, buffers, optimizer state, random state and metrics, bit for bit."""
    a, b = latest_checkpoint(one), latest_checkpoint(two)
    assert a.progress == b.progress
    x, y = a.tensors(), b.tensors()
    assert x.keys() == y.keys()
    assert [n for n in x if not torch.equal(x[n], y[n])] == []
    p, q = hf.load(a.hf).state_dict(), hf.load(b.hf).state_dict()
    assert [n for n in p if not torch.equal(p[n], q[n])] == []
    assert untimed(one) == untimed(two)


class Interrupt(Silent):
    """Presses Ctrl-C, or sends another signal, after a number of updates."""

    def __init__(self, after: int, number: int = signal.SIGINT):
        self.left, self.number = after, number

    def update(self, done: int, **values: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


@pytest.fixture(scope="module")
def unbroken(texts, tmp_path_factory) -> Path:
    """Twelve steps in one go."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(recipe(texts, pretrain_stage(12)), folder)
    return folder


def test_metrics_lines(unbroken):
    lines = read_metrics(unbroken)
    assert [m["step"] for m in lines] == list(range(1, 13))
    assert [m["tokens"] for m in lines] == [128 * i for i in range(1, 13)]
    first, last = lines[0], lines[-1]
    assert first["lr"] == pytest.approx(0.02 * 64 / 256)  # the middle of the first step's 128 tokens
    assert first["loss"] == pytest.approx(
        first["loss_main"] + 0.3 * first["loss_mtp"] + 1e-5 * first["loss_balance"], rel=1e-5
    )
    assert last["loss_main"] < first["loss_main"]
    assert "heldout_bits_per_byte" in last
    assert "heldout_bits_per_byte" not in first
    assert 0 < last["heldout_bits_per_byte"] < 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_resumed_run_equals_the_unbroken_one(number, unbroken, texts, tmp_path):
    config = recipe(texts, pretrain_stage(12))
    before = signal.getsignal(number)  # a background shell starts its processes with SIGINT ignored
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", progress=Interrupt(5, number))
    assert latest_checkpoint(tmp_path / "run").step == 5
    assert signal.getsignal(number) is before
    run(config, tmp_path / "run")
    assert_same_run(unbroken, tmp_path / "run")


def test_ctrl_c_in_the_last_step_keeps_the_next_stage_from_beginning(unbroken, texts, tmp_path):
    config = recipe(texts, pretrain_stage(12))
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", progress=Interrupt(12))
    assert_same_run(unbroken, tmp_path / "run")


def test_periodic_checkpoints_change_nothing_and_a_finished_stage_returns_at_once(unbroken, texts, tmp_path):
    config = recipe(texts, pretrain_stage(12, checkpoint_every_tokens=512, keep_checkpoints=3))
    run(config, tmp_path / "run")
    names = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_12", "step_4", "step_8"]
    assert untimed(unbroken) == untimed(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


KILLED = """
import sys
from pathlib import Path
from sateen.config import Silent, StageContext, load_recipe, stage_function
config = load_recipe([sys.argv[1]])
stage_function("pretrain")(StageContext(config, config.stages[0], 0, Path(sys.argv[2]), Silent()))
"""


def test_a_run_killed_at_any_moment_resumes_to_the_unbroken_result(unbroken, texts, tmp_path):
    """Checkpoints at every step, so that the kill falls into stepping or saving; its place is not chosen."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = recipe(texts, pretrain_stage(12, checkpoint_every_tokens=128))
    (tmp_path / "recipe.toml").write_text(resolved_toml(config))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "recipe.toml"), str(folder)])
    while process.poll() is None and len(read_metrics(folder)) < 4:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(read_metrics(folder)) >= 4
    run(config, folder)
    a, b = latest_checkpoint(unbroken), latest_checkpoint(folder)
    x, y = a.tensors(), b.tensors()
    assert [n for n in x if not torch.equal(x[n], y[n])] == []
    p, q = hf.load(a.hf).state_dict(), hf.load(b.hf).state_dict()
    assert [n for n in p if not torch.equal(p[n], q[n])] == []
    assert untimed(unbroken) == untimed(folder)


def test_stages_follow_each_other(texts, tmp_path):
    """Pretrain, then chats only, then two more MTP heads behind a frozen trunk."""
    small = {"tokens": 3 * 128, "seq_len": 64, "tokens_per_batch": 128}
    config = recipe(
        texts,
        pretrain_stage(2),
        {"stage": "sft", "sources": {"sums": 1.0}, **small},
        {"stage": "mtp", "num_heads": 3, "train": "new", **small},
    )
    folder = tmp_path / "run"
    states = []
    for index in range(3):
        run(config, folder, index)
        states.append(hf.load(latest_checkpoint(folder).hf).state_dict())
    lines = read_metrics(folder)
    assert [m["stage"] for m in lines] == ["pretrain"] * 2 + ["sft"] * 3 + ["mtp"] * 3
    assert [m["step"] for m in lines] == list(range(1, 9))
    after_sft, after_mtp = states[1], states[2]
    assert any(not torch.equal(states[0][n], after_sft[n]) for n in after_sft)
    assert [n for n in after_sft if not torch.equal(after_sft[n], after_mtp[n])] == []
    second = "model.mtp.layers.1.eh_proj.weight"
    assert not torch.equal(after_mtp[second], after_mtp[second.replace("1", "0")])
    assert {"loss_mtp_0", "loss_mtp_1", "loss_mtp_2"} <= lines[-1].keys()
    assert json.loads((folder / "model" / "config.json").read_text())["num_nextn_predict_layers"] == 3
    assert (folder / "model" / "tokenizer.json").is_file()


def test_copied_heads_equal_the_first(texts):
    model = hf.load_model("mimo-v2-flash-tiny").float()
    grown = copy_first_head(model, 5)
    heads = [h.state_dict() for h in grown.mtp_heads()]
    old = [h.state_dict() for h in model.mtp_heads()]
    assert len(heads) == 5
    for name, tensor in heads[0].items():
        assert torch.equal(heads[1][name], old[1][name])
        assert torch.equal(heads[3][name], tensor)
        assert torch.equal(heads[4][name], tensor)
    with pytest.raises(ConfigError, match="3 MTP heads, num_heads is 2"):
        copy_first_head(model, 2)


def test_a_second_stage_cannot_be_resumed_with_other_data(texts, tmp_path):
    config = recipe(texts, pretrain_stage(4))
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", progress=Interrupt(after=1))
    other = recipe(texts, pretrain_stage(4, seq_len=16))
    with pytest.raises(Exception, match="seq_len"):
        run(other, tmp_path / "run")


def test_training_only_new_heads_needs_a_model_with_one(texts, tmp_path):
    """With two, nothing would say which of the old ones stays frozen."""
    small = {"tokens": 2 * 128, "seq_len": 64, "tokens_per_batch": 128}
    config = recipe(
        texts, pretrain_stage(2), {"stage": "mtp", "num_heads": 3, "train": "new", **small}, heads=2
    )
    run(config, tmp_path / "run", 0)
    with pytest.raises(ConfigError, match=r"already has 2 heads; use train = \"all\""):
        run(config, tmp_path / "run", 1)
