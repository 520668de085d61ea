"""Drafting with the model's own MTP heads; `verify` sees to it that drafts change nothing.

Let x_n be the newest token, sampled and not yet in the trunk, so the trunk's hidden states H_t are known for
t < n. Head k at row t reads H_t (or head k-1's output, where heads are chained) and the embedding of
x_(t+k+1), and predicts x_(t+k+2); its last row, t = n-1, gives the draft d_(k+1) of x_(n+k+1). A row is true
when all its tokens are: t + k + 1 <= n. Every round all K heads process the same rows, those after the last
row that is true for all of them; the rows that leaned on drafts are forgotten afterwards and done again with
the verified tokens.

Source: MiMo-7B (arXiv 2505.07608 §2.2) and MiMo-V2-Flash (arXiv 2601.02780 §2.3.2) draft this way. Shape
letters: B requests, T rows, S sampled requests, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sateen.engine.cache.forward_cache import ForwardCache
from sateen.engine.cache.kv_cache import CacheEntry, KVCache
from sateen.engine.native.step import MAX_TOKENS, NativeStep
from sateen.engine.sampling.sampler import choose, mask_padding
from sateen.engine.sampling.shaping import shape
from sateen.engine.state import Request
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences


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
        computed: newest rows of the pass that have hidden states. Where they are not all, nothing that is
            drafted or kept leans on heads' rows before them.
    """

    request: Request
    entry: CacheEntry
    start: int
    count: int
    offset: int
    wants_drafts: bool
    computed: int


class Drafter:
    """Runs the MTP heads of a model; keeps the newest 2K trunk states of each sequence, all they need."""

    def __init__(self, model: Decoder, cache: KVCache, num_tokens: int, native: NativeStep | None = None):
        self.model, self.cache, self.num_tokens, self.native = model, cache, num_tokens, native
        self.num_heads = model.num_mtp_heads
        self.keep = 2 * self.num_heads
        size = cache.num_slots * self.keep, model.config.hidden_size
        self.hidden_RD = torch.zeros(size, dtype=model.model.embed_tokens.weight.dtype, device=model.device)

    def run(self, jobs: Sequence[DraftJob], hidden_TD: Tensor) -> None:
        """Brings the heads up to each job's newest token and fills the drafts of those that want some."""
        K = self.num_heads
        active, spans, gaps, sources, tokens = [], [], [], [], []
        for job in jobs:
            known, first = job.request.tokens, job.entry.head_length
            has_gap = job.computed < job.count
            if has_gap:
                first = job.entry.head_length = job.start + job.count - job.computed
            n = len(known) - 1
            # While the prompt is read all its tokens are known, so every row that is processed is a true one.
            stop = n if job.wants_drafts else min(job.entry.length, n + 1 - K)
            if stop > first:
                active.append(job)
                spans.append((first, stop))
                gaps.append(has_gap)
                sources += self._sources(job, first, stop)
                tail = known[first + 1 : stop + K + 1]
                tokens += tail + [0] * (stop - first + K - len(tail))
        if active:
            joined = torch.cat([self.hidden_RD, hidden_TD])
            self._draft(active, spans, gaps, joined.index_select(0, self._ids(sources)), self._ids(tokens))
        self._remember(jobs, hidden_TD)

    def _sources(self, job: DraftJob, first: int, stop: int) -> list[int]:
        """Rows of (kept states, this pass's states) that hold H_first .. H_(stop-1)."""
        base, moved = job.entry.slot * self.keep, len(self.hidden_RD) + job.offset - job.start
        border = min(max(first, job.start), stop)
        assert border - first <= self.keep
        return [base + t % self.keep for t in range(first, border)] + [moved + t for t in range(border, stop)]

    def _draft(
        self,
        jobs: list[DraftJob],
        spans: list[tuple[int, int]],
        gaps: list[bool],
        hidden: Tensor,
        tokens: Tensor,
    ) -> None:
        K, model = self.num_heads, self.model
        counts = [stop - first for first, stop in spans]
        seq = Sequences.of_lengths(counts)
        positions = seq.position_ids + torch.tensor([first for first, _ in spans]).repeat_interleave(
            torch.tensor(counts)
        )
        seq = Sequences(seq.cu_seqlens.to(model.device), positions.to(model.device))
        view = self.cache.forward([job.entry for job in jobs], counts, heads=True, gaps=gaps)
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
        is_shaped = any(request.shaper is not None for request in requests)
        drafts: list[Tensor] = []
        probs: list[Tensor | None] = []
        for k in range(K):
            hidden, out = self._head(k, hidden, tokens[row_T + k], seq, view)
            if wanting:
                logits = mask_padding(self._logits(out.index_select(0, last_B)), self.num_tokens)
                if is_shaped:  # any distribution is right; this one is nearest to what will be asked of them
                    ahead = torch.stack(drafts, 1).tolist() if drafts else [[] for _ in requests]
                    logits = shape(logits, requests, ahead, only_last=True)
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

    def _head(
        self, k: int, hidden_TD: Tensor, ids_T: Tensor, seq: Sequences, view: ForwardCache
    ) -> tuple[Tensor, Tensor]:
        """As `Decoder.mtp`, natively where the rows are few."""
        if self.native is None or len(ids_T) > MAX_TOKENS:
            return self.model.mtp(k, hidden_TD, ids_T, seq, view)
        assert self.model.config.mtp is not None
        out = self.native.head(k, hidden_TD, ids_T, view)
        return (out if self.model.config.mtp.is_chained else hidden_TD), out

    def _logits(self, normed_MD: Tensor) -> Tensor:
        if self.native is None or normed_MD.dtype != torch.float32 or len(normed_MD) > MAX_TOKENS:
            return self.model.logits(normed_MD)
        return self.native.logits(normed_MD, is_normed=True)

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
