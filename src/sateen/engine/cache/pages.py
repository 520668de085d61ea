"""Who holds which pages: reference counts, what pages are known to contain, and which to take back first.

Numbers only, no memory: `KVCache` owns the rows, `PrefixCache` decides what pages are published under. A page
is free (nothing worth keeping), used (held by some sequences) or cached (published and held by nobody).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence


class Pages:
    """The pages of a cache; every operation costs O(log pages) per page.

    Attributes:
        num_pages: all of them.
        refs: how many sequences hold each page.
        peak_used: most pages that were held at once.
        on_evict: called with the key of a cached page that is taken back for other rows.
    """

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.refs = [0] * num_pages
        self.peak_used = 0
        self.on_evict: Callable[[bytes], None] | None = None
        self._free = list(range(num_pages))  # a heap: low pages first keeps a lone sequence contiguous
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `take` can hand out: free ones, and cached ones that it takes back."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """New pages for one sequence; the caller made sure that so many are available."""
        while len(self._free) < count:
            page, _ = self._cached.popitem(last=False)
            key = self._key_of.pop(page)
            del self._page_of[key]
            heapq.heappush(self._free, page)
            if self.on_evict is not None:
                self.on_evict(key)
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for page in taken:
            self.refs[page] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return taken

    def hold(self, page: int) -> None:
        """One more sequence reads a published page."""
        if self.refs[page] == 0:
            del self._cached[page]
        self.refs[page] += 1
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, pages: Sequence[int]) -> None:
        """A sequence lets go of its pages; published ones stay cached, the last of a sequence go first."""
        for page in reversed(pages):
            self.refs[page] -= 1
            assert self.refs[page] >= 0, f"page {page} was released more often than it was held"
            if self.refs[page] == 0:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    heapq.heappush(self._free, page)

    def publish(self, page: int, key: bytes) -> bool:
        """Makes a held page's content known; False when another page has the same content."""
        assert self.refs[page] > 0
        if key in self._page_of:
            return False
        assert page not in self._key_of, f"page {page} was published twice"
        self._key_of[page], self._page_of[key] = key, page
        return True

    def find(self, key: bytes) -> int | None:
        """The page published under a key."""
        return self._page_of.get(key)

    def is_published(self, page: int) -> bool:
        return page in self._key_of

    def forget(self) -> None:
        """No page's content is known any more; cached ones become free."""
        for page in self._cached:
            heapq.heappush(self._free, page)
        self._cached.clear()
        self._key_of.clear()
        self._page_of.clear()
