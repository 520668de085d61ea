"""Copies of what pages cannot share: the window of every ring layer at one position, and int8 key means.

`PrefixCache` makes an anchor where a later prompt may want to begin, and pastes it into the place of the
request that does. Shape letters: W window rows, K key/value heads, H head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sateen.engine.cache.forward_cache import ring_rows
from sateen.engine.cache.kv_cache import CacheEntry, KVCache, Pool


@dataclass(eq=False)
class Anchor:
    """The rings of one sequence as they were before position `end`.

    Attributes:
        end: tokens that the copies know of.
        trunk: per ring layer of the trunk keys [W, K, H], values, and scales of int8 rows.
        heads: the same of the MTP heads.
    """

    end: int
    trunk: list[Tensor]
    heads: list[Tensor] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.trunk, *self.heads))


def copy_window(cache: KVCache, entry: CacheEntry, end: int, *, heads: bool) -> list[Tensor]:
    """Copies of the ring rows before position `end` that a query at `end` sees, of the trunk or the heads.

    The caller made sure, with `keeps_window`, that none of them has been overwritten.
    """
    return [
        tensor.index_select(0, rows)
        for pool, rows in _windows(cache, entry, end, heads=heads)
        for tensor in pool.per_row()
    ]


def paste_window(
    cache: KVCache, entry: CacheEntry, end: int, copies: Sequence[Tensor], *, heads: bool
) -> None:
    """Puts what `copy_window` returned into another sequence's rings."""
    source = iter(copies)
    for pool, rows in _windows(cache, entry, end, heads=heads):
        for tensor in pool.per_row():
            tensor.index_copy_(0, rows, next(source))


def keeps_window(cache: KVCache, end: int, written: int, *, heads: bool) -> bool:
    """Rings that were written up to position `written` still hold the window before `end`."""
    return all(
        max(0, end - window + 1) >= written - pool.ring_rows
        for (index, _), pool in cache.pools.items()
        if (window := pool.layout.window) is not None and (index >= cache.num_trunk_layers) == heads
    )


def copy_means(cache: KVCache, entry: CacheEntry) -> list[Tensor]:
    """Copies of the key means [K, H] that the int8 rows of every layer are stored without."""
    return [pool.scales.k_mean_LKH[entry.slot].clone() for pool in cache.pools.values() if pool.scales]


def paste_means(cache: KVCache, entry: CacheEntry, means: Sequence[Tensor]) -> None:
    """Puts what `copy_means` returned into another sequence's place."""
    scaled = [pool.scales for pool in cache.pools.values() if pool.scales]
    for scales, mean in zip(scaled, means, strict=True):
        scales.k_mean_LKH[entry.slot] = mean


def window_bytes(cache: KVCache) -> int:
    """Most bytes of one anchor."""
    rows = ((pool, pool.layout.window - 1) for pool in cache.pools.values() if pool.layout.window is not None)
    return sum(sum(tensor[:1].nbytes for tensor in pool.per_row()) * count for pool, count in rows)


def _windows(cache: KVCache, entry: CacheEntry, end: int, *, heads: bool) -> Iterator[tuple[Pool, Tensor]]:
    """Each ring of the trunk or the heads with its rows; layers of one shape share the index."""
    known: dict[tuple[int, int], Tensor] = {}
    for (index, _), pool in cache.pools.items():
        window, ring = pool.layout.window, pool.ring_rows
        if window is None or (index >= cache.num_trunk_layers) != heads:
            continue
        if (window, ring) not in known:
            count = min(end, window - 1)
            base, first, length = np.asarray([[entry.slot * ring], [end - count], [count]], dtype=np.int64)
            known[window, ring] = torch.from_numpy(ring_rows(base, first, length, ring)).to(cache.device)
        yield pool, known[window, ring]
