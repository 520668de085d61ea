"""What a training step minimises: objectives for text, and the algorithms that weight their tokens.

`train.step` calls `Objective.loss` once per micro-batch and knows nothing else. `TokenObjective` serves every
text stage: an `Algorithm` turns a batch into `TokenSignals` between forward and backward; `CrossEntropy` here
is the one for pre-training and supervised fine-tuning, `post.algorithms` holds the others. Shape letters: T
tokens, D hidden size, V vocabulary, K candidate tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.data.packing import IGNORE, PackedBatch, TokenSignals
from sateen.models.decoder import Decoder
from sateen.nn.attention.base import LayerLinks, Sequences
from sateen.train.losses import soft_cross_entropy, token_logprobs


@dataclass
class LossParts:
    """One micro-batch's share of the step's loss.

    Attributes:
        total: differentiable scalar; shares of all micro-batches add up to the step's loss.
        parts: named detached scalars in the same sense, for metrics; turned into floats once per step.
        expert_counts: layer index -> int64 [E] tokens each expert received.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Something to minimise; each objective knows the types of its model and batches."""

    def begin_step(self, batches: Sequence[Any]) -> None:
        """Sees all micro-batches of the coming step, to normalise over the step and not over each of them."""
        ...

    def loss(self, model: Any, batch: Any) -> LossParts:
        """The batch's share of the step's loss."""
        ...


class Algorithm(Protocol):
    """Weights the tokens of a batch.

    Attributes:
        needs_logprobs: `signals` reads the model's log-probabilities. Where it does not, they are never
            formed and the loss takes its fast path.
    """

    needs_logprobs: bool

    def begin_step(self, batches: Sequence[PackedBatch]) -> None:
        """Sees all micro-batches of the coming step."""
        ...

    def signals(self, batch: PackedBatch, logprobs_T: Tensor | None) -> TokenSignals:
        """Per-token weights, detached and normalised over the step; `logprobs_T` is detached too."""
        ...


class CrossEntropy:
    """Mean cross-entropy over the labelled tokens of the whole step: pre-training and SFT."""

    needs_logprobs = False

    def __init__(self) -> None:
        self.num_labelled = 0

    def begin_step(self, batches: Sequence[PackedBatch]) -> None:
        """Counts the labelled tokens of the step."""
        self.num_labelled = sum(int((batch.labels != IGNORE).sum()) for batch in batches)

    def signals(self, batch: PackedBatch, logprobs_T: Tensor | None) -> TokenSignals:
        """The same weight for every labelled token."""
        weight = 1.0 / max(self.num_labelled, 1)
        return TokenSignals(ce_T=(batch.labels != IGNORE).float() * weight)


class TokenObjective:
    """The objective of all text stages: token losses, MTP cross-entropy and router balance.

    Attributes:
        algorithm: weights the tokens.
        mtp_weight: weight of the MTP loss, the mean over heads of each head's mean cross-entropy; 0 skips the
            heads. MiMo-V2-Flash §3.2 uses 0.3, then 0.1; MiMo-7B §2.3 the same.
        balance_weight: weight of the sequence-level balance loss, summed over MoE layers; 0 skips it.
        detach_trunk: the MTP loss does not reach the trunk. The papers do not say for pre-training; ours is
            off. detach_head: the MTP loss does not reach the shared embedding and output matrix; ours is off.
            trains_trunk: False runs the trunk without gradients and drops the token losses: only heads learn.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        *,
        mtp_weight: float = 0.0,
        balance_weight: float = 0.0,
        detach_trunk: bool = False,
        detach_head: bool = False,
        trains_trunk: bool = True,
    ):
        self.algorithm = algorithm
        self.mtp_weight = mtp_weight
        self.balance_weight = balance_weight
        self.detach_trunk = detach_trunk
        self.detach_head = detach_head
        self.trains_trunk = trains_trunk
        self._num_tokens = 0
        self._batches: Sequence[PackedBatch] = ()
        self._mtp_counts: dict[int, int] = {}

    def begin_step(self, batches: Sequence[PackedBatch]) -> None:
        """Prepares the normalisers of the coming step."""
        self.algorithm.begin_step(batches)
        self._batches = batches
        self._num_tokens = sum(batch.num_tokens for batch in batches)
        self._mtp_counts = {}

    def loss(self, model: Decoder, batch: PackedBatch) -> LossParts:
        """The batch's share of the step's loss."""
        links = LayerLinks(wants_balance_loss=self.balance_weight > 0 and self.trains_trunk)
        if batch.replay is not None:
            links.forced_router_ids = dict(batch.replay.router_ids)
            links.forced_selections = dict(batch.replay.selections)
        seq = Sequences(batch.cu_seqlens, batch.position_ids)
        with torch.set_grad_enabled(self.trains_trunk and torch.is_grad_enabled()):
            hidden_TD = model.trunk(batch.input_ids, seq, links=links)
            parts = self._token_parts(model, batch, hidden_TD)
        total = torch.zeros((), device=hidden_TD.device)
        if self.trains_trunk:
            total = sum(parts.values(), start=total)
        if links.balance_losses:
            share = batch.num_tokens / self._num_tokens
            parts["balance"] = torch.stack(links.balance_losses).sum() * share
            total = total + self.balance_weight * parts["balance"]
        if self.mtp_weight > 0 and model.num_mtp_heads > 0:
            heads = self._mtp_parts(model, batch, hidden_TD, seq)
            parts["mtp"] = torch.stack(heads).mean()
            parts |= {f"mtp_{k}": value for k, value in enumerate(heads) if len(heads) > 1}
            total = total + self.mtp_weight * parts["mtp"]
        detached = {name: value.detach() for name, value in parts.items()}
        return LossParts(total, detached, links.expert_counts)

    def _token_parts(self, model: Decoder, batch: PackedBatch, hidden_TD: Tensor) -> dict[str, Tensor]:
        h_TD, w_VD = model.head_input(hidden_TD), model.head_weight()
        if self.algorithm.needs_logprobs:
            logprobs_T = token_logprobs(h_TD, w_VD, batch.labels).logprobs_T
            signals = self.algorithm.signals(batch, logprobs_T.detach())
            parts = signal_losses(signals, logprobs_T)
        else:
            signals = self.algorithm.signals(batch, None)
            assert signals.policy_T is None, "policy_T needs log-probabilities"
            assert signals.ref_kl_T is None, "ref_kl_T needs log-probabilities"
            parts = {}
            if signals.ce_T is not None:
                parts["main"] = soft_cross_entropy(h_TD, w_VD, batch.labels[:, None], signals.ce_T[:, None])
        if signals.target_ids_TK is not None:
            assert signals.target_logprobs_TK is not None
            weights_TK = signals.target_logprobs_TK.exp()
            parts["soft"] = soft_cross_entropy(h_TD, w_VD, signals.target_ids_TK, weights_TK)
        return parts

    def _mtp_parts(
        self, model: Decoder, batch: PackedBatch, hidden_TD: Tensor, seq: Sequences
    ) -> list[Tensor]:
        w_VD, e_VD = model.head_weight(), model.model.embed_tokens.weight
        if self.detach_trunk:
            hidden_TD = hidden_TD.detach()
        if self.detach_head:
            w_VD, e_VD = w_VD.detach(), e_VD.detach()
        losses = []
        for k in range(model.num_mtp_heads):
            # Rows whose token t + k + 1 lies beyond their sequence have no label; they may read anything.
            next_ids_T = batch.input_ids.roll(-(k + 1))
            embeddings_TD = F.embedding(next_ids_T, e_VD)
            hidden_TD, head_TD = model.mtp(k, hidden_TD, next_ids_T, seq, embeddings_TD=embeddings_TD)
            labels_T = batch.shifted_labels(k + 1)
            weights_T = (labels_T != IGNORE).float() / max(self._mtp_count(k), 1)
            losses.append(soft_cross_entropy(head_TD, w_VD, labels_T[:, None], weights_T[:, None]))
        return losses

    def _mtp_count(self, k: int) -> int:
        """Tokens of the whole step that head k is trained on."""
        if k not in self._mtp_counts:
            labels = (batch.shifted_labels(k + 1) for batch in self._batches)
            self._mtp_counts[k] = sum(int((row != IGNORE).sum()) for row in labels)
        return self._mtp_counts[k]


def signal_losses(signals: TokenSignals, logprobs_T: Tensor) -> dict[str, Tensor]:
    """The losses that weights make of log-probabilities: `policy`, `main`, `ref_kl`, where present.

    The divergence is Schulman's non-negative estimator `r - 1 - log r` with r = p_ref / p, of a sampled
    token.
    """
    parts = {}
    if signals.policy_T is not None:
        parts["policy"] = -(signals.policy_T * logprobs_T).sum()
    if signals.ce_T is not None:
        parts["main"] = -(signals.ce_T * logprobs_T).sum()
    if signals.ref_kl_T is not None:
        assert signals.ref_logprobs_T is not None, "ref_kl_T goes with ref_logprobs_T"
        log_ratio_T = signals.ref_logprobs_T - logprobs_T
        parts["ref_kl"] = (signals.ref_kl_T * (log_ratio_T.exp() - 1 - log_ratio_T)).sum()
    return parts
