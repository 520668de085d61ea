"""What the text stages train: a decoder on token files or rollouts, measured in bits per byte.

A stage file names its algorithm and says what is trained; `train.loop` runs it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sateen.checkpoint import hf
from sateen.checkpoint.load import load
from sateen.config import StageContext
from sateen.data.loader import Loader
from sateen.data.packing import IGNORE, PackedBatch
from sateen.models.decoder import Decoder
from sateen.nn.mlp import SwiGLU
from sateen.nn.norm import RMSNorm
from sateen.train.activations import checkpoint_activations
from sateen.train.heldout import bits_per_byte
from sateen.train.loop import BatchSource, is_finished, stage_seed, train_stage
from sateen.train.objective import TokenObjective
from sateen.train.prepare import RunData, new_model, prepare

MakeObjective = Callable[[Decoder], TokenObjective]
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
        KeyboardInterrupt, TrainingError, CheckpointError: see `train.loop.train_stage`.
    """
    if not is_finished(context):
        train_stage(context, TextSubject(context, make_objective, adapt, freeze, make_batches))


class TextSubject:
    """A `Subject` of tokens; the arguments are those of `train_text`."""

    def __init__(
        self,
        context: StageContext,
        make_objective: MakeObjective,
        adapt: Callable[[Decoder], Decoder] | None,
        freeze: Callable[[Decoder], None] | None,
        make_batches: MakeBatches | None,
    ):
        self.context, self.make_objective, self.make_batches = context, make_objective, make_batches
        self.adapt, self.freeze = adapt, freeze
        self.data = prepare(context)

    def start(self, origin: Path | None) -> Decoder:
        model = new_model(self.context, self.data.tokenizer) if origin is None else self._load(origin)
        return self._ready(model if self.adapt is None else self.adapt(model))

    def resume(self, folder: Path) -> Decoder:
        return self._ready(self._load(folder))

    def _load(self, folder: Path) -> Decoder:
        return load(folder, dtype=torch.float32, device=self.context.config.device)

    def _ready(self, model: Decoder) -> Decoder:
        if self.freeze is not None:
            self.freeze(model)
        if self.context.stage.compile:
            compile_pieces(model)
        if self.context.stage.activation_checkpointing:
            checkpoint_activations(model, getattr(torch, self.context.config.dtype))
        return model

    def objective(self, model: Decoder) -> TokenObjective:
        return self.make_objective(model)

    def batches(self, model: Decoder) -> BatchSource:
        if self.make_batches is None:
            return _loader(self.context, self.data)
        return self.make_batches(model, self.data)

    def write(self, model: Decoder, folder: Path) -> None:
        hf.write_files(model, folder, carry_from=self.data.folder)

    @cached_property
    def token_bytes(self) -> Tensor:
        """int64 [V], bytes each token stands for."""
        return torch.from_numpy(self.data.tokenizer.token_bytes)

    def describe(self, values: dict[str, Any], batches: Sequence[PackedBatch]) -> dict[str, float]:
        """The step's cross-entropy per byte of the text its labels stand for."""
        if "loss_main" not in values:
            return {}
        labels = torch.cat([b.labels for b in batches]).cpu()
        labels = labels[labels != IGNORE]
        num_bytes = int(self.token_bytes[labels].sum())
        return {"bits_per_byte": values["loss_main"] * len(labels) / math.log(2) / max(num_bytes, 1)}

    def heldout(self, model: Decoder) -> dict[str, float]:
        """Bits per byte of the sources' held-out text."""
        stage = self.context.stage
        if not self.data.heldout:
            return {}
        token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64)
        token_bytes[: len(self.token_bytes)] = self.token_bytes
        bits = bits_per_byte(
            model,
            self.data.heldout,
            token_bytes,
            seq_len=stage.seq_len,
            tokens_per_batch=stage.tokens_per_micro_batch,
            dtype=getattr(torch, self.context.config.dtype),
        )
        return {"heldout_bits_per_byte": bits}


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
