"""The loop that all text stages share: data, model, resume, steps, evaluation, checkpoints, Ctrl-C.

A stage file names its algorithm and says what is trained; everything a run leaves in its folder is written
here. A stage that is already finished returns at once, and a resumed one repeats an unbroken run bit for bit
at equal thread count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sateen.checkpoint import hf
from sateen.checkpoint.state import Checkpoint, latest_checkpoint, save_checkpoint
from sateen.config import StageContext
from sateen.data.loader import Loader
from sateen.data.packing import IGNORE, PackedBatch
from sateen.models.decoder import Decoder
from sateen.nn.mlp import SwiGLU
from sateen.nn.norm import RMSNorm
from sateen.train.heldout import bits_per_byte
from sateen.train.interrupt import interruptible
from sateen.train.metrics import LoadTrace, MetricsWriter
from sateen.train.objective import TokenObjective
from sateen.train.optim import Optimizer, build_optimizer
from sateen.train.prepare import RunData, new_model, prepare
from sateen.train.schedule import build_schedule
from sateen.train.step import TrainStep

MakeObjective = Callable[[Decoder], TokenObjective]


class BatchSource(Protocol):
    """Where a stage's batches come from: token files for most, an engine's rollouts for some."""

    def __next__(self) -> PackedBatch: ...

    def metrics(self) -> dict[str, float]:
        """Values about the newest batches, for metrics.jsonl."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


MakeBatches = Callable[[Decoder, RunData], BatchSource]


def train_text(
    context: StageContext,
    make_objective: MakeObjective,
    *,
    adapt: Callable[[Decoder], Decoder] | None = None,
    freeze: Callable[[Decoder], None] | None = None,
    make_batches: MakeBatches | None = None,
) -> None:
    """Runs or resumes a text stage to its token budget.

    Args:
        context: what the stage runner hands to every stage.
        make_objective: the stage's objective for the model it trains.
        adapt: changes the model once, where the stage begins; a resumed stage finds it changed.
        freeze: switches gradients off for what the stage does not train.
        make_batches: where batches come from; the stage's token files when None.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once the running step is finished and saved; a second
            Ctrl-C at once.
        TrainingError: a loss is not finite.
        CheckpointError: a checkpoint cannot be written or read.
    """
    saved = latest_checkpoint(context.folder)
    if saved is not None and _is_finished(saved, context.stage_index):
        return
    if context.config.threads:
        torch.set_num_threads(context.config.threads)
    data = prepare(context)
    resumes = saved is not None and saved.progress["stage_index"] == context.stage_index
    if not resumes:
        torch.manual_seed(stage_seed(context))
    if saved is None:
        model = new_model(context, data.tokenizer)
    else:
        model = hf.load(saved.hf, dtype=torch.float32, device=context.config.device)
    if adapt is not None and not resumes:
        model = adapt(model)
    if freeze is not None:
        freeze(model)
    batches = _loader(context, data) if make_batches is None else make_batches(model, data)
    loop = _Loop(context, model.train(), data, make_objective(model), batches, saved)
    if resumes:
        assert saved is not None
        loop.load(saved)
    loop.run()


def stage_seed(context: StageContext) -> int:
    """The seed of a stage's data order and random numbers, another one for each stage of a run."""
    return context.config.seed + 1_000_003 * context.stage_index


def _loader(context: StageContext, data: RunData) -> BatchSource:
    """The mixture of the stage's token files."""
    return Loader(
        data.sources,
        tokens_per_batch=context.stage.tokens_per_micro_batch,
        seq_len=context.stage.seq_len,
        seed=stage_seed(context),
        pad_id=data.tokenizer.eos_id,
    )


def compile_pieces(model: Decoder) -> None:
    """Runs norms and dense MLPs through torch.compile from their next call on.

    Whole layers would compile anew for every batch: attention and experts take shapes from sequence lengths
    and loads, which differ from batch to batch.
    """
    for module in model.modules():
        if isinstance(module, RMSNorm | SwiGLU):
            module.compile()


def _is_finished(saved: Checkpoint, stage_index: int) -> bool:
    at = int(saved.progress["stage_index"])
    return at > stage_index or (at == stage_index and bool(saved.progress["is_finished"]))


class _Loop:
    def __init__(
        self,
        context: StageContext,
        model: Decoder,
        data: RunData,
        objective: TokenObjective,
        batches: BatchSource,
        saved: Checkpoint | None,
    ):
        config, stage = context.config, context.stage
        self.context, self.stage, self.model, self.data = context, stage, model, data
        self.optimizer: Optimizer = build_optimizer(model, stage.optimizer)
        self.schedule = build_schedule(stage.schedule, stage.tokens)
        self.dtype = getattr(torch, config.dtype)
        self.train_step = TrainStep(
            model,
            [(objective, self.optimizer)],
            clip_norm=stage.optimizer.clip_norm,
            dtype=self.dtype,
            router_bias_rate=stage.losses.router_bias_update_rate,
        )
        if stage.compile:
            compile_pieces(model)
        self.loader = batches
        self.token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64)
        self.token_bytes[: data.tokenizer.vocab_size] = torch.from_numpy(data.tokenizer.token_bytes)
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
        progress.start(self.stage.stage, self.stage.tokens, self.stage_tokens)
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
            "stage": stage.stage,
            "tokens": self.tokens,
            **result.metrics,
            **self.loader.metrics(),
        }
        if "loss_main" in values:
            values["bits_per_byte"] = self._bits_per_byte(values["loss_main"], batches)
        values["lr"] = self.optimizer.learning_rate * factor
        if self.data.heldout and self.stage_tokens >= min(self.next_eval, stage.tokens):
            while self.next_eval <= self.stage_tokens and stage.eval_every_tokens:
                self.next_eval += stage.eval_every_tokens
            values["heldout_bits_per_byte"] = self._heldout()
        return values | {
            "tokens_per_s": round(num_tokens / step_s, 1),
            "step_s": round(step_s, 4),
        }

    def _bits_per_byte(self, nats_per_token: float, batches: Sequence[PackedBatch]) -> float:
        """The step's cross-entropy per byte of the text its labels stand for."""
        labels = torch.cat([b.labels for b in batches]).cpu()
        labels = labels[labels != IGNORE]
        num_bytes = int(self.token_bytes[labels].sum())
        return nats_per_token * len(labels) / math.log(2) / max(num_bytes, 1)

    def _heldout(self) -> float:
        stage = self.stage
        return bits_per_byte(
            self.model,
            self.data.heldout,
            self.token_bytes,
            seq_len=stage.seq_len,
            tokens_per_batch=stage.tokens_per_micro_batch,
            dtype=self.dtype,
        )

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
        save_checkpoint(
            self.context.folder,
            self.step,
            write_hf=self._write_hf,
            tensors=tensors,
            progress=progress,
            keep=self.stage.keep_checkpoints,
        )

    def _write_hf(self, folder: Path) -> None:
        hf.write_files(self.model, folder, carry_from=self.data.folder)


def _get_rng() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng.cpu"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
