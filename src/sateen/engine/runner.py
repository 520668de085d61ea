"""One step of the engine: a packed batch through the trunk, new tokens out of it, drafts for the next."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.drafts.drafter import Drafter, DraftJob
from sateen.engine.graph_step import graph_step
from sateen.engine.native.step import MAX_TOKENS, native_step
from sateen.engine.recording import Recording
from sateen.engine.sampling.logprobs import completion_logprobs, score_prompt
from sateen.engine.sampling.sampler import mask_padding
from sateen.engine.sampling.shaping import shape
from sateen.engine.sampling.verification import verify
from sateen.engine.scheduler import Chunk
from sateen.engine.state import Request
from sateen.models.decoder import Decoder
from sateen.models.early_exit import EarlyExit
from sateen.nn.attention import LayerLinks, Sequences


class Runner:
    """Executes chunks on a model and its caches.

    Attributes:
        num_tokens: vocabulary rows that are tokens; the padding rows behind them are never sampled.
        drafter: the MTP heads at work, or None.
        routed_layers: mixtures of experts of the trunk whose choices requests keep; empty for none.
        selecting_layers: layers whose choices of key blocks requests keep; empty for none.
        native: runs small steps in one native call; None where every step runs in torch.
        graph: replays decode steps on CUDA; None elsewhere.
        early_exit: leaves out rows of prompts that nobody reads; None where that would change something.
        seconds: of the last step, in the trunk with the choice of tokens and in the MTP heads.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        *,
        num_tokens: int,
        drafts: bool,
        records_routing: bool = False,
        records_selections: bool = False,
        step: str = "auto",
        prefill_exit: bool = True,
    ):
        self.model, self.cache, self.num_tokens = model, cache, num_tokens
        trunk = range(model.config.num_hidden_layers)
        self.routed_layers = tuple(sorted(set(model.moe_layers()) & set(trunk))) if records_routing else ()
        oracles = (spec.index for spec in model.config.specs if spec.options.get("num_blocks"))
        self.selecting_layers = tuple(oracles) if records_selections else ()
        self.native = native_step(step, model, cache)
        self.graph = graph_step(model, cache) if step == "auto" else None
        self.drafter = Drafter(model, cache, num_tokens, self.native) if drafts else None
        self.early_exit = self._early_exit() if prefill_exit else None
        self.seconds = 0.0, 0.0

    @property
    def records(self) -> bool:
        """Requests keep choices of every token, so every token has to be computed in every layer."""
        return bool(self.routed_layers or self.selecting_layers)

    def _early_exit(self) -> EarlyExit | None:
        """The model's, where every choice that is recorded and every later row stays what it was."""
        if self.records or self.cache.is_scaled:  # means of int8 keys are taken over the first rows
            return None
        found = EarlyExit.of(self.model.config)
        if found is None or self.drafter is None:
            return found
        mtp = self.model.config.mtp
        assert mtp is not None
        return None if mtp.is_chained or mtp.layer.window is None else found

    def _wanted(self, chunk: Chunk) -> int:
        """Newest rows of a chunk whose hidden states are read: by sampling, for the prompt, by MTP heads."""
        if chunk.request.needs_prompt_rows:
            return chunk.count
        wanted = 1 + len(chunk.drafts)
        mtp = self.model.config.mtp
        if self.drafter is not None and mtp is not None and mtp.layer.window is not None:
            # The window of the heads' next query, as many rows as they lag behind, and as many for an anchor
            # at a page border that the last drafts reach over.
            wanted += mtp.layer.window - 1 + 2 * self.drafter.num_heads
        return min(wanted, chunk.count)

    @torch.inference_mode()
    def step(self, chunks: Sequence[Chunk]) -> list[tuple[Request, int]]:
        """Computes the chunks and appends what they emit.

        Returns:
            Each request that got new tokens, with their number. Finished ones still hold their rows.
        """
        start = time.perf_counter()
        ids = [token for chunk in chunks for token in chunk.token_ids()]
        counts = [chunk.count for chunk in chunks]
        offsets = [0]
        for count in counts:
            offsets.append(offsets[-1] + count)
        view = self.cache.forward([chunk.entry for chunk in chunks], counts)
        links = LayerLinks()
        wanted = [self._wanted(chunk) for chunk in chunks] if self.early_exit is not None else counts
        if self.native is not None and self.native.fits(view):
            hidden = self.native.trunk(ids, view, links)
        elif self.graph is not None and self.graph.fits(view):
            hidden = self.graph.trunk(ids, view)
        else:
            device = self.model.device
            positions = [t for chunk in chunks for t in range(chunk.start, chunk.start + chunk.count)]
            seq = Sequences(
                torch.tensor(offsets, dtype=torch.int32, device=device),
                torch.tensor(positions, dtype=torch.int64, device=device),
            )
            hidden = self.model.trunk(
                torch.tensor(ids, device=device),
                seq,
                view,
                links,
                wanted=wanted if wanted != counts else None,
            )
        emitted = self._emit(chunks, offsets, hidden)
        self._record(chunks, offsets, links)
        drafting = time.perf_counter()
        if self.drafter is not None:
            jobs = [
                DraftJob(
                    chunk.request, chunk.entry, chunk.start, chunk.count, offset, chunk.samples, computed
                )
                for chunk, offset, computed in zip(chunks, offsets, wanted, strict=False)
                if chunk.request.wants_drafts
                and chunk.request.finish_reason is None
                and chunk.request.remaining > 1
            ]
            if jobs:
                self.drafter.run(jobs, hidden)
        self.seconds = drafting - start, time.perf_counter() - drafting
        return emitted

    def _record(self, chunks: Sequence[Chunk], offsets: list[int], links: LayerLinks) -> None:
        """Hands each request the choices of the rows that stay; rejected drafts are cut off already."""
        spans = list(zip(chunks, offsets, strict=False))
        if layers := self.routed_layers:
            routes_TLA = torch.stack([links.router_ids[i] for i in layers], dim=1).int().cpu()
            for chunk, offset in spans:
                chunk.request.routes = chunk.request.routes or Recording(layers)
                chunk.request.routes.add(routes_TLA[offset:], chunk.start, chunk.entry.length)
        if layers := self.selecting_layers:
            lists = torch.stack([links.selections[i].transpose(0, 1) for i in layers], dim=1).cpu()
            for chunk, offset in spans:
                chunk.request.selections = chunk.request.selections or Recording(layers)
                chunk.request.selections.add(lists[offset:], chunk.start, chunk.entry.length)

    def _emit(self, chunks: Sequence[Chunk], offsets: list[int], hidden: Tensor) -> list[tuple[Request, int]]:
        """Samples or verifies where a chunk reached the newest token; cuts rejected drafts off the caches."""
        for chunk, offset in zip(chunks, offsets, strict=False):
            if chunk.request.needs_prompt_rows:
                score_prompt(self.model, chunk.request, chunk.start, hidden[offset : offset + chunk.count])
        ready = [(chunk, end) for chunk, end in zip(chunks, offsets[1:], strict=True) if chunk.samples]
        if not ready:
            return []
        rows = [row for chunk, end in ready for row in range(end - 1 - len(chunk.drafts), end)]
        picked = hidden if len(rows) == len(hidden) else hidden[torch.tensor(rows, device=hidden.device)]
        raw = self._logits(picked)
        requests = [chunk.request for chunk, _ in ready]
        drafts = [chunk.drafts for chunk, _ in ready]
        shaped = shape(mask_padding(raw, self.num_tokens), requests, drafts)
        tokens = verify(shaped, requests, drafts)
        found = completion_logprobs(raw, shaped, requests, drafts, tokens)
        emitted = []
        for (chunk, _), new, logprobs in zip(ready, tokens, found, strict=True):
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

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.native is not None and len(hidden) <= MAX_TOKENS:
            return self.native.logits(hidden)
        return self.model.logits(self.model.head_input(hidden))
