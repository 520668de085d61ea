"""Optimizers, learning-rate schedules and loss weights of a stage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from sateen.config.base import Config, Count, Fraction, NonNegative, Rate, one_of

Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]


class AdamWConfig(Config):
    """AdamW for all parameters.

    Attributes:
        learning_rate: peak rate.
        betas: decay of the two moments; 0.9 and 0.95 in MiMo-7B §2.3 and MiMo-V2-Flash §3.2.
        eps: added to the root of the second moment (source: ours, the papers give it for SFT only).
        weight_decay: decoupled decay of matrices; none on norms, biases and embeddings (source: ours).
        clip_norm: largest gradient norm; 0 turns clipping off.
    """

    choice: ClassVar[str | None] = "name"
    name: Literal["adamw"] = "adamw"
    learning_rate: Rate = 3e-4
    betas: Betas = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: NonNegative = 1.0


class MuonConfig(Config):
    """Muon for the matrices inside the layers, AdamW for embeddings, output, norms, biases and routers.

    Attributes:
        learning_rate: peak rate of Muon (source: ours).
        adamw_learning_rate: peak rate of AdamW (source: ours).
        momentum: of Muon's gradient average (source: ours).
        betas, eps: of AdamW.
        weight_decay: decoupled decay of matrices (source: ours).
        clip_norm: largest gradient norm; 0 turns clipping off.
    """

    choice: ClassVar[str | None] = "name"
    name: Literal["muon"] = "muon"
    learning_rate: Rate = 0.02
    adamw_learning_rate: Rate = 3e-3
    momentum: Beta = 0.95
    betas: Betas = (0.9, 0.95)
    eps: Rate = 1e-8
    weight_decay: NonNegative = 0.1
    clip_norm: NonNegative = 1.0


OPTIMIZERS: dict[str, type[Config]] = {"adamw": AdamWConfig, "muon": MuonConfig}
OptimizerConfig = Annotated[AdamWConfig | MuonConfig, one_of("optimizer", lambda: OPTIMIZERS)]


class ConstantSchedule(Config):
    """A linear warm-up, then the peak rate.

    Attributes:
        warmup_tokens: tokens from rate 0 to the peak.
    """

    choice: ClassVar[str | None] = "name"
    name: Literal["constant"] = "constant"
    warmup_tokens: Count = 0


class CosineSchedule(Config):
    """A linear warm-up, then half a cosine to the end of the stage.

    Attributes:
        warmup_tokens: tokens from rate 0 to the peak.
        final_fraction: last rate over peak rate (source: ours).
    """

    choice: ClassVar[str | None] = "name"
    name: Literal["cosine"] = "cosine"
    warmup_tokens: Count = 0
    final_fraction: Fraction = 0.1


class WSDSchedule(Config):
    """Warm-up, stable, decay: the peak rate until the last `decay_tokens`, which fall linearly.

    Attributes:
        warmup_tokens: tokens from rate 0 to the peak.
        decay_tokens: tokens of the fall at the end.
        final_fraction: last rate over peak rate (source: ours).
    """

    choice: ClassVar[str | None] = "name"
    name: Literal["wsd"] = "wsd"
    warmup_tokens: Count = 0
    decay_tokens: Count
    final_fraction: Fraction = 0.0


SCHEDULES: dict[str, type[Config]] = {
    "constant": ConstantSchedule,
    "cosine": CosineSchedule,
    "wsd": WSDSchedule,
}
ScheduleConfig = Annotated[
    ConstantSchedule | CosineSchedule | WSDSchedule, one_of("schedule", lambda: SCHEDULES)
]


class LossesConfig(Config):
    """Weights of what is added to the next-token loss.

    Attributes:
        mtp_weight: of the mean cross entropy of the MTP heads; 0.3 early and 0.1 late in MiMo-7B §2.3 and
            MiMo-V2-Flash §3.2.
        balance_weight: of the sequence-level expert balance loss (MiMo-V2-Flash §3.2).
        router_bias_update_rate: step of each expert's selection bias towards balance (MiMo-V2-Flash §3.2).
        detach_trunk: MTP losses do not reach the trunk (source: ours).
        detach_head: MTP losses do not reach the shared embedding and output matrices (source: ours).
    """

    mtp_weight: NonNegative = 0.3
    balance_weight: NonNegative = 1e-5
    router_bias_update_rate: NonNegative = 1e-3
    detach_trunk: bool = False
    detach_head: bool = False
