"""The `rl` stage on a tiny model: it runs in the one loop, resumes bit for bit, refuses hopeless tasks."""

import json
import shutil

import pytest
import torch

from sateen.checkpoint import hf
from sateen.config import RunConfig, Silent, StageContext, stage_function
from sateen.engine.engine import LLM
from sateen.errors import ConfigError, RewardError
from sateen.nn.attention import hysparse
from sateen.nn.attention.replay import replayed_blocks
from sateen.train.metrics import read_metrics

RL = {
    "stage": "rl",
    "tokens": 2500,
    "seq_len": 64,
    "max_tokens": 12,
    "group_size": 4,
    "prompts_per_batch": 4,
    "updates_per_batch": 2,
    "max_groups": 6,
    "optimizer": {"name": "adamw", "learning_rate": 2e-4, "weight_decay": 0.0},
}
SFT = {
    "stage": "sft",
    "tokens": 40 * 512,
    "seq_len": 64,
    "tokens_per_batch": 512,
    "optimizer": {"name": "muon", "learning_rate": 0.02, "adamw_learning_rate": 0.01, "weight_decay": 0.0},
    "losses": {"mtp_weight": 0.0, "balance_weight": 0.0, "router_bias_update_rate": 0.0},
}


def recipe(folder, preset="mimo-v2-flash-tiny", shape=None, **rl) -> RunConfig:
    folder.mkdir(exist_ok=True)
    for i in range(30):
        (folder / f"{i}.txt").write_text(
            "the warp crosses the weft once in four threads of satin\n" * 3 + str(i)
        )
    shape = shape or {"num_nextn_predict_layers": 0, "vocab_size": 280, "moe_layer_freq": [0] * 6}
    return RunConfig.model_validate(
        {
            "name": "rl-test",
            "threads": 1,
            "model": {"preset": preset, "overrides": shape},
            "tokenizer": {"vocab_size": 275},
            "data": {
                "text": {"kind": "text_dir", "path": str(folder), "weight": 0.0},
                "sums": {
                    "kind": "chat_task",
                    "task": "sums",
                    "parameters": {"num_digits": 1},
                    "num_examples": 200,
                },
            },
            "stages": [SFT, RL | rl],
        }
    )


def run(config, folder, stages=(0, 1), progress=None):
    folder.mkdir(parents=True, exist_ok=True)
    for index in stages:
        stage = config.stages[index]
        stage_function(stage.stage)(StageContext(config, stage, index, folder, progress or Silent()))


class Interrupt(Silent):
    """Presses Ctrl-C after a number of updates."""

    def __init__(self, after: int):
        self.left = after

    def update(self, done, **values):
        self.left -= 1
        if self.left == 0:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    config = recipe(folder / "texts")
    run(config, folder / "run")
    return folder / "run"


def test_rollouts_are_measured_and_the_result_generates(unbroken):
    lines = [line for line in read_metrics(unbroken) if line["stage"] == "rl"]
    assert len(lines) >= 4
    assert all(0 < line["reward_mean"] < 1 for line in lines)
    assert all(line["rollouts"] >= 16 for line in lines)
    assert all(line["loss"] == pytest.approx(line["loss_policy"]) for line in lines)
    llm = LLM(unbroken, max_num_seqs=2)
    assert llm.generate(["3+4="])[0].outputs[0].token_ids


def test_an_interrupted_run_equals_the_unbroken_one(unbroken, tmp_path):
    """Interrupted between the two updates of one set of rollouts, so pending rollouts must survive too."""
    config = recipe(unbroken.parent / "texts")
    run(config, tmp_path / "run", stages=(0,))
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", stages=(1,), progress=Interrupt(after=3))
    state = json.loads(next((tmp_path / "run" / "checkpoints").glob("step_43/meta.json")).read_text())
    assert len(state["progress"]["loader"]["pending"]) == 1
    run(config, tmp_path / "run", stages=(1,))
    a, b = (hf.load(folder / "model").state_dict() for folder in (unbroken, tmp_path / "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_chosen_blocks_are_replayed_also_after_an_interruption(tmp_path, monkeypatch):
    """HySparse2 with a budget below its contexts; lists of pending rollouts come back from the checkpoint."""
    shape = {"vocab_size": 280, "n_routed_experts": 0, "intermediate_size": 64}
    shape |= {"sparse_topk_tokens": 4, "sliding_window": 4}
    config = recipe(tmp_path / "texts", "hysparse2-tiny", shape)
    run(config, tmp_path / "unbroken", stages=(0,))
    for name in ("broken", "off"):
        shutil.copytree(tmp_path / "unbroken", tmp_path / name, symlinks=True)
    seen = []
    monkeypatch.setattr(
        hysparse,
        "replayed_blocks",
        lambda chosen, forced: seen.append(forced) or replayed_blocks(chosen, forced),
    )
    run(config, tmp_path / "unbroken", stages=(1,))
    replayed = [forced for forced in seen if forced is not None]
    assert len(replayed) > 4
    assert all(lists.shape[0] == 1 and lists.shape[2] == 4 + 4 for lists in replayed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken", stages=(1,), progress=Interrupt(after=3))
    run(config, tmp_path / "broken", stages=(1,))
    a, b = (hf.load(tmp_path / name / "model").state_dict() for name in ("unbroken", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    seen.clear()
    off = recipe(tmp_path / "texts", "hysparse2-tiny", shape, replay_selections=False, tokens=500)
    run(off, tmp_path / "off", stages=(1,))
    assert seen
    assert all(forced is None for forced in seen)


def test_tasks_that_no_answer_solves_are_refused(tmp_path):
    config = recipe(tmp_path / "texts", prompts_per_batch=2, updates_per_batch=1)
    with pytest.raises(RewardError, match="gave no group with both right and wrong answers"):
        run(config, tmp_path / "run", stages=(1,))


def test_prompts_must_be_tasks(tmp_path):
    config = recipe(tmp_path / "texts", sources={"text": 1.0})
    with pytest.raises(ConfigError, match="prompts come from task sources"):
        run(config, tmp_path / "run", stages=(1,))
