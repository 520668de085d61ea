"""The `sft` stage: the pre-training step on conversations; the loader's label masks make the difference."""

from __future__ import annotations

from sateen.config import StageContext
from sateen.train.pretrain import pretrain


def sft(context: StageContext) -> None:
    """Fine-tunes the run's model on the assistant's tokens of its conversations (MiMo-7B §3.1)."""
    pretrain(context)
