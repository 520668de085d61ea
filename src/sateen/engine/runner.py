"""One step of the engine: a packed batch through the trunk, new tokens out of it, drafts for the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from sateen.engine.cache import KVCache
from sateen.engine.request import Logprob
from sateen.engine.sampler import mask_padding, raw_logprobs
from sateen.engine.scheduler import Chunk
from sateen.engine.speculative import Drafter, DraftJob, verify
from sateen.engine.state import Request
from sateen.models.decoder import Decoder
from sateen.nn.attention import LayerLinks, Sequences

SCORE_NUMBERS = 1 << 24  # logits held at once while scoring


class Runner:
    """Executes chunks on a model and its caches.

    Attributes:
        num_tokens: vocabulary rows that are tokens; the padding rows behind them are never sampled.
        drafter: the MTP heads at work, or None.
        routed_layers: mixtures of experts of the trunk whose choices requests keep; empty for none.
    """

    def __init__(
        self, model: Decoder, cache: KVCache, *, num_tokens: int, drafts: bool, records_routing: bool = False
    ):
        self.model, self.cache, self.num_tokens = model, cache, num_tokens
        trunk = range(model.config.num_hidden_layers)
        self.routed_layers = tuple(sorted(set(model.moe_layers()) & set(trunk))) if records_routing else ()
        self.drafter = Drafter(model, cache, num_tokens) if drafts else None

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> list[tuple[Request, int]]:
        """Computes the chunks and appends what they emit.

        Returns:
            Each request that got new tokens, with their number. Finished ones still hold their rows.
        """
        device = self.model.device
        ids = [token for chunk in chunks for token in chunk.token_ids()]
        counts = [chunk.count for chunk in chunks]
        positions = [t for chunk in chunks for t in range(chunk.start, chunk.start + chunk.count)]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        seq = Sequences(
            torch.tensor(offsets, dtype=torch.int32, device=device),
            torch.tensor(positions, dtype=torch.int64, device=device),
        )
        view = self.cache.forward([chunk.entry for chunk in chunks], counts)
        links = LayerLinks()
        hidden = self.model.trunk(torch.tensor(ids, device=device), seq, view, links)
        emitted = self._emit(chunks, offsets, hidden)
        if self.routed_layers:
            self._record_routes(chunks, offsets, links)
        if self.drafter is not None:
            jobs = [
                DraftJob(chunk.request, chunk.entry, chunk.start, chunk.count, offset, chunk.samples)
                for chunk, offset in zip(chunks, offsets, strict=False)
                if chunk.request.finish_reason is None and chunk.request.remaining > 1
            ]
            self.drafter.run(jobs, hidden)
        return emitted

    def _record_routes(self, chunks: Sequence[Chunk], offsets: list[int], links: LayerLinks) -> None:
        """Hands each request the routes of the rows that stay; rejected drafts are cut off already."""
        routes_TLA = torch.stack([links.router_ids[layer] for layer in self.routed_layers], dim=1).int().cpu()
        for chunk, offset in zip(chunks, offsets, strict=False):
            chunk.request.routed_layers = self.routed_layers
            chunk.request.record_routes(routes_TLA[offset:], chunk.start, chunk.entry.length)

    def _emit(self, chunks: Sequence[Chunk], offsets: list[int], hidden: Tensor) -> list[tuple[Request, int]]:
        """Samples or verifies where a chunk reached the newest token; cuts rejected drafts off the caches."""
        ready = [(chunk, end) for chunk, end in zip(chunks, offsets[1:], strict=True) if chunk.samples]
        if not ready:
            return []
        rows = [row for chunk, end in ready for row in range(end - 1 - len(chunk.drafts), end)]
        picked = hidden if len(rows) == len(hidden) else hidden[torch.tensor(rows, device=hidden.device)]
        raw = self.model.logits(self.model.head_input(picked))
        requests = [chunk.request for chunk, _ in ready]
        drafts = [chunk.drafts for chunk, _ in ready]
        tokens = verify(mask_padding(raw, self.num_tokens), requests, drafts)
        emitted = []
        for (chunk, _), new, logprobs in zip(
            ready, tokens, _logprobs(raw, requests, drafts, tokens), strict=True
        ):
            request = chunk.request
            request.drafts, request.draft_probs = [], None
            taken = request.emit(new, logprobs)
            if chunk.drafts:
                # Drafts behind a stop were never in question: they count neither as drafted nor as accepted.
                cut = taken if request.finish_reason == "stop" else len(chunk.drafts)
                request.draft.record(min(len(chunk.drafts), cut), min(len(new) - 1, taken), taken)
            self.cache.truncate(chunk.entry, len(request.tokens) - 1)
            emitted.append((request, taken))
        return emitted

    @torch.inference_mode()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The raw log-probabilities of all tokens but the first of each sequence, in one forward."""
        device = self.model.device
        ids = torch.tensor([token for sequence in sequences for token in sequence], device=device)
        lengths = [len(sequence) for sequence in sequences]
        seq = Sequences.of_lengths(lengths, device)
        normed = self.model.head_input(self.model.trunk(ids, seq))
        labels = ids.roll(-1)
        chunk = max(1, SCORE_NUMBERS // self.model.config.vocab_size)
        parts = []
        for start in range(0, len(ids), chunk):
            logits = self.model.logits(normed[start : start + chunk]).float()
            y = labels[start : start + chunk]
            parts.append(logits.gather(-1, y[:, None]).squeeze(-1) - logits.logsumexp(-1))
        flat = torch.cat(parts).tolist()
        ends = torch.tensor(lengths).cumsum(0).tolist()
        return [flat[end - length : end - 1] for end, length in zip(ends, lengths, strict=True)]


def _logprobs(
    raw_MV: Tensor, requests: Sequence[Request], drafts: Sequence[list[int]], tokens: Sequence[list[int]]
) -> list[list[dict[int, Logprob]]]:
    """For each request what `raw_logprobs` says of its new tokens; nothing where it did not ask."""
    found: list[list[dict[int, Logprob]]] = [[] for _ in requests]
    firsts = list(accumulate((len(d) + 1 for d in drafts), initial=0))
    wanted: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        if request.params.logprobs is not None:
            wanted.setdefault(request.params.logprobs, []).append(i)
    for num_best, members in wanted.items():
        rows = [firsts[i] + j for i in members for j in range(len(tokens[i]))]
        picked_MV = raw_MV if len(rows) == len(raw_MV) else raw_MV[torch.tensor(rows, device=raw_MV.device)]
        flat = iter(raw_logprobs(picked_MV, [token for i in members for token in tokens[i]], num_best))
        for i in members:
            found[i] = list(islice(flat, len(tokens[i])))
    return found
