"""Group-relative policy optimisation as MiMo-7B uses it: no reference model, clip-higher, token mean.

Source: arXiv 2505.07608 §3.3 eq. 1-2. Open there and ours: both clip bounds (DAPO's 0.2 and 0.28), the
standard deviation (population, plus 1e-6), the token mean over the whole step instead of each group, and the
ratio per token (the paper prints whole responses but sums over tokens).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.data.packing import IGNORE, PackedBatch, TokenSignals


def group_advantages(groups: Sequence[int], rewards: Sequence[float], *, eps: float = 1e-6) -> list[float]:
    """`(r - mean) / (std + eps)` within each group; zero where all rewards of a group are equal."""
    members: dict[int, list[float]] = defaultdict(list)
    for group, reward in zip(groups, rewards, strict=True):
        members[group].append(reward)
    stats = {}
    for group, values in members.items():
        mean = sum(values) / len(values)
        std = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        stats[group] = mean, std
    return [(r - stats[g][0]) / (stats[g][1] + eps) for g, r in zip(groups, rewards, strict=True)]


def sequence_of_token(batch: PackedBatch) -> Tensor:
    """int64 [T], the index of each token's sequence."""
    lengths = batch.cu_seqlens.diff().long()
    index = torch.arange(len(lengths), device=lengths.device)
    return torch.repeat_interleave(index, lengths, output_size=batch.num_tokens)


class GRPO:
    """The clipped policy gradient of eq. 1.

    Attributes:
        clip_low: lower bound of the ratio is 1 - clip_low.
        clip_high: upper bound of the ratio is 1 + clip_high.
    """

    needs_logprobs = True

    def __init__(self, *, clip_low: float = 0.2, clip_high: float = 0.28):
        self.clip_low, self.clip_high = clip_low, clip_high
        self._num_tokens = 0

    def begin_step(self, batches: Sequence[PackedBatch]) -> None:
        """Counts the completion tokens of the step."""
        self._num_tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)

    def signals(self, batch: PackedBatch, logprobs_T: Tensor | None) -> TokenSignals:
        """Ratio times advantage where the clipped objective has a gradient, zero elsewhere."""
        assert logprobs_T is not None
        assert batch.old_logprobs is not None
        assert batch.advantages is not None
        is_trained = batch.labels != IGNORE
        advantage_T = batch.advantages[sequence_of_token(batch)]
        ratio_T = (logprobs_T.float() - batch.old_logprobs).masked_fill(~is_trained, 0.0).exp()
        # min(r A, clip(r) A) has no gradient where the ratio left the band on the side that A favours.
        is_clipped = torch.where(advantage_T >= 0, ratio_T > 1 + self.clip_high, ratio_T < 1 - self.clip_low)
        weight_T = (ratio_T * advantage_T).masked_fill(is_clipped | ~is_trained, 0.0)
        return TokenSignals(policy_T=weight_T / max(self._num_tokens, 1))
