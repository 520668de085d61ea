"""Stages that learn from a model's own answers: checked ones, and those that teachers weigh."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sateen.config.base import FilePath, Fraction, NonNegative, Positive, Rate
from sateen.config.optim import AdamWConfig, LossesConfig, OptimizerConfig
from sateen.config.stages.base import StageConfig


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
        replay_selections: train each token over the key blocks that the sampler's queries chose (source:
            ours); changes nothing in models without oracle layers.
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
    replay_selections: bool = True
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
