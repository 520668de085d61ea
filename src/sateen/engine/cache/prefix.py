"""Prefix reuse: a prompt that begins like an earlier one starts where that one's rows are still known.

Full layers share pages. A page is published under a hash of all tokens that its rows depend on: those up to
its end and, where K tokens are drafted per pass, the K after it, because row t of the last MTP head read
token t + K. So a page that matches is right for the heads as well, and nothing in it is written again.
Rings cannot be shared, they hold only the newest window: an `Anchor` keeps a copy at a page border, and reuse
begins at the last border that has one. Borders that get one: the last of a prompt, the one up to which a
prompt matched the pages of an earlier one, and the newest one of an answer; the first two are ends of chunks.

Tokens and acceptance are those of an engine without reuse; int8 rows lean on a mean over the first rows, so
they are reused only where all of those are the same. Admitting recurrent states where prompts branch and at
their ends is Marconi's policy (arXiv 2411.19379); windows as the state and draft heads are ours.
"""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b

from torch import Tensor

from sateen.engine.cache.anchors import (
    Anchor,
    copy_means,
    copy_window,
    keeps_window,
    paste_means,
    paste_window,
    window_bytes,
)
from sateen.engine.cache.kv_cache import MEAN_ROWS, PAGE, CacheEntry, KVCache
from sateen.engine.state import Request

log = logging.getLogger("sateen.engine")

KEY_BYTES = 16
ANCHORS_PER_SLOT, ANCHOR_SHARE = 2, 8  # of the default bound of anchors


@dataclass
class Hit:
    """What is known of a request's tokens.

    Attributes:
        pages: published pages to begin with.
        anchor: the rings at their end; None where the model has none.
        means: key means of int8 rows; None for others.
        stops: positions at which a chunk should end because an anchor is wanted there.
        claims: keys of the pages that the request will publish while it reads its tokens.
        is_coming: a running request is just reading the next page.
    """

    pages: list[int] = field(default_factory=list)
    anchor: Anchor | None = None
    means: list[Tensor] | None = None
    stops: list[int] = field(default_factory=list)
    claims: list[bytes] = field(default_factory=list)
    is_coming: bool = False


@dataclass(eq=False)
class Progress:
    """How far the pages of one running request have been published.

    Attributes:
        stops, claims: as in `Hit`, what is left of them.
        anchored: border of its newest anchor.
        pending: an anchor whose MTP heads have not reached the border yet.
        rolling: key of the anchor in its answer; a newer one takes its place.
    """

    stops: list[int]
    claims: list[bytes]
    anchored: int
    pending: Anchor | None = None
    rolling: bytes | None = None


class PrefixCache:
    """Finds and keeps what prompts have in common.

    Attributes:
        hit_tokens: tokens whose rows were reused, so far.
        looked_up_tokens: tokens of the requests that were started, so far.
        anchors: by key, the least recently used first.
        anchor_bytes: what they hold now.
        max_anchor_bytes: what they may hold.
    """

    def __init__(self, cache: KVCache, *, max_anchor_bytes: int):
        self.cache = cache
        self.lookahead = cache.num_draft
        self.max_anchor_bytes = max_anchor_bytes
        self.hit_tokens = self.looked_up_tokens = self.anchor_bytes = 0
        self.anchors: OrderedDict[bytes, Anchor] = OrderedDict()
        self._means: dict[bytes, list[Tensor]] = {}
        self._claims: dict[bytes, Progress] = {}
        self._running: dict[CacheEntry, Progress] = {}
        self._least = MEAN_ROWS // PAGE if cache.is_scaled else 1  # pages; fewer are not reused
        cache.pages.on_evict = self._evicted

    def keys(self, request: Request, count: int) -> list[bytes]:
        """Keys of a request's first pages, kept with it; all tokens that they cover must be known."""
        keys, tokens = request.page_keys, request.tokens
        while len(keys) < count:
            at = len(keys)
            last = keys[-1] if keys else _digest(b"", tokens[: self.lookahead])
            keys.append(_digest(last, tokens[at * PAGE + self.lookahead : (at + 1) * PAGE + self.lookahead]))
        return keys[:count]

    def match(self, request: Request) -> Hit:
        """What a waiting request could begin with; its last token is always computed."""
        known = len(request.tokens)
        keys = self.keys(request, max(0, known - max(1, self.lookahead)) // PAGE)
        if request.needs_prompt_rows or (self.cache.is_scaled and request.num_prompt < MEAN_ROWS):
            return Hit(stops=self._stops(len(keys), 0, 0), claims=keys)
        pages: list[int] = []
        for key in keys:
            page = self.cache.pages.find(key)
            if page is None:
                break
            pages.append(page)
        matched = used = len(pages)
        if self.cache.has_rings:
            while used and keys[used - 1] not in self.anchors:
                used -= 1
        if used < self._least:
            used = 0
        return Hit(
            pages=pages[:used],
            anchor=self.anchors[keys[used - 1]] if used and self.cache.has_rings else None,
            means=self._means[keys[self._least - 1]] if used and self.cache.is_scaled else None,
            stops=self._stops(len(keys), matched, used),
            claims=keys[matched:],
            is_coming=matched < len(keys) and keys[matched] in self._claims,
        )

    def _stops(self, last: int, matched: int, used: int) -> list[int]:
        if not self.cache.has_rings:
            return []
        least = max(used + 1, self._least)
        return [border * PAGE for border in sorted({matched, last}) if border >= least]

    def begin(self, request: Request, entry: CacheEntry, hit: Hit) -> None:
        """Gives a fresh entry what the request begins with."""
        if hit.pages:
            self.cache.share(entry, hit.pages)
            if hit.anchor is not None:
                paste_window(self.cache, entry, hit.anchor.end, hit.anchor.trunk, heads=False)
                paste_window(self.cache, entry, hit.anchor.end, hit.anchor.heads, heads=True)
                self.anchors.move_to_end(request.page_keys[len(hit.pages) - 1])
            if hit.means is not None:
                paste_means(self.cache, entry, hit.means)
                entry.mean_taken = [MEAN_ROWS, MEAN_ROWS]
        if request.num_cached_tokens is None:
            request.num_cached_tokens = min(entry.length, request.num_prompt)
        self.hit_tokens += entry.length
        self.looked_up_tokens += len(request.tokens)
        progress = Progress(hit.stops, [], anchored=entry.length)
        for key in hit.claims:
            if key not in self._claims:
                self._claims[key] = progress
                progress.claims.append(key)
        self._running[entry] = progress

    def room(self, entry: CacheEntry, count: int) -> int:
        """At most `count`: the tokens up to the next stop, if one lies before the end of the chunk."""
        stops = self._running[entry].stops
        while stops and stops[0] <= entry.length:
            del stops[0]
        return min(count, stops[0] - entry.length) if stops else count

    def advance(self, request: Request, entry: CacheEntry, written: int, *, samples: bool) -> None:
        """Publishes what became full in a step and copies the rings where an anchor is wanted.

        Args:
            request: with the step's tokens.
            entry: its rows; `entry.length` is cut to the accepted ones.
            written: no row of the trunk's rings from this position on has been written.
            samples: the step reached the newest token.
        """
        progress = self._running[entry]
        known = len(request.tokens)
        done = min(entry.length, known - self.lookahead)
        if self.lookahead:
            done = min(done, entry.head_length)
        if self.cache.has_rings:
            self._copy_rings(request, entry, progress, done, written, samples)
        full = done // PAGE
        if full > entry.num_fixed and self._may_publish(entry):
            keys = self.keys(request, full)
            for at in range(entry.num_fixed, full):
                is_new = self.cache.pages.publish(entry.pages[at], keys[at])
                if is_new and self.cache.is_scaled and at + 1 == self._least:
                    self._means[keys[at]] = copy_means(self.cache, entry)
                if self._claims.get(keys[at]) is progress:
                    del self._claims[keys[at]]
            entry.num_fixed = full
        if samples:
            self._unclaim(progress)

    def _may_publish(self, entry: CacheEntry) -> bool:
        """False for int8 rows whose key means depend on fewer rows than the first that are shared."""
        if not self.cache.is_scaled:
            return True
        return min(entry.mean_taken[: 2 if self.lookahead else 1]) == MEAN_ROWS

    def _copy_rings(
        self, request: Request, entry: CacheEntry, progress: Progress, done: int, written: int, samples: bool
    ) -> None:
        border = entry.length // PAGE * PAGE
        is_wanted = border in progress.stops or samples
        if border > progress.anchored and is_wanted:
            progress.pending = None
            if keeps_window(self.cache, border, written, heads=False):
                progress.pending = Anchor(border, copy_window(self.cache, entry, border, heads=False))
            progress.anchored = border
        anchor = progress.pending
        if anchor is None or done < anchor.end:
            return
        progress.pending = None
        if self.lookahead:
            head_written = max(entry.head_length, len(request.tokens) - 1 if samples else 0)
            if not keeps_window(self.cache, anchor.end, head_written, heads=True):
                return
            anchor.heads = copy_window(self.cache, entry, anchor.end, heads=True)
        if not self._may_publish(entry):
            return
        key = self.keys(request, anchor.end // PAGE)[-1]
        if anchor.end > request.num_prompt:
            if progress.rolling is not None:
                self._drop(progress.rolling)
            progress.rolling = None if key in self.anchors else key
        self._keep(key, anchor)

    def _keep(self, key: bytes, anchor: Anchor) -> None:
        if key in self.anchors:
            self.anchors.move_to_end(key)
            return
        self.anchors[key] = anchor
        self.anchor_bytes += anchor.num_bytes
        while self.anchor_bytes > self.max_anchor_bytes:
            self._drop(next(iter(self.anchors)))

    def _drop(self, key: bytes) -> None:
        anchor = self.anchors.pop(key, None)
        if anchor is not None:
            self.anchor_bytes -= anchor.num_bytes

    def _evicted(self, key: bytes) -> None:
        self._drop(key)
        self._means.pop(key, None)

    def end(self, entry: CacheEntry) -> None:
        """A request gives back its rows; call it before they are freed."""
        self._unclaim(self._running.pop(entry))

    def _unclaim(self, progress: Progress) -> None:
        for key in progress.claims:
            if self._claims.get(key) is progress:
                del self._claims[key]
        progress.claims.clear()

    def clear(self) -> None:
        """Forgets everything, because the weights are others now; no request may be running."""
        assert not self._running
        self.cache.pages.forget()
        self.anchors.clear()
        self._means.clear()
        self.anchor_bytes = 0

    def stats(self) -> dict[str, int]:
        """Tokens looked up and reused so far, and what is kept now."""
        return {
            "looked_up_tokens": self.looked_up_tokens,
            "hit_tokens": self.hit_tokens,
            "cached_pages": self.cache.pages.num_cached,
            "anchors": len(self.anchors),
            "anchor_bytes": self.anchor_bytes,
            "max_anchor_bytes": self.max_anchor_bytes,
        }


def prefix_cache_for(
    cache: KVCache, *, wanted: bool, records_choices: bool, max_anchor_bytes: int | None
) -> PrefixCache | None:
    """The prefix cache of an engine, or None with the reason in the log.

    Args:
        cache: its caches.
        wanted: what the user said.
        records_choices: outputs carry the experts or key blocks of every token, so every token has to be
            computed.
        max_anchor_bytes: None for two windows per slot or an eighth of the pages, whichever is more.
    """
    if not wanted:
        return None
    if records_choices:
        log.info(
            "prefix cache is off: routing or lists of every token are recorded, so every token is computed"
        )
        return None
    if not cache.has_pages:
        log.info("prefix cache is off: no layer keeps all rows, so there are no pages to share")
        return None
    if max_anchor_bytes is None:
        pages = cache.allocated_bytes()["paged"] // ANCHOR_SHARE
        max_anchor_bytes = max(ANCHORS_PER_SLOT * cache.num_slots * window_bytes(cache), pages)
    return PrefixCache(cache, max_anchor_bytes=max_anchor_bytes)


def _digest(last: bytes, tokens: list[int]) -> bytes:
    return blake2b(last + array("q", tokens).tobytes(), digest_size=KEY_BYTES).digest()
