"""Stages on speech: the audio tokenizer, then a language model on its codes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sateen.config.base import Count, Fraction, NonNegative, Positive, Rate, problem
from sateen.config.data import ModelSource
from sateen.config.optim import AdamWConfig, CosineSchedule, OptimizerConfig, ScheduleConfig
from sateen.config.stages.base import StageConfig


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
        if self.activation_checkpointing:
            raise problem(
                "= true is for decoders' layers and the audio tokenizer has none; leave it out",
                "activation_checkpointing",
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
