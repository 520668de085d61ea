"""Stages that train a language model on text, on conversations, in its MTP heads or in two bits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sateen.config.base import FilePath, Positive, problem
from sateen.config.optim import (
    AdamWConfig,
    CosineSchedule,
    LossesConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from sateen.config.stages.base import StageConfig


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
