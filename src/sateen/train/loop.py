"""The loop that every stage shares: model, resume, steps, evaluation, checkpoints, Ctrl-C.

A `Subject` says what is trained: how its model begins and is stored, where batches come from and how held-out
data is measured. Everything a run leaves in its folder is written here. A stage that is already finished
returns at once, and a resumed one repeats an unbroken run bit for bit at equal thread count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sateen.checkpoint.state import Checkpoint, keep_model, kept_model, latest_checkpoint, save_checkpoint
from sateen.config import StageContext
from sateen.train.interrupt import interruptible
from sateen.train.metrics import LoadTrace, MetricsWriter
from sateen.train.objective import Objective
from sateen.train.optim import Optimizer, build_optimizer
from sateen.train.schedule import build_schedule
from sateen.train.step import TrainStep


class Batch(Protocol):
    """What the loop asks of a batch; everything else is between its source and its objective.

    Attributes:
        num_tokens: what the batch takes from the stage's budget.
    """

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: str) -> Batch: ...


class BatchSource(Protocol):
    """Where a stage's batches come from: files for most, an engine's rollouts for some."""

    def __next__(self) -> Any:
        """The next `Batch`."""
        ...

    def metrics(self) -> dict[str, float]:
        """Values about the newest batches, for metrics.jsonl."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Subject(Protocol):
    """What a stage trains."""

    def start(self, origin: Path | None) -> nn.Module:
        """The model where the stage begins: from an earlier stage's model directory, or fresh without one."""
        ...

    def resume(self, folder: Path) -> nn.Module:
        """The model of a checkpoint that this stage wrote."""
        ...

    def objective(self, model: Any) -> Objective:
        """What is minimised."""
        ...

    def batches(self, model: Any) -> BatchSource:
        """Where batches come from."""
        ...

    def write(self, model: Any, folder: Path) -> None:
        """Fills an empty directory with the model's files."""
        ...

    def describe(self, values: dict[str, Any], batches: Sequence[Any]) -> dict[str, float]:
        """Further values of a step for metrics.jsonl, from its losses and batches."""
        ...

    def heldout(self, model: Any) -> dict[str, float]:
        """Measurements on data that is never trained on; empty where there is none."""
        ...


def train_stage(context: StageContext, subject: Subject) -> None:
    """Runs or resumes a stage to its token budget.

    Args:
        context: what the stage runner hands to every stage.
        subject: what is trained.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the running step is finished and saved; a second
            Ctrl-C at once.
        TrainingError: a loss is not finite.
        CheckpointError: a checkpoint cannot be written or read.
    """
    stage = context.stage
    saved = latest_checkpoint(context.folder)
    if context.config.threads:
        torch.set_num_threads(context.config.threads)
    if saved is not None and saved.progress["stage_index"] == context.stage_index:
        loop = _Loop(context, subject, subject.resume(saved.hf), saved)
        loop.load(saved)
    else:
        torch.manual_seed(stage_seed(context))
        if stage.start_from is not None:
            origin: Path | None = kept_model(context.folder, stage.start_from)
        else:
            origin = saved.hf if saved is not None else None
        loop = _Loop(context, subject, subject.start(origin), saved)
    loop.run()


def is_finished(context: StageContext) -> bool:
    """Whether the stage reached its budget in an earlier process; its model is kept where it has a name."""
    saved = latest_checkpoint(context.folder)
    if saved is None:
        return False
    at = int(saved.progress["stage_index"])
    done = at > context.stage_index or (at == context.stage_index and bool(saved.progress["is_finished"]))
    if done and at == context.stage_index and context.stage.name is not None:
        keep_model(context.folder, context.stage.name, saved)
    return done


def stage_seed(context: StageContext) -> int:
    """The seed of a stage's data order and random numbers, another one for each stage of a run."""
    return context.config.seed + 1_000_003 * context.stage_index


class _Loop:
    def __init__(self, context: StageContext, subject: Subject, model: nn.Module, saved: Checkpoint | None):
        stage = context.stage
        self.context, self.stage, self.subject, self.model = context, stage, subject, model.train()
        self.loader = subject.batches(model)
        # After the batches: what must not learn is frozen by then.
        self.optimizer: Optimizer = build_optimizer(model, stage.optimizer)
        self.schedule = build_schedule(stage.schedule, stage.tokens)
        self.train_step = TrainStep(
            model,
            [(subject.objective(model), self.optimizer)],
            clip_norm=stage.optimizer.clip_norm,
            dtype=getattr(torch, context.config.dtype),
            router_bias_rate=stage.losses.router_bias_update_rate,
        )
        # Steps and tokens count over the whole run, stage_tokens over this stage.
        self.step = saved.step if saved else 0
        self.tokens = int(saved.progress["tokens"]) if saved else 0
        self.stage_tokens = 0
        self.next_checkpoint = stage.checkpoint_every_tokens or stage.tokens
        self.next_eval = stage.eval_every_tokens or stage.tokens

    def load(self, saved: Checkpoint) -> None:
        """Continues after the step at which `saved` was written."""
        tensors = saved.tensors()
        _set_rng(tensors)
        prefix = "optimizer."
        self.optimizer.load_state_tensors(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        self.loader.load_state_dict(saved.progress["loader"])
        self.stage_tokens = int(saved.progress["stage_tokens"])
        self.next_checkpoint = int(saved.progress["next_checkpoint"])
        self.next_eval = int(saved.progress["next_eval"])

    def run(self) -> None:
        """Steps to the token budget."""
        folder, progress = self.context.folder, self.context.progress
        self.trace = LoadTrace(folder, resume_step=self.step)
        progress.start(self.stage.label, self.stage.tokens, self.stage_tokens)
        try:
            with MetricsWriter(folder, resume_step=self.step) as writer, interruptible() as is_interrupted:
                while self.stage_tokens < self.stage.tokens:
                    values = self._one_step()
                    writer.write(self.step, values)
                    progress.update(
                        self.stage_tokens, loss=values["loss"], tokens_per_s=values["tokens_per_s"]
                    )
                    if is_interrupted() and self.stage_tokens < self.stage.tokens:
                        self._save()
                        progress.note(f"interrupted at step {self.step}, saved; the same command resumes")
                        raise KeyboardInterrupt
                    if self.stage_tokens >= min(self.next_checkpoint, self.stage.tokens):
                        while (
                            self.next_checkpoint <= self.stage_tokens and self.stage.checkpoint_every_tokens
                        ):
                            self.next_checkpoint += self.stage.checkpoint_every_tokens
                        self._save()
                if is_interrupted():  # during the last step: the stage is done, the next one must not begin
                    progress.note(f"interrupted at step {self.step}, the stage's last; saved")
                    raise KeyboardInterrupt
        finally:
            progress.stop()

    def _one_step(self) -> dict[str, Any]:
        began = time.perf_counter()
        stage, device = self.stage, self.context.config.device
        batches = [next(self.loader).to(device) for _ in range(stage.micro_batches)]
        # The rate at the middle of the step's tokens: the first step moves and the last one is not wasted.
        factor = self.schedule(self.stage_tokens + stage.tokens_per_batch / 2)
        result = self.train_step(batches, factor)
        self.step += 1
        num_tokens = sum(batch.num_tokens for batch in batches)
        self.tokens += num_tokens
        self.stage_tokens += num_tokens
        self.trace.add(self.step, result.expert_counts)
        step_s = time.perf_counter() - began
        values: dict[str, Any] = {
            "stage": stage.label,
            "tokens": self.tokens,
            **result.metrics,
            **self.loader.metrics(),
        }
        values |= self.subject.describe(values, batches)
        values["lr"] = self.optimizer.learning_rate * factor
        if self.stage_tokens >= min(self.next_eval, stage.tokens):
            while self.next_eval <= self.stage_tokens and stage.eval_every_tokens:
                self.next_eval += stage.eval_every_tokens
            values |= self.subject.heldout(self.model)
        return values | {
            "tokens_per_s": round(num_tokens / step_s, 1),
            "step_s": round(step_s, 4),
        }

    def _save(self) -> None:
        self.trace.save()
        tensors = {f"optimizer.{k}": v for k, v in self.optimizer.state_tensors().items()} | _get_rng()
        progress = {
            "stage": self.stage.stage,
            "stage_index": self.context.stage_index,
            "is_finished": self.stage_tokens >= self.stage.tokens,
            "tokens": self.tokens,
            "stage_tokens": self.stage_tokens,
            "next_checkpoint": self.next_checkpoint,
            "next_eval": self.next_eval,
            "loader": self.loader.state_dict(),
        }
        saved = save_checkpoint(
            self.context.folder,
            self.step,
            write_hf=lambda folder: self.subject.write(self.model, folder),
            tensors=tensors,
            progress=progress,
            keep=self.stage.keep_checkpoints,
        )
        if progress["is_finished"] and self.stage.name is not None:
            keep_model(self.context.folder, self.stage.name, saved)


def _get_rng() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
