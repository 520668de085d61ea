"""Mixture of experts with a sigmoid router, as in MiMo-V2-Flash (arXiv 2601.02780 §2.1, §3.2).

Dropless: every token reaches all of its experts. The correction bias takes part in the selection only; the
trainer moves it by the loads this layer reports through `LayerLinks`. Shape letters: T tokens, E experts,
A experts per token, D hidden size, F expert width, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sateen import ops
from sateen.nn.attention.base import LayerLinks, Sequences
from sateen.nn.spec import MoESpec


class Router(nn.Module):
    """Scores every expert in float32 and picks the best; ties go to the lower index."""

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size, dtype=torch.float32))
        self.e_score_correction_bias = nn.Buffer(torch.zeros(spec.num_experts, dtype=torch.float32))

    def scores(self, x_TD: Tensor) -> Tensor:
        """Sigmoid scores [T, E] in float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float()).sigmoid()

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Expert ids [T, A], best first."""
        biased = scores_TE.detach() + self.e_score_correction_bias
        # A stable sort, because torch.topk leaves the order of ties open and replay needs it fixed.
        ids: Tensor = biased.sort(dim=-1, descending=True, stable=True).indices[
            :, : self.spec.experts_per_token
        ]
        return ids

    def weights(self, scores_TE: Tensor, ids_TA: Tensor) -> Tensor:
        """Combination weights [T, A] in float32; the bias is not part of them."""
        chosen = scores_TE.gather(-1, ids_TA)
        if self.spec.norm_topk_prob:
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
        return chosen * self.spec.routed_scaling_factor


class Experts(nn.Module):
    """The routed SwiGLU experts, stacked: `[E, F, D]` and `[E, D, F]` as torch stores linear weights."""

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        E, F_ = spec.num_experts, spec.intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(E, F_, hidden_size))
        self.up_proj = nn.Parameter(torch.empty(E, F_, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(E, hidden_size, F_))

    def forward(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:
        """Expert outputs for rows sorted by expert; `counts_E` rows go to each."""
        gate = ops.grouped_matmul(x_SD, self.gate_proj.transpose(1, 2), counts_E)
        up = ops.grouped_matmul(x_SD, self.up_proj.transpose(1, 2), counts_E)
        out: Tensor = ops.grouped_matmul(F.silu(gate) * up, self.down_proj.transpose(1, 2), counts_E)
        return out


class MoE(nn.Module):
    """Routes each token to its experts and sums their outputs by the router's weights."""

    def __init__(self, hidden_size: int, spec: MoESpec, layer_index: int):
        super().__init__()
        self.spec = spec
        self.layer_index = layer_index
        self.gate = Router(hidden_size, spec)
        self.experts = Experts(hidden_size, spec)

    def forward(self, x_TD: Tensor, seq: Sequences, links: LayerLinks) -> Tensor:
        T, A = x_TD.shape[0], self.spec.experts_per_token
        scores_TE = self.gate.scores(x_TD)
        ids_TA = self.gate.choose(scores_TE)
        forced = links.forced_router_ids.get(self.layer_index)
        if forced is not None:
            forced = forced.to(ids_TA)
            ids_TA = torch.where(forced[:, :1] < 0, ids_TA, forced)
        weights_TA = self.gate.weights(scores_TE, ids_TA)

        flat = ids_TA.reshape(-1)
        order = flat.argsort(stable=True)
        counts_E = torch.bincount(flat, minlength=self.spec.num_experts)
        links.router_ids[self.layer_index] = ids_TA
        links.expert_counts[self.layer_index] = counts_E
        if links.wants_balance_loss:
            links.balance_losses.append(sequence_balance_loss(scores_TE, ids_TA, seq.cu_seqlens))

        outputs = self.experts(x_TD.index_select(0, order // A), counts_E)
        # Back to token order by the inverse permutation: a gather sums in a fixed order, index_add would not.
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(T * A, device=order.device))
        per_token_TAD = outputs.index_select(0, inverse).view(T, A, -1)
        out: Tensor = (per_token_TAD * weights_TA.to(outputs.dtype).unsqueeze(-1)).sum(1)
        return out


def sequence_balance_loss(scores_TE: Tensor, ids_TA: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The sequence-level balance loss, averaged over non-empty sequences; 1 when the load is even.

    `sum_e f_e P_e` with `f_e = E/(A T) * tokens routed to e` and `P_e` the mean share of e's score. The paper
    names the loss and its coefficient only; the formula is DeepSeek-V3's (arXiv 2412.19437 eq. 17-20), ours.
    """
    T, E = scores_TE.shape
    A = ids_TA.shape[1]
    lengths = cu_seqlens.diff().long()
    owner_T = torch.repeat_interleave(
        torch.arange(len(lengths), device=scores_TE.device), lengths, output_size=T
    )
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    hits_TE = torch.zeros_like(scores_TE).scatter_(1, ids_TA, 1.0)
    zeros_BE = scores_TE.new_zeros(len(lengths), E)
    hits_BE = zeros_BE.index_add(0, owner_T, hits_TE.detach())
    share_BE = zeros_BE.index_add(0, owner_T, share_TE)
    length_B1 = lengths.clamp(min=1)[:, None]
    per_sequence = ((E / A) * hits_BE / length_B1 * share_BE / length_B1).sum(-1)
    return per_sequence.sum() / (lengths > 0).sum().clamp(min=1)


@torch.no_grad()
def update_router_bias(router: Router, counts_E: Tensor, rate: float) -> None:
    """Moves the selection bias one step towards an even load: `b += rate * sign(mean - count)`.

    Source: the rate is MiMo-V2-Flash §3.2; the sign rule is DeepSeek-V3 §2.1.2, ours.
    """
    counts = counts_E.to(router.e_score_correction_bias.dtype)
    router.e_score_correction_bias.add_((counts.mean() - counts).sign(), alpha=rate)
