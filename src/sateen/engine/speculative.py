"""Speculative decoding with the model's own MTP heads: drafting, and verification that changes nothing.

Let x_n be the newest token, sampled and not yet in the trunk, so the trunk's hidden states H_t are known for
t < n. Head k at row t reads H_t (or head k-1's output, where heads are chained) and the embedding of
x_(t+k+1), and predicts x_(t+k+2); its last row, t = n-1, gives the draft d_(k+1) of x_(n+k+1). A row is true
when all its tokens are: t + k + 1 <= n. Every round all K heads process the same rows, those after the last
row that is true for all of them; the rows that leaned on drafts are forgotten afterwards and done again with
the verified tokens.

Source: MiMo-7B (arXiv 2505.07608 §2.2) and MiMo-V2-Flash (arXiv 2601.02780 §2.3.2) draft this way; accepting
with min(1, p/q) and drawing the replacement from max(0, p - q) is Leviathan et al. 2023 (arXiv 2211.17192,
algorithm 1 and appendix A.1). Shape letters: B requests, J drafts, M rows, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sateen.engine.cache import CacheEntry, KVCache
from sateen.engine.sampler import choose, distribution, draw, mask_padding, uniforms
from sateen.engine.state import Request
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences


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
    best_BJ = logits_BJV.argmax(-1)
    J = drafts_BJ.shape[1]
    is_kept = (best_BJ[:, :J] == drafts_BJ) & (
        torch.arange(J, device=drafts_BJ.device) < num_drafts_B[:, None]
    )
    accepted_B = is_kept.long().cumprod(1).sum(1)
    return accepted_B, best_BJ.gather(1, accepted_B[:, None]).squeeze(1)


def verify(logits_MV: Tensor, requests: Sequence[Request], drafts: Sequence[list[int]]) -> list[list[int]]:
    """The tokens that each request emits, at least one.

    Args:
        logits_MV: the target's logits, for each request at its newest token and then at each of its drafts.
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
            _padded_uniforms(theirs, [counts[i] for i in sampled], device),
        )
    return [[*d[:a], t] for d, a, t in zip(drafts, accepted_B.tolist(), final_B.tolist(), strict=True)]


def _padded_uniforms(requests: Sequence[Request], counts: list[int], device: torch.device) -> Tensor:
    """Each request's own `count + 1` numbers, the last in the last column; neighbours change none."""
    out = torch.zeros(len(requests), max(counts) + 1, dtype=torch.float64)
    for i, (request, count) in enumerate(zip(requests, counts, strict=True)):
        row = uniforms([request], count + 1, torch.device("cpu"))[0]
        out[i, :count], out[i, -1] = row[:count], row[count]
    return out.to(device)


@dataclass
class DraftJob:
    """One request after a trunk pass.

    Attributes:
        request: its tokens now, the new ones included.
        entry: its rows; `entry.length` is already cut to the accepted ones.
        start: position of the pass's first row.
        count: rows of the pass.
        offset: where they begin in the packed hidden states.
        wants_drafts: False while the prompt is being read.
    """

    request: Request
    entry: CacheEntry
    start: int
    count: int
    offset: int
    wants_drafts: bool


class Drafter:
    """Runs the MTP heads of a model; keeps the newest 2K trunk states of each sequence, all they need."""

    def __init__(self, model: Decoder, cache: KVCache, num_tokens: int):
        self.model, self.cache, self.num_tokens = model, cache, num_tokens
        self.num_heads = model.num_mtp_heads
        self.keep = 2 * self.num_heads
        size = cache.num_slots * self.keep, model.config.hidden_size
        self.hidden_RD = torch.zeros(size, dtype=model.model.embed_tokens.weight.dtype, device=model.device)

    def run(self, jobs: Sequence[DraftJob], hidden_TD: Tensor) -> None:
        """Brings the heads up to each job's newest token and fills the drafts of those that want some."""
        K = self.num_heads
        active, spans, sources, tokens = [], [], [], []
        for job in jobs:
            known, first = job.request.tokens, job.entry.head_length
            n = len(known) - 1
            # While the prompt is read all its tokens are known, so every row that is processed is a true one.
            stop = n if job.wants_drafts else min(job.entry.length, n + 1 - K)
            if stop > first:
                active.append(job)
                spans.append((first, stop))
                sources += self._sources(job, first, stop)
                tail = known[first + 1 : stop + K + 1]
                tokens += tail + [0] * (stop - first + K - len(tail))
        if active:
            joined = torch.cat([self.hidden_RD, hidden_TD])
            self._draft(active, spans, joined.index_select(0, self._ids(sources)), self._ids(tokens))
        self._remember(jobs, hidden_TD)

    def _sources(self, job: DraftJob, first: int, stop: int) -> list[int]:
        """Rows of (kept states, this pass's states) that hold H_first .. H_(stop-1)."""
        base, moved = job.entry.slot * self.keep, len(self.hidden_RD) + job.offset - job.start
        border = min(max(first, job.start), stop)
        assert border - first <= self.keep
        return [base + t % self.keep for t in range(first, border)] + [moved + t for t in range(border, stop)]

    def _draft(
        self, jobs: list[DraftJob], spans: list[tuple[int, int]], hidden: Tensor, tokens: Tensor
    ) -> None:
        K, model = self.num_heads, self.model
        counts = [stop - first for first, stop in spans]
        seq = Sequences.of_lengths(counts)
        positions = seq.position_ids + torch.tensor([first for first, _ in spans]).repeat_interleave(
            torch.tensor(counts)
        )
        seq = Sequences(seq.cu_seqlens.to(model.device), positions.to(model.device))
        view = self.cache.forward([job.entry for job in jobs], counts, heads=True)
        # `tokens` holds, per job, the token after each row and K places more: drafts go there as they appear.
        row_T = torch.arange(sum(counts)) + K * torch.arange(len(jobs)).repeat_interleave(
            torch.tensor(counts)
        )
        row_T = row_T.to(model.device)
        ends = torch.tensor(counts).cumsum(0)
        wanting = [i for i, job in enumerate(jobs) if job.wants_drafts]
        last_B = (ends[wanting] - 1).to(model.device)
        place_B = (ends[wanting] + K * torch.tensor(wanting, dtype=torch.int64)).to(model.device)
        requests = [jobs[i].request for i in wanting]
        drafts, probs = [], []
        for k in range(K):
            hidden, out = model.mtp(k, hidden, tokens[row_T + k], seq, view)
            if wanting:
                logits = mask_padding(model.logits(out.index_select(0, last_B)), self.num_tokens)
                draft_B, probs_SV, sampled = choose(logits, requests)
                tokens[place_B + k] = draft_B
                drafts.append(draft_B)
                probs.append(probs_SV)
        if wanting:
            for request, found in zip(requests, torch.stack(drafts, 1).tolist(), strict=True):
                request.drafts, request.draft_probs = found, None
            for s, i in enumerate(sampled):
                requests[i].draft_probs = torch.stack([p[s] for p in probs if p is not None])
        for job in jobs:
            if job.wants_drafts:
                job.entry.head_length = max(0, len(job.request.tokens) - K)

    def _remember(self, jobs: Sequence[DraftJob], hidden_TD: Tensor) -> None:
        """Keeps the newest states; rows of rejected drafts do no harm, the next pass overwrites them."""
        to, source = [], []
        for job in jobs:
            for t in range(job.start + max(0, job.count - self.keep), job.start + job.count):
                to.append(job.entry.slot * self.keep + t % self.keep)
                source.append(job.offset + t - job.start)
        if to:
            self.hidden_RD.index_copy_(0, self._ids(to), hidden_TD.index_select(0, self._ids(source)))

    def _ids(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.model.device)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the kept hidden states."""
        return self.hidden_RD.nbytes
