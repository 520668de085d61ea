"""The `mtp` stage: more prediction heads, copied from the first and trained behind a frozen trunk."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from sateen.config import MTPConfig, StageContext
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.train.objective import CrossEntropy, TokenObjective
from sateen.train.text import train_text


def mtp(context: StageContext) -> None:
    """Grows the run's model to `num_heads` heads and trains all of them or only the new ones.

    MiMo-V2-Flash §2.3.2 copies the pre-trained head and trains all heads jointly; MiMo-7B §2.2 freezes the
    trunk and the first head and tunes the copies.

    Raises:
        ConfigError: the model has no head to copy, or more than `num_heads`.
    """
    stage = context.stage
    assert isinstance(stage, MTPConfig)

    def objective(model: Decoder) -> TokenObjective:
        return TokenObjective(
            CrossEntropy(),
            mtp_weight=stage.losses.mtp_weight,
            detach_trunk=True,
            detach_head=True,
            trains_trunk=False,
        )

    def freeze(model: Decoder) -> None:
        model.requires_grad_(False)
        for head in model.mtp_heads()[1 if stage.train == "new" else 0 :]:
            head.requires_grad_(True)

    def adapt(model: Decoder) -> Decoder:
        if stage.train == "new" and model.num_mtp_heads > 1:
            raise ConfigError(
                f'train = "new" freezes the first head and trains its copies, and the model already has '
                f'{model.num_mtp_heads} heads; use train = "all"'
            )
        return copy_first_head(model, stage.num_heads)

    train_text(context, objective, adapt=adapt, freeze=freeze)


@torch.no_grad()
def copy_first_head(model: Decoder, num_heads: int) -> Decoder:
    """A model with `num_heads` heads: the old ones, then copies of the first.

    Raises:
        ConfigError: the model has no head, or more than `num_heads`.
    """
    have = model.num_mtp_heads
    if not 1 <= have <= num_heads:
        raise ConfigError(
            f"the model has {have} MTP heads, num_heads is {num_heads}; the stage copies the first head "
            "of a model that was trained with one"
        )
    raw = copy.deepcopy(dict(model.config.raw)) | {"num_nextn_predict_layers": num_heads}
    config = ModelConfig.from_hf(raw)
    assert model.config.mtp is not None
    config = replace(config, mtp=replace(model.config.mtp, num_heads=num_heads))
    grown = Decoder(config).to(model.device)
    grown.load_state_dict(model.state_dict(), strict=False)
    heads = grown.mtp_heads()
    for head in heads[have:]:
        head.load_state_dict(heads[0].state_dict())
    return grown
