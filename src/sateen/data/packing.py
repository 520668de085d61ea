"""The types that training steps consume: a packed batch, per-token signals, recorded choices.

Loaders and rollouts make `PackedBatch`es, algorithms fill `TokenSignals`, `train.objective` consumes both.
Shape letters: T tokens of the batch, B sequences, K candidate ids, L layers, A experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class Replay:
    """Discrete choices recorded in one forward so that another can repeat them.

    Attributes:
        router_ids: layer index -> [T, A] expert ids; a row of -1 leaves that token to the router.
        selections: layer index -> int32 [K, T, n] key blocks of an oracle layer; lists of -1 alone leave that
            token to the layer.
    """

    router_ids: dict[int, Tensor] = field(default_factory=dict)
    selections: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedBatch:
    """Token sequences laid end to end.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T], from 0 in each sequence.
        cu_seqlens: int32 [B + 1], offsets of the sequences; first 0, last T.
        labels: int64 [T], the token that follows each input token, or -100 where none is trained.
        rewards: optional float [B], for metrics.
        advantages: optional float [B], what an algorithm credits each sequence with.
        old_logprobs: optional float [T], log-probabilities of `labels` when they were sampled.
        teacher_logprobs: optional float [T], log-probabilities of `labels` under a teacher.
        replay: optional recorded choices to repeat.
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    replay: Replay | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.numel())

    @property
    def num_sequences(self) -> int:
        return int(self.cu_seqlens.numel()) - 1

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device; replay stays where it is until a layer reads it."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def shifted_labels(self, by: int) -> Tensor:
        """The labels `by` tokens further on, -100 where that leaves the sequence: MTP targets."""
        labels = torch.full_like(self.labels, IGNORE)
        kept = max(self.num_tokens - by, 0)
        # A row keeps its label only if the row `by` further on belongs to the same sequence.
        owner = torch.bucketize(
            torch.arange(self.num_tokens, device=labels.device),
            self.cu_seqlens[1:].to(torch.int64),
            right=True,
        )
        is_same = owner[:kept] == owner[self.num_tokens - kept :]
        labels[:kept] = torch.where(is_same, self.labels[self.num_tokens - kept :], IGNORE)
        return labels


@dataclass(frozen=True)
class TokenSignals:
    """Per-token weights of the losses of one step, detached and already normalised.

    The loss is `sum_t -(policy_T + ce_T) * logprob_t + ref_kl_T * kl_t`, and for soft targets
    `sum_t -sum_k exp(target_logprobs) * logprob_k`.

    Attributes:
        policy_T: weight of the policy-gradient loss.
        ce_T: weight of the cross-entropy loss.
        ref_kl_T: weight of the divergence from `ref_logprobs_T`.
        ref_logprobs_T: log-probabilities of the labels under the reference; goes with `ref_kl_T`.
        target_ids_TK: candidate tokens of a soft target.
        target_logprobs_TK: their target log-probabilities.
    """

    policy_T: Tensor | None = None
    ce_T: Tensor | None = None
    ref_kl_T: Tensor | None = None
    ref_logprobs_T: Tensor | None = None
    target_ids_TK: Tensor | None = None
    target_logprobs_TK: Tensor | None = None


def pack(sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None) -> PackedBatch:
    """A batch of these token sequences; labels default to the next token in each, -100 at its end."""
    flat = [token for sequence in sequences for token in sequence]
    if labels is None:
        labels = [[*sequence[1:], IGNORE] if sequence else [] for sequence in sequences]
    lengths = [len(sequence) for sequence in sequences]
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    return PackedBatch(
        input_ids=torch.tensor(flat, dtype=torch.int64),
        position_ids=torch.tensor([i for n in lengths for i in range(n)], dtype=torch.int64),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32),
        labels=torch.tensor([label for row in labels for label in row], dtype=torch.int64),
    )
