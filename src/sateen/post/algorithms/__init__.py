"""Algorithms: each maps packed rollouts to per-token weights; the training step knows none of them."""

from sateen.post.algorithms.grpo import GRPO, group_advantages
from sateen.post.algorithms.mopd import MOPD

__all__ = ["GRPO", "MOPD", "group_advantages"]
