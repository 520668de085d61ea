"""The `pretrain` stage: next-token and MTP training on text."""

from __future__ import annotations

from sateen.config import StageContext
from sateen.models.decoder import Decoder
from sateen.train.objective import CrossEntropy, TokenObjective
from sateen.train.text import train_text


def cross_entropy_objective(context: StageContext) -> TokenObjective:
    """Cross-entropy with the stage's loss weights."""
    losses = context.stage.losses
    return TokenObjective(
        CrossEntropy(),
        mtp_weight=losses.mtp_weight,
        balance_weight=losses.balance_weight,
        detach_trunk=losses.detach_trunk,
        detach_head=losses.detach_head,
    )


def pretrain(context: StageContext) -> None:
    """Trains the run's model on its text."""

    def objective(model: Decoder) -> TokenObjective:
        return cross_entropy_objective(context)

    train_text(context, objective)
