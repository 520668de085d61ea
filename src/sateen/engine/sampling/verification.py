"""Verification of drafts: greedy tokens stay the same, sampled ones keep their distribution.

Source: accepting with min(1, p/q) and drawing the replacement from max(0, p - q) is Leviathan et al. 2023
(arXiv 2211.17192, algorithm 1 and appendix A.1). Shape letters: B requests, J drafts, M rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.engine.sampling.sampler import best, choose, distribution, draw, uniforms
from sateen.engine.state import Request


def accept(
    target_BJV: Tensor, draft_BJV: Tensor, drafts_BJ: Tensor, num_drafts_B: Tensor, uniforms_BJ: Tensor
) -> tuple[Tensor, Tensor]:
    """Speculative sampling: the emitted tokens are distributed as the target's.

    Args:
        target_BJV: the target's probabilities [B, J + 1, V] at the newest token and at each draft.
        draft_BJV: the probabilities [B, J, V] that the drafts were drawn from.
        drafts_BJ: draft tokens; the ones from `num_drafts_B` on are padding.
        uniforms_BJ: random numbers [B, J + 1] in [0, 1); the last one draws the final token.

    Returns:
        Accepted drafts [B] and the token [B] after them: the first rejected one's replacement, or the bonus.
    """
    B, J = drafts_BJ.shape
    index = drafts_BJ.unsqueeze(-1)
    p_BJ = target_BJV[:, :J].gather(-1, index).squeeze(-1)
    q_BJ = draft_BJV.gather(-1, index).squeeze(-1)
    is_kept = (uniforms_BJ[:, :J] * q_BJ < p_BJ) & (
        torch.arange(J, device=p_BJ.device) < num_drafts_B[:, None]
    )
    accepted_B = is_kept.long().cumprod(1).sum(1)
    row = torch.arange(B, device=p_BJ.device)
    p_BV = target_BJV[row, accepted_B]
    if J:
        is_rejected = (accepted_B < num_drafts_B)[:, None]
        q_BV = draft_BJV[row, accepted_B.clamp(max=J - 1)] * is_rejected
        residual_BV = (p_BV - q_BV).clamp(min=0)
        # Rounding may leave nothing where p and q agree; the target itself is then the residual's limit.
        p_BV = torch.where(residual_BV.sum(-1, keepdim=True) > 0, residual_BV, p_BV)
    return accepted_B, draw(p_BV, uniforms_BJ[:, J])


def accept_greedy(logits_BJV: Tensor, drafts_BJ: Tensor, num_drafts_B: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted drafts [B], as long as they are the target's largest logits, and the token [B] after them."""
    best_BJ = best(logits_BJV)
    J = drafts_BJ.shape[1]
    is_kept = (best_BJ[:, :J] == drafts_BJ) & (
        torch.arange(J, device=drafts_BJ.device) < num_drafts_B[:, None]
    )
    accepted_B = is_kept.long().cumprod(1).sum(1)
    return accepted_B, best_BJ.gather(1, accepted_B[:, None]).squeeze(1)


def verify(logits_MV: Tensor, requests: Sequence[Request], drafts: Sequence[list[int]]) -> list[list[int]]:
    """The tokens that each request emits, at least one.

    Args:
        logits_MV: the target's logits, for each request at its newest token and then at each of its drafts,
            after `shape`.
        drafts: the drafts that this pass carried.
    """
    J = max(map(len, drafts))
    if J == 0:
        return [[token] for token in choose(logits_MV, requests)[0].tolist()]
    device = logits_MV.device
    counts = [len(d) for d in drafts]
    first, rows = 0, []
    for count in counts:
        rows.append([first + min(j, count) for j in range(J + 1)])
        first += count + 1
    logits_BJV = logits_MV[torch.tensor(rows, device=device)]
    drafts_BJ = torch.tensor([d + [0] * (J - len(d)) for d in drafts], device=device)
    num_drafts_B = torch.tensor(counts, device=device)
    accepted_B, final_B = accept_greedy(logits_BJV, drafts_BJ, num_drafts_B)
    sampled = [i for i, request in enumerate(requests) if not request.params.is_greedy]
    if sampled:
        theirs = [requests[i] for i in sampled]
        pick = torch.tensor(sampled, device=device)
        params = [request.params for request in theirs for _ in range(J + 1)]
        target = distribution(logits_BJV[pick].flatten(0, 1), params).view(len(theirs), J + 1, -1)
        q = torch.zeros(len(theirs), J, logits_MV.shape[-1], device=device)
        for i, request in enumerate(theirs):
            if drafts[sampled[i]]:
                assert request.draft_probs is not None
                q[i, : len(drafts[sampled[i]])] = request.draft_probs[: len(drafts[sampled[i]])]
        accepted_B[pick], final_B[pick] = accept(
            target,
            q,
            drafts_BJ[pick],
            num_drafts_B[pick],
            _padded_uniforms(theirs, [counts[i] for i in sampled], J + 1, device),
        )
    return [[*d[:a], t] for d, a, t in zip(drafts, accepted_B.tolist(), final_B.tolist(), strict=True)]


def _padded_uniforms(
    requests: Sequence[Request], counts: list[int], width: int, device: torch.device
) -> Tensor:
    """Each request's own `count + 1` numbers, the last in the last column; neighbours change none."""
    out = torch.zeros(len(requests), width, dtype=torch.float64)
    for i, (request, count) in enumerate(zip(requests, counts, strict=True)):
        row = uniforms([request], count + 1, torch.device("cpu"))[0]
        out[i, :count], out[i, -1] = row[:count], row[count]
    return out.to(device)
