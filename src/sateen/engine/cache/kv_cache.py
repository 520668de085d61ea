"""Key/value caches allocated from `config.kv_layouts()`: pages that grow, rings that do not, shared rows.

`KVCache` owns the memory and knows who has which rows; `ForwardCache` is one forward's view of it, and
`PrefixCache` lets later sequences begin where earlier ones have been. Shape letters: R rows of a pool, K
key/value heads, H and V head sizes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sateen.engine.cache.forward_cache import ForwardCache, Rows
from sateen.engine.cache.memory import Memory
from sateen.engine.cache.pages import Pages
from sateen.engine.cache.prefetch import Lane
from sateen.nn.spec import KVLayout

PAGE = 64  # tokens per page
INTEGER_FORMS = ("int8", "int8-half")  # of attention
MEAN_ROWS = 256  # most rows that the mean of int8 keys is taken over


@dataclass(eq=False)
class CacheEntry:
    """One sequence's place in the caches.

    Attributes:
        slot: its ring in every ring layer.
        pages: its pages, the same ones in every paged layer; the first `num_fixed` may be shared.
        length: rows in the trunk's layers.
        head_length: rows in the layers of the MTP heads.
        rows: the paged row of each position that the pages cover.
        mean_rows: rows, from the first, whose mean int8 layers take off the keys; they freeze it with the
            chunk that writes row 0.
        mean_taken: rows that the means of trunk and heads were really taken over.
        num_fixed: pages, from the first, whose rows never change again: shared, or offered for sharing.
    """

    slot: int
    pages: list[int] = field(default_factory=list)
    length: int = 0
    head_length: int = 0
    rows: Rows = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    mean_rows: int = MEAN_ROWS
    mean_taken: list[int] = field(default_factory=lambda: [0, 0])
    num_fixed: int = 0


class Scales(NamedTuple):
    """What turns int8 codes back into numbers, float32: a scale per row and head, a key mean per sequence.

    `k_mean_LKH` has a row per slot.
    """

    k_scale_RK: Tensor
    v_scale_RK: Tensor
    k_mean_LKH: Tensor


class Pool(NamedTuple):
    """The memory of one layer's layout; `ring_rows` is 0 for pages, `scales` is for int8 rows alone."""

    layout: KVLayout
    k_RKH: Tensor
    v_RKV: Tensor
    ring_rows: int
    scales: Scales | None = None

    @property
    def num_bytes(self) -> int:
        codes = self.k_RKH.nbytes + self.v_RKV.nbytes
        return codes + (sum(tensor.nbytes for tensor in self.scales) if self.scales else 0)

    def per_row(self) -> list[Tensor]:
        """The tensors that have a line per row."""
        return [self.k_RKH, self.v_RKV, *(self.scales[:2] if self.scales else ())]


class KVCache:
    """Pools for every layer, and the pages and ring slots that are free.

    Attributes:
        pages: who holds the `num_pages` pages of `PAGE` tokens that each paged layer has.
        num_slots: sequences that fit at once.
        num_draft: rejected tokens a ring must survive, per sequence.
        has_pages: some layer keeps all rows, so contexts take pages.
        has_rings: some layer keeps a window of rows.
        dtype: of the rows.
        is_scaled: they are int8 and come with scales.
        attention: `float` reads rows as floats, `int8` computes with integers, `int8-half` up to the softmax.
        float_layers: those that read floats whatever `attention` says.
        offloads: pages live in host memory, see `staging`; rings stay on the device.
        lane: brings chosen blocks of offloaded pages while layers compute; None: in between.
    """

    def __init__(
        self,
        layouts: Sequence[tuple[KVLayout, ...]],
        *,
        num_trunk_layers: int,
        num_pages: int,
        num_slots: int,
        max_model_len: int,
        num_draft: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        attention: str = "float",
        offloads: bool = False,
        prefetches: bool = False,
    ):
        self.layouts = tuple(layouts)
        self.num_trunk_layers = num_trunk_layers
        self.num_pages = num_pages
        self.num_slots = num_slots
        self.num_draft = num_draft
        self.max_model_len = max_model_len
        self.dtype = dtype
        self.is_scaled = dtype == torch.int8
        self.device = torch.device(device)
        self.attention = attention
        self.offloads = offloads
        self.lane = Lane(self.device) if prefetches else None
        self.page_device = torch.device("cpu") if offloads else self.device
        self.float_layers: frozenset[int] = frozenset()
        self._memory = Memory()
        self.pools: dict[tuple[int, str], Pool] = {}
        self.sources: dict[tuple[int, str], int] = {}
        for index, group in enumerate(self.layouts):
            for layout in group:
                if layout.kind == "shared":
                    assert layout.source is not None
                    self.sources[index, layout.name] = layout.source
                else:
                    self.pools[index, layout.name] = self._pool(index, layout)
        self.has_pages = any(pool.ring_rows == 0 for pool in self.pools.values())
        self.has_rings = any(pool.ring_rows > 0 for pool in self.pools.values())
        self.pages = Pages(num_pages)
        self._free_slots = list(range(num_slots))
        self._peak_slots = 0

    def _ring_rows(self, index: int, layout: KVLayout) -> int:
        # A head's round writes up to 2 * num_draft rows: the accepted ones and those it must redo.
        draft = self.num_draft * (2 if index >= self.num_trunk_layers else 1)
        return layout.rows(self.max_model_len, draft)

    def _pool(self, index: int, layout: KVLayout) -> Pool:
        ring = self._ring_rows(index, layout) if layout.kind == "ring" else 0
        rows = self.num_slots * ring if ring else self.num_pages * PAGE
        shape = rows, layout.num_kv_heads
        device = self.device if ring else self.page_device
        is_pinned = device != self.device and self.device.type == "cuda"
        k = self._memory.zeros((*shape, layout.head_dim), self.dtype, device, is_pinned)
        v = self._memory.zeros((*shape, layout.v_head_dim), self.dtype, device, is_pinned)
        if not self.is_scaled:
            return Pool(layout, k, v, ring)
        k_scale, v_scale = (self._memory.zeros(shape, torch.float32, device, is_pinned) for _ in range(2))
        mean = torch.zeros(self.num_slots, layout.num_kv_heads, layout.head_dim, device=self.device)
        return Pool(layout, k, v, ring, Scales(k_scale, v_scale, mean))

    @property
    def has_integers(self) -> bool:
        """Attention computes with integers, but for `float_layers`."""
        return self.attention in INTEGER_FORMS

    @property
    def reads_codes(self) -> bool:
        """Integer attention takes the rows as they are stored."""
        return self.is_scaled and self.attention == "int8"

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had, those of nobody's sequences that are kept for later prompts included."""
        return self.pages.num_available

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def pages_for(self, length: int) -> int:
        """Pages that a sequence of `length` tokens takes."""
        return -(-length // PAGE) if self.has_pages else 0

    def open(self, num_prompt: int = MEAN_ROWS) -> CacheEntry:
        """A place for a new sequence; the caller made sure that a slot is free.

        The mean of int8 keys is the prompt's: a sequence that is computed again, longer, then gets the same.
        """
        entry = CacheEntry(heapq.heappop(self._free_slots), mean_rows=min(num_prompt, MEAN_ROWS))
        self._peak_slots = max(self._peak_slots, self.num_slots - len(self._free_slots))
        return entry

    def share(self, entry: CacheEntry, pages: Sequence[int]) -> None:
        """Lets a new sequence begin with full pages that others wrote; they are never written again."""
        assert not entry.pages
        for page in pages:
            self.pages.hold(page)
        self._append(entry, pages)
        entry.num_fixed = len(pages)
        entry.length = len(pages) * PAGE
        if len(self.layouts) > self.num_trunk_layers:
            entry.head_length = entry.length

    def reserve(self, entry: CacheEntry, length: int) -> bool:
        """Takes the pages that `length` tokens need; False, and nothing changes, when too few are free."""
        if length <= len(entry.rows):
            return True
        missing = self.pages_for(length) - len(entry.pages)
        if missing > self.pages.num_available:
            return False
        if missing > 0:
            self._append(entry, self.pages.take(missing))
        return True

    def _append(self, entry: CacheEntry, pages: Sequence[int]) -> None:
        entry.pages += pages
        rows = (np.asarray(pages, dtype=np.int64)[:, None] * PAGE + np.arange(PAGE)).ravel()
        entry.rows = np.concatenate([entry.rows, rows])

    def truncate(self, entry: CacheEntry, length: int) -> None:
        """Forgets the trunk's rows from `length` on and gives back pages without rows.

        Rings stay correct down to `num_draft` rows below the longest that the sequence has been.
        """
        assert entry.num_fixed * PAGE <= length <= entry.length
        entry.length = length
        keep = self.pages_for(length)
        if keep == len(entry.pages):
            return
        self.pages.release(entry.pages[keep:])
        del entry.pages[keep:]
        entry.rows = entry.rows[: keep * PAGE]

    def free(self, entry: CacheEntry) -> None:
        """Gives back everything a sequence holds; the entry is empty afterwards."""
        entry.length = entry.head_length = entry.num_fixed = 0
        self.truncate(entry, 0)
        heapq.heappush(self._free_slots, entry.slot)
        entry.slot = -1

    def forward(
        self,
        entries: Sequence[CacheEntry],
        counts: Sequence[int],
        *,
        heads: bool = False,
        gaps: Sequence[bool] | None = None,
    ) -> ForwardCache:
        """The view for one forward that appends `counts[i]` rows to sequence i, in the trunk or in the heads.

        Lengths are advanced here; pages must have been reserved. `gaps` tells sequences whose rings miss the
        rows before: `head_length` was moved on.
        """
        if self.lane is not None:
            self.lane.drain()
        starts = [e.head_length if heads else e.length for e in entries]
        for entry, start, count in zip(entries, starts, counts, strict=True):
            if start == 0:
                entry.mean_taken[heads] = min(count, entry.mean_rows)
            if heads:
                entry.head_length = start + count
            else:
                entry.length = start + count
        return ForwardCache(self, entries, starts, list(counts), gaps)

    def bytes_in_use(self, *, at_peak: bool = False) -> dict[str, int]:
        """Bytes of the pages and rings that sequences hold now, or held at most, per kind of layout."""
        total = {"paged": 0, "ring": 0}
        for pool in self.pools.values():
            total[pool.layout.kind] += self._used_bytes(pool, at_peak)
        return total

    def bytes_in_use_by_layer(self, *, at_peak: bool = False) -> list[int]:
        """The same of each layer, MTP heads after the trunk; 0 for layers that share."""
        total = [0] * len(self.layouts)
        for (index, _), pool in self.pools.items():
            total[index] += self._used_bytes(pool, at_peak)
        return total

    def usage(self) -> dict[str, Any]:
        """Pages and slots by what they are for, and the bytes that sequences hold and held at most."""
        pages = self.pages
        return {
            "page_tokens": PAGE,
            "used_pages": pages.num_used,
            "cached_pages": pages.num_cached,
            "free_pages": pages.num_free,
            "peak_pages": pages.peak_used,
            "used_slots": self.num_slots - len(self._free_slots),
            "free_slots": len(self._free_slots),
            "used_bytes": self.bytes_in_use(),
            "peak_bytes": self.bytes_in_use(at_peak=True),
        }

    def _used_bytes(self, pool: Pool, at_peak: bool) -> int:
        pages = self.pages.peak_used if at_peak else self.pages.num_used
        slots = self._peak_slots if at_peak else self.num_slots - len(self._free_slots)
        rows = slots * pool.ring_rows if pool.ring_rows else pages * PAGE
        means = 0 if pool.scales is None else slots * pool.scales.k_mean_LKH[:1].nbytes
        return rows * row_bytes(pool.layout, self.dtype) + means

    def allocated_bytes(self) -> dict[str, int]:
        """Bytes of the pools per kind of layout, `paged` and `ring`."""
        total = {"paged": 0, "ring": 0}
        for pool in self.pools.values():
            total[pool.layout.kind] += pool.num_bytes
        return total

    @property
    def host_bytes(self) -> int:
        """Bytes of the pools that offloading keeps off the device."""
        return self.allocated_bytes()["paged"] if self.offloads else 0

    def allocated_bytes_by_layer(self) -> list[int]:
        """Bytes of the pools of each layer, MTP heads after the trunk; 0 for layers that share."""
        total = [0] * len(self.layouts)
        for (index, _), pool in self.pools.items():
            total[index] += pool.num_bytes
        return total

    def kv_bytes(self, context: int) -> dict[str, int]:
        """Bytes of one sequence of `context` tokens per kind of layout: whole pages, whole rings."""
        total = {"paged": 0, "ring": 0}
        for pool in self.pools.values():
            rows = pool.ring_rows or self.pages_for(context) * PAGE
            total[pool.layout.kind] += rows * row_bytes(pool.layout, self.dtype)
            if pool.scales is not None:
                total[pool.layout.kind] += pool.scales.k_mean_LKH[:1].nbytes
        return total


def page_bytes(layouts: Sequence[tuple[KVLayout, ...]], dtype: torch.dtype) -> int:
    """Bytes of one page over all paged layers."""
    return PAGE * sum(
        row_bytes(layout, dtype) for group in layouts for layout in group if layout.kind == "paged"
    )


def row_bytes(layout: KVLayout, dtype: torch.dtype) -> int:
    """Bytes of one row in this dtype."""
    return layout.row_bytes(dtype.itemsize, is_scaled=dtype == torch.int8)
