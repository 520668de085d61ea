"""Which tokens of which requests the next step computes: continuous batching, first come first served.

A request's work is its tokens that are not in the trunk's cache yet, and the drafts behind them; reading a
prompt and decoding differ only in how many those are. When pages run out the youngest running request gives
back its rows and waits; it computes them again later, with its drafts and random numbers kept, so its tokens
do not change.

Nobody starves. Requests start in the order of their arrival, whatever they cost, and a preempted one stands
before all that have not run. Every running request that decodes gets a step's work in every step. Of those
that read, the oldest gets at least `max_num_batched_tokens - (max_num_seqs - 1) * (1 + drafts)` tokens of
every step, and the oldest of all is never preempted. So the wait of a request is bounded by the tokens of the
requests before it, however many come after it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from sateen.engine.cache.kv_cache import PAGE, CacheEntry, KVCache
from sateen.engine.cache.prefix import Hit, PrefixCache
from sateen.engine.state import Request

MANY = 1 << 30


@dataclass(slots=True)
class Chunk:
    """One request's part of a step.

    Attributes:
        request: whose tokens.
        entry: its rows.
        start: position of the first token.
        count: tokens, drafts included.
        drafts: the drafts at the end of the chunk.
        samples: the chunk reaches the newest token, so new tokens come out of it.
    """

    request: Request
    entry: CacheEntry
    start: int
    count: int
    drafts: list[int]
    samples: bool

    def token_ids(self) -> list[int]:
        """The chunk's input tokens."""
        return self.request.tokens[self.start : self.start + self.count - len(self.drafts)] + self.drafts


class Scheduler:
    """The queues.

    Attributes:
        waiting: keys in order of arrival; adding and removing cost O(1) wherever a request stands.
        running: hold a slot, in order of arrival.
        prefix: what prompts have in common; None computes all of each.
        num_preemptions: so far.
        max_drafts: most drafts of a request that the next step verifies, unless its sampling must repeat.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix: PrefixCache | None = None,
    ):
        self.cache = cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix = prefix
        self.waiting: OrderedDict[Request, None] = OrderedDict()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.max_drafts = MANY

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        """Queues a new request."""
        self.waiting[request] = None

    def remove(self, request: Request) -> None:
        """Takes a finished or aborted request out and frees its rows."""
        if request.entry is not None:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.pop(request, None)

    def restart_all(self) -> None:
        """Sends all running requests back to waiting, because their rows no longer belong to the weights."""
        for request in reversed(self.running):
            self._release(request)
            self._put_first(request)
        self.running.clear()
        if self.prefix is not None:
            self.prefix.clear()

    def plan(self) -> list[Chunk]:
        """The next step's chunks; empty only when no request is left.

        Requests that decode come first, so that reading a long prompt does not hold them up; the rest of the
        token budget goes to prompts. A new request starts when the pages for all of its tokens are free.
        """
        chunks: list[Chunk] = []
        budget = self.max_num_batched_tokens
        preempted = False
        missing = [(request, self._missing(request)) for request in self.running]
        decoding = [request for request, count in missing if count == 1]
        reading = [request for request, count in missing if count > 1]
        for request in decoding + reading:
            if request.entry is None:  # preempted for an older one in this very loop
                continue
            count, drafts = self._take(request, request.entry, budget)
            if count == 0:
                continue
            while not self.cache.reserve(request.entry, request.entry.length + count):
                victim = self.running[-1]
                chunks = [chunk for chunk in chunks if chunk.request is not victim]
                self._preempt(victim)
                preempted = True
                if victim is request:
                    break
            if request.entry is not None:
                chunks.append(self._chunk(request, request.entry, count, drafts))
                budget -= count
        while self.waiting and budget > 0 and not preempted and len(self.running) < self.max_num_seqs:
            request = next(iter(self.waiting))
            hit = self.prefix.match(request) if self.prefix is not None else Hit()
            if not self._can_start(request, hit, budget):
                break
            entry = self._start(request, hit)
            count, drafts = self._take(request, entry, budget)
            chunks.append(self._chunk(request, entry, count, drafts))
            budget -= count
        assert chunks or not (self.running or self.waiting), "nothing fits: sizes were not validated"
        return chunks

    def advance(self, chunks: Sequence[Chunk]) -> None:
        """Makes the rows of a step known to later prompts; its requests still hold them."""
        if self.prefix is not None:
            for chunk in chunks:
                written = chunk.start + max(chunk.count, self.cache.num_draft)
                self.prefix.advance(chunk.request, chunk.entry, written, samples=chunk.samples)

    def _can_start(self, request: Request, hit: Hit, budget: int) -> bool:
        if hit.is_coming:  # the next pages are being read this very moment: they are there in some steps
            return False
        length, drafts = len(request.tokens), len(self._drafts(request))
        if length - len(hit.pages) * PAGE == 1 and 1 + drafts > budget:
            return False
        missing = self.cache.pages_for(length + drafts) - len(hit.pages)
        taken = sum(self.cache.pages.refs[page] == 0 for page in hit.pages)  # counted as free until they are
        return missing + taken <= self.cache.num_free_pages

    def _start(self, request: Request, hit: Hit) -> CacheEntry:
        del self.waiting[request]
        self.running.append(request)
        request.entry = entry = self.cache.open(request.num_prompt)
        if self.prefix is not None:
            self.prefix.begin(request, entry, hit)
        # All of its pages at once: a prompt that has begun is not interrupted by younger ones.
        has_room = self.cache.reserve(entry, len(request.tokens) + len(self._drafts(request)))
        assert has_room
        return entry

    def _missing(self, request: Request) -> int:
        return len(request.tokens) - (request.entry.length if request.entry else 0)

    def _drafts(self, request: Request) -> list[int]:
        """The drafts worth verifying: one token of each pass is the target's own."""
        if not request.drafts:
            return []
        most = len(request.drafts) if request.params.is_repeatable else self.max_drafts
        return request.drafts[: min(most, request.remaining - 1)]

    def _take(self, request: Request, entry: CacheEntry, budget: int) -> tuple[int, list[int]]:
        """How many tokens of a request fit the budget, and the drafts among them."""
        missing, drafts = len(request.tokens) - entry.length, self._drafts(request)
        wanted = missing + len(drafts)
        room = budget if self.prefix is None else self.prefix.room(entry, budget)
        if wanted <= room:
            return wanted, drafts
        # The newest token goes with all its drafts or waits with them.
        return min(room, missing - 1), []

    def _chunk(self, request: Request, entry: CacheEntry, count: int, drafts: list[int]) -> Chunk:
        end = entry.length + count - len(drafts)
        return Chunk(request, entry, entry.length, count, drafts, samples=end == len(request.tokens))

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self._put_first(request)
        self.num_preemptions += 1

    def _put_first(self, request: Request) -> None:
        self.waiting[request] = None
        self.waiting.move_to_end(request, last=False)

    def _release(self, request: Request) -> None:
        assert request.entry is not None
        if self.prefix is not None:
            self.prefix.end(request.entry)
        self.cache.free(request.entry)
        request.entry = None
