"""The stages of a run: their settings, the table of their functions and what a function is given.

A new stage is a settings class and a row in `STAGES`. Its function lives in a room above and is imported when
the run reaches it; the runner knows no stage by name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

from pydantic import Field, model_validator

from sateen.config.base import Config, Count, FilePath, Fraction, NonNegative, Positive, Rate, one_of, problem
from sateen.config.data import ModelSource
from sateen.config.optim import (
    AdamWConfig,
    ConstantSchedule,
    CosineSchedule,
    LossesConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
    WSDSchedule,
)

if TYPE_CHECKING:
    from sateen.config.run import RunConfig


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
        decay = self.schedule.decay_tokens if isinstance(self.schedule, WSDSchedule) else 0
        if self.schedule.warmup_tokens + decay > self.tokens:
            raise problem(
                f"warms up for {self.schedule.warmup_tokens} and decays for {decay} tokens, "
                f"which is more than the stage's {self.tokens}",
                "schedule",
            )
        return self


class PretrainConfig(StageConfig):
    """Next-token training on text. Optimizer and schedule defaults are ours."""

    stage: Literal["pretrain"] = "pretrain"
    optimizer: OptimizerConfig = MuonConfig()
    schedule: ScheduleConfig = CosineSchedule()


class SFTConfig(StageConfig):
    """Supervised fine-tuning on conversations, with the loss on the assistant's tokens.

    Rate and schedule are those of MiMo-7B §3.1, router and balance settings those of MiMo-V2-Flash §4.2; the
    MTP weight is ours.
    """

    stage: Literal["sft"] = "sft"
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=3e-5)
    losses: LossesConfig = LossesConfig(mtp_weight=0.1, balance_weight=1e-6, router_bias_update_rate=1e-4)


class MTPConfig(StageConfig):
    """Adds MTP heads by copying the first and trains them; the trunk does not move.

    Rate and schedule are ours (MiMo-7B §2.2 and MiMo-V2-Flash §2.3.2 leave them open).

    Attributes:
        num_heads: heads afterwards.
        train: `new` trains the added heads only (MiMo-7B §2.2), `all` trains all of them jointly
            (MiMo-V2-Flash §2.3.2).
    """

    stage: Literal["mtp"] = "mtp"
    num_heads: Positive = 3
    train: Literal["all", "new"] = "all"
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=5e-5)
    schedule: ScheduleConfig = CosineSchedule()
    losses: LossesConfig = LossesConfig(
        mtp_weight=1.0,
        balance_weight=0.0,
        router_bias_update_rate=0.0,
        detach_trunk=True,
        detach_head=True,
    )

    @model_validator(mode="after")
    def _trains_heads_alone(self) -> MTPConfig:
        fixed = {"balance_weight": 0, "router_bias_update_rate": 0, "detach_trunk": True, "detach_head": True}
        for name, value in fixed.items():
            given = getattr(self.losses, name)
            if given != value:
                raise problem(
                    f"= {given} has no place in the mtp stage, whose trunk does not move; leave it out",
                    "losses",
                    name,
                )
        if not self.losses.mtp_weight:
            raise problem(
                "= 0 would train nothing in the mtp stage; give a weight above 0", "losses", "mtp_weight"
            )
        return self


class QATConfig(StageConfig):
    """Training through two-bit weights: masters in full precision, quantised in every forward.

    Rate, moments, decay and clipping are those of Fairy2i's published code (arXiv 2512.02901,
    PKULab1806/Fairy2i-W2). Its schedule falls in two steps to a thirtieth; one cosine to there is ours.

    Attributes:
        method: `fairy2i`, `ternary` (BitNet b1.58) and `int2` for real models, `phase` (Fairy±i) for
            complex ones.
        num_stages: of `fairy2i`, bits per weight of the linear layers (Fairy2i: 2); the other methods have 1.
        activations: `int8` per token, `float`, or `auto`: floats for `fairy2i`, int8 for the others, as in
            their papers.
        skip: dotted pieces of names of modules that stay as they are.
        model: directory of the model to start from, in place of what the stages before trained.
    """

    stage: Literal["qat"] = "qat"
    method: Literal["phase", "fairy2i", "ternary", "int2"] = "fairy2i"
    num_stages: Annotated[int, Field(ge=1, le=8)] = 2
    activations: Literal["auto", "int8", "float"] = "auto"
    skip: Annotated[tuple[str, ...], Field(strict=False)] = ("lm_head",)
    model: FilePath | None = None
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=3e-5, weight_decay=0.0, clip_norm=2.0)
    schedule: ScheduleConfig = CosineSchedule(final_fraction=1 / 30)


class RLConfig(StageConfig):
    """Reinforcement learning on verifiable tasks, as in MiMo-7B §3.3: GRPO without a reference model.

    `sources` are task sources; their examples are the prompts. The budget counts prompt and answer tokens of
    trained rollouts. What the report leaves open is marked ours.

    Attributes:
        group_size: answers per prompt (source: ours).
        prompts_per_batch: prompts whose groups make one update (source: ours, for small models).
        updates_per_batch: mini-batches that one set of rollouts is split into; 1 is on-policy, as in the 0530
            release (MiMo-7B §3.6).
        max_tokens: longest answer.
        temperature: of sampling (MiMo-7B §3.3.3).
        clip_low, clip_high: bounds of the ratio (source: ours, after DAPO).
        filter_metric: `acc` drops groups that are all right or all wrong, `reward` those of equal rewards.
        easy_probability: of drawing a prompt that was answered in full before (MiMo-7B §3.3.2).
        max_groups: groups in work at once (source: ours).
        replay_routing: train each token through the experts that the sampler chose for it, weighted by the
            trained router (MiMo-V2-Flash §4.6); changes nothing in models without experts.
    """

    stage: Literal["rl"] = "rl"
    group_size: Annotated[int, Field(ge=2)] = 8
    prompts_per_batch: Positive = 16
    updates_per_batch: Positive = 1
    max_tokens: Positive = 64
    temperature: Rate = 1.0
    clip_low: Fraction = 0.2
    clip_high: NonNegative = 0.28
    filter_metric: Literal["acc", "reward"] = "acc"
    easy_probability: Fraction = 0.1
    max_groups: Positive = 24
    replay_routing: bool = True
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=1e-6)
    losses: LossesConfig = LossesConfig(mtp_weight=0.0, balance_weight=0.0, router_bias_update_rate=0.0)


class MOPDConfig(RLConfig):
    """Multi-teacher on-policy distillation (MiMo-V2-Flash §4.4): every source has one teacher.

    Attributes:
        teachers: task source -> its teacher: name of an earlier stage of the run, or a run folder or model
            directory of the same tokenizer. Every source of the stage has one.
        band: ratios of trainer to sampler probability that are kept (source: ours).
        outcome_weight: weight of the outcome advantage beside the teacher's log-ratio (source: ours).
        logratio_clip: bound of the teacher's log-ratio; 0, as in the report, for none.
        group_size: 1 distils only; more give the outcome reward something to compare.
        filter_metric: `none`, because the teacher has something to say about every answer.
    """

    stage: Literal["mopd"] = "mopd"  # type: ignore[assignment]
    teachers: dict[str, FilePath] = Field(default_factory=dict)
    band: Annotated[tuple[Rate, Rate], Field(strict=False)] = (0.5, 5.0)
    outcome_weight: NonNegative = 0.1
    logratio_clip: NonNegative = 0.0
    group_size: Positive = 4
    filter_metric: Literal["none", "acc", "reward"] = "none"  # type: ignore[assignment]
    easy_probability: Fraction = 0.0


class AudioTokenizerStageConfig(StageConfig):
    """Trains an audio tokenizer from nothing (MiMo-Audio §2.1.2, stage 1); the adversarial stage 2 is not in.

    The budget counts frames of the tokenizer, 25 a second: `seq_len` is the length of a crop, and a batch
    holds `tokens_per_batch / seq_len` of them. Optimizer, schedule and what is marked ours are not in the
    report.

    Attributes:
        tokenizer: the tokenizer's shape, by preset or config.json.
        reconstruction_weight: of the distance between mel spectrograms (report: 1).
        commitment_weight: of the distance between vectors and their codes (report: 1).
        text_weight: of reading a crop's transcript from its quantised vectors (report: 10); 0 leaves the
            reader out. Only crops that hold a whole clip have a transcript.
        text_layers: of that reader, a causal transformer over bytes (source: ours).
        num_mels: channels of each scale of the reconstruction loss; window and hop are `mel_windows` and half
            of it (report: 32, 64, 128 mels; 240, 480 and 960 samples at 24 kHz).
        stage_dropout: probability of training a step on the first few codebooks only (source: ours).
        unquantized_tokens: budget during which vectors pass unquantised, before codebooks are made of them
            (source: ours; the report makes them of the first batch).
    """

    stage: Literal["audio_tokenizer"] = "audio_tokenizer"
    tokenizer: ModelSource = ModelSource(preset="mimo-audio-tokenizer-mini")
    reconstruction_weight: Rate = 1.0
    commitment_weight: NonNegative = 1.0
    text_weight: NonNegative = 10.0
    text_layers: Positive = 2
    num_mels: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (32, 64, 80)
    mel_windows: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)] = (160, 320, 640)
    stage_dropout: Fraction = 0.5
    unquantized_tokens: Count = 0
    seq_len: Positive = 50
    tokens_per_batch: Positive = 400
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=3e-4, betas=(0.8, 0.99), weight_decay=0.01)
    schedule: ScheduleConfig = CosineSchedule()

    @model_validator(mode="after")
    def _whole_crops(self) -> AudioTokenizerStageConfig:
        if self.micro_batches != 1:
            raise problem(
                f"= {self.micro_batches} would move the codebooks more than once per step; give 1",
                "micro_batches",
            )
        if self.tokens_per_batch % self.seq_len:
            raise problem(
                f"= {self.tokens_per_batch} is no whole number of crops of seq_len = {self.seq_len} frames",
                "tokens_per_batch",
            )
        if len(self.num_mels) != len(self.mel_windows):
            raise problem(
                f"has {len(self.mel_windows)} entries for {len(self.num_mels)} of num_mels", "mel_windows"
            )
        return self


class AudioLMStageConfig(StageConfig):
    """Trains an audio language model on codes of the audio tokenizer that the stage before it made.

    The budget counts positions: text tokens and patches of 4 frames. The model's shape is the run's `model`.
    Task shares and learning rates are ours; the loss weights are those of MiMo-Audio §3.2.

    Attributes:
        tasks: kind of document -> its share: `continuation` is speech alone, `asr` speech, then its text, and
            `tts` text, then its speech with the text between.
        patches_per_batch: patches of a batch that the patch decoder learns from, drawn at random; 0 for all.
            Changes the cost, not what the loss estimates.
        text_chunk, patch_chunk: text tokens and patches that take turns in spoken answers.
    """

    stage: Literal["audio_lm"] = "audio_lm"
    tasks: dict[Literal["continuation", "asr", "tts"], NonNegative] = Field(
        default={"continuation": 0.5, "asr": 0.25, "tts": 0.25}
    )
    patches_per_batch: Count = 256
    text_chunk: Positive = 5
    patch_chunk: Positive = 5
    seq_len: Positive = 384
    tokens_per_batch: Positive = 1024
    optimizer: OptimizerConfig = AdamWConfig(learning_rate=1e-3)
    schedule: ScheduleConfig = CosineSchedule()

    @model_validator(mode="after")
    def _trains_something(self) -> AudioLMStageConfig:
        if self.micro_batches != 1:
            raise problem(f"= {self.micro_batches}: audio batches are not split; give 1", "micro_batches")
        if not any(self.tasks.values()):
            raise problem("has no task with a weight above 0", "tasks")
        return self


class Stage(NamedTuple):
    """A row of `STAGES`: the function as `module:function`, and its settings class."""

    function: str
    config: type[StageConfig]


STAGES: dict[str, Stage] = {
    "pretrain": Stage("sateen.train.pretrain:pretrain", PretrainConfig),
    "sft": Stage("sateen.train.sft:sft", SFTConfig),
    "mtp": Stage("sateen.train.mtp:mtp", MTPConfig),
    "qat": Stage("sateen.train.qat:qat", QATConfig),
    "rl": Stage("sateen.post.rl:rl", RLConfig),
    "mopd": Stage("sateen.post.mopd:mopd", MOPDConfig),
    "audio_tokenizer": Stage("sateen.train.audio_tokenizer:audio_tokenizer", AudioTokenizerStageConfig),
    "audio_lm": Stage("sateen.train.audio_lm:audio_lm", AudioLMStageConfig),
}


def _classes() -> dict[str, type[StageConfig]]:
    return {name: stage.config for name, stage in STAGES.items()}


AnyStage = Annotated[StageConfig, one_of("stage", _classes)]


class Progress(Protocol):
    """Where a stage tells a person how far it is; results go into the run folder, never through here."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Opens a bar of `total` tokens, `done` of them from an earlier process."""

    def update(self, done: int, **values: float) -> None:
        """Moves the bar to `done` tokens and shows the newest values, for example `loss=2.31`."""

    def note(self, text: str) -> None:
        """One line of talk."""

    def stop(self) -> None:
        """Closes the bar."""


class Silent:
    """A `Progress` that says nothing, for tests and library use."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def update(self, done: int, **values: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """What a stage's function is given.

    Attributes:
        config: the whole run.
        stage: this stage's settings, an instance of the class in `STAGES`.
        stage_index: its position in `config.stages`.
        folder: the run folder; exists and belongs to this process.
        progress: where to report to the person who waits.
    """

    config: RunConfig
    stage: StageConfig
    stage_index: int
    folder: Path
    progress: Progress


def stage_function(name: str) -> Callable[[StageContext], None]:
    """The function of a stage, importing its room."""
    function: Any = pkgutil.resolve_name(STAGES[name].function)
    return function  # type: ignore[no-any-return]
