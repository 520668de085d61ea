"""Multi-teacher on-policy distillation: the sampled reverse KL to the domain's teacher, as a policy gradient.

Source: MiMo-V2-Flash (arXiv 2601.02780 §4.4, eq. 7-9). Each response has one teacher, chosen by its domain.
Open there and ours: the band [0.5, 5] outside which a token is dropped, and the weight 0.1 of the outcome
advantage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.data.packing import IGNORE, PackedBatch, TokenSignals
from sateen.post.algorithms.grpo import sequence_of_token


class MOPD:
    """`sum_t w_t A_t log p(y_t)`, the mean over each response and then over responses.

    `A_t = log p_teacher - log p + outcome_weight * outcome advantage`. `w_t` is the ratio of trainer to
    sampler probability inside the band and zero outside: tokens that the two engines see differently are
    dropped, not clipped. A dropped token still counts in its response's length.

    Attributes:
        band: smallest and largest ratio that is kept.
        outcome_weight: the paper's alpha; 0 distils only.
        logratio_clip: bound of the teacher's log-ratio; None, as in the paper, for none.
    """

    needs_logprobs = True

    def __init__(
        self,
        *,
        band: tuple[float, float] = (0.5, 5.0),
        outcome_weight: float = 0.1,
        logratio_clip: float | None = None,
    ):
        self.band, self.outcome_weight, self.logratio_clip = band, outcome_weight, logratio_clip
        self._num_responses = 0

    def begin_step(self, batches: Sequence[PackedBatch]) -> None:
        """Counts the responses of the step."""
        self._num_responses = sum(batch.num_sequences for batch in batches)

    def signals(self, batch: PackedBatch, logprobs_T: Tensor | None) -> TokenSignals:
        """The detached weight of every completion token; prompts and other tokens get zero."""
        assert logprobs_T is not None
        assert batch.old_logprobs is not None
        assert batch.teacher_logprobs is not None, "MOPD needs the teacher's log-probabilities"
        is_trained = batch.labels != IGNORE
        owner_T = sequence_of_token(batch)
        logprobs_T = logprobs_T.float()
        advantage_T = batch.teacher_logprobs - logprobs_T
        if self.logratio_clip is not None:
            advantage_T = advantage_T.clamp(-self.logratio_clip, self.logratio_clip)
        if self.outcome_weight and batch.advantages is not None:
            advantage_T = advantage_T + self.outcome_weight * batch.advantages[owner_T]
        ratio_T = (logprobs_T - batch.old_logprobs).masked_fill(~is_trained, 0.0).exp()
        low, high = self.band
        is_kept = is_trained & (ratio_T >= low) & (ratio_T <= high)
        length_B = torch.zeros(batch.num_sequences, device=ratio_T.device)
        length_B = length_B.index_add(0, owner_T, is_trained.float()).clamp(min=1)
        weight_T = (ratio_T * advantage_T).masked_fill(~is_kept, 0.0)
        return TokenSignals(policy_T=weight_T / length_B[owner_T] / max(self._num_responses, 1))
