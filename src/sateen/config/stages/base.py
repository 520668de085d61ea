"""What every training stage has."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from sateen.config.base import Config, Count, NonNegative, Positive, problem
from sateen.config.optim import (
    AdamWConfig,
    ConstantSchedule,
    LossesConfig,
    OptimizerConfig,
    ScheduleConfig,
    WSDSchedule,
)


class StageConfig(Config):
    """What every training stage has; defaults marked ours are starting points for small models.

    Attributes:
        stage: which stage this is, a key of `STAGES`.
        name: the stage's own name; its final model stays in the run folder as `stages/NAME`.
        start_from: name of the earlier stage whose model this one begins with; the stage before it if None.
        tokens: budget, counted over all sources.
        seq_len: longest sequence, in tokens (source: ours).
        tokens_per_batch: tokens of one optimizer step (source: ours).
        micro_batches: parts a batch is split into to save memory; changes no result beyond rounding.
        sources: data source -> weight; all sources with their own weights when empty.
        optimizer, schedule, losses: see those classes.
        checkpoint_every_tokens: tokens between checkpoints; 0 for one at the end.
        eval_every_tokens: tokens between evaluations on held-out text; 0 for one at the end.
        keep_checkpoints: newest checkpoints that stay on disk.
        compile: run the model through torch.compile.
        activation_checkpointing: keep only the inputs of layers and MTP heads for the backward pass, which
            computes the rest again: less memory, more time, the same numbers. Not together with `compile`.
    """

    choice: ClassVar[str | None] = "stage"
    stage: str
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")] | None = None
    start_from: str | None = None
    tokens: Positive
    seq_len: Positive = 512
    tokens_per_batch: Positive = 8192
    micro_batches: Positive = 1
    sources: dict[str, NonNegative] = Field(default_factory=dict)
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = ConstantSchedule()
    losses: LossesConfig = LossesConfig()
    checkpoint_every_tokens: Count = 0
    eval_every_tokens: Count = 0
    keep_checkpoints: Positive = 2
    compile: bool = False
    activation_checkpointing: bool = False

    @property
    def label(self) -> str:
        """What people see: its name, or which stage it is."""
        return self.name or self.stage

    @property
    def tokens_per_micro_batch(self) -> int:
        return self.tokens_per_batch // self.micro_batches

    @model_validator(mode="after")
    def _fits(self) -> StageConfig:
        if self.tokens_per_batch % self.micro_batches:
            raise problem(
                f"= {self.tokens_per_batch} is not a multiple of micro_batches = {self.micro_batches}",
                "tokens_per_batch",
            )
        if self.tokens_per_micro_batch < self.seq_len:
            raise problem(
                f"= {self.seq_len} does not fit into a micro-batch of {self.tokens_per_micro_batch} tokens; "
                "raise tokens_per_batch or lower micro_batches",
                "seq_len",
            )
        if self.activation_checkpointing and self.compile:
            raise problem(
                "= true does not go with compile = true, which would compile each layer twice over; "
                "set one of them to false",
                "activation_checkpointing",
            )
        decay = self.schedule.decay_tokens if isinstance(self.schedule, WSDSchedule) else 0
        if self.schedule.warmup_tokens + decay > self.tokens:
            raise problem(
                f"warms up for {self.schedule.warmup_tokens} and decays for {decay} tokens, "
                f"which is more than the stage's {self.tokens}",
                "schedule",
            )
        return self
