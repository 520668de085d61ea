"""One forward's view of the caches: which rows are written and read, computed once per kind of layout.

Every layer of the forward shares the index tensors. Shape letters: T new tokens, S visible rows, B sequences,
K key/value heads, H and V head sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen import ops
from sateen.engine.cache.prefetch import Coming
from sateen.engine.cache.staging import stage_blocks, to_device
from sateen.errors import BackendUnavailable

if TYPE_CHECKING:
    from sateen.engine.cache.kv_cache import CacheEntry, KVCache, Pool
    from sateen.nn.attention import Sequences

Rows = NDArray[np.int64]  # row numbers of a pool


class RowIndex(NamedTuple):
    """Which rows one kind of layout writes and reads in a forward.

    Attributes:
        write: pool rows for the new tokens.
        read: pool rows that are visible, or a range when they are consecutive.
        cu_seqlens_k: int32 [B + 1].
        order: None when new rows are written before reading; otherwise the old rows in `read` and the new
            ones are joined and put in this order, because the new ones do not all fit the ring.
        keep: with `order`, the new tokens that are written.
    """

    write: Tensor
    read: Tensor | slice
    cu_seqlens_k: Tensor
    order: Tensor | None = None
    keep: Tensor | None = None


class Owners(NamedTuple):
    """Whose the new rows are, for int8 rows; the same in every layer.

    Attributes:
        slots: of each sequence.
        sequence_of: sequence number of each new row.
        fresh: for sequences that begin, their slot and the span of new rows that fixes their key mean.
    """

    slots: Tensor
    sequence_of: Tensor
    fresh: list[tuple[int, int, int]]


class ForwardCache:
    """One forward's view of a `KVCache`; implements `models.decoder.Cache`."""

    def __init__(
        self,
        cache: KVCache,
        entries: Sequence[CacheEntry],
        starts: list[int],
        counts: list[int],
        gaps: Sequence[bool] | None = None,
    ):
        self.cache = cache
        self.entries, self.starts, self.counts = entries, starts, counts
        self._gaps = [False] * len(counts) if gaps is None else list(gaps)
        self._index: dict[tuple[int, int], RowIndex] = {}
        self._published: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]] = {}
        self._coming: dict[tuple[int, str], tuple[Coming, Tensor]] = {}
        self._wanted = set(cache.sources.values())

    def layer(self, index: int) -> LayerView:
        return LayerView(self, index)

    def newest(self, counts: Sequence[int]) -> ForwardCache:
        """The same forward for ring layers that compute the last `counts[i]` rows of each sequence alone.

        Where rows are left out, the ones before them count as absent: their keys are not there.
        """
        spans = list(zip(self.starts, self.counts, counts, strict=True))
        starts, gaps = [s + n - c for s, n, c in spans], [c < n for _, n, c in spans]
        view = ForwardCache(self.cache, self.entries, starts, list(counts), gaps)
        view._published, view._coming = self._published, self._coming
        return view

    def extend(self, index: int, name: str, k_TKH: Tensor, v_TKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.cache.has_integers:
            raise BackendUnavailable(
                f"attention {self.cache.attention!r} cannot serve layer {index}, which reads its rows "
                "as floats; use attention='auto'"
            )
        return self._floats(index, name, k_TKH, v_TKV)

    def attend(
        self, index: int, name: str, q_TNH: Tensor, k_TKH: Tensor, v_TKV: Tensor, **options: Any
    ) -> Tensor:
        """See `LayerCache.attend`; options are the operators' own."""
        pool = self.cache.pools[index, name]
        out: Any
        is_float = not self.cache.has_integers or index in self.cache.float_layers
        if self.cache.reads_codes and not is_float and index not in self._wanted:
            rows = self._rows(pool)
            codes = self._codes(pool, rows, k_TKH, v_TKV)
            out = ops.int8_rows_attention(q_TNH, codes, cu_seqlens_k=rows.cu_seqlens_k, **options)
        else:
            k, v, cu_seqlens_k = self._floats(index, name, k_TKH, v_TKV)
            options["cu_seqlens_k"] = cu_seqlens_k
            if is_float:
                out = ops.attention(q_TNH, k, v, **options)
            elif self.cache.attention == "int8-half":
                out = ops.int8_attention(q_TNH, k, v, pv="float", **options)
            else:
                # Values with a scale per token, as in int8 rows: with a scale per channel the first token's
                # small values, which most queries attend to, would get few codes.
                out = ops.int8_rows_attention(q_TNH, ops.quantize_rows(k, v, cu_seqlens_k), **options)
        return cast(Tensor, out)

    def _floats(self, index: int, name: str, k_TKH: Tensor, v_TKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Appends the new rows and returns the visible ones in the dtype of the new ones."""
        pool = self.cache.pools[index, name]
        rows = self._rows(pool)
        if pool.scales is not None:
            k, v = self._codes(pool, rows, k_TKH, v_TKV).floats(rows.cu_seqlens_k, k_TKH.dtype)
        else:
            k, v = _extend(pool.k_RKH, k_TKH, rows), _extend(pool.v_RKV, v_TKV, rows)
        if index in self._wanted:
            self._published[index, name] = k, v, rows.cu_seqlens_k
        return k, v, rows.cu_seqlens_k

    def _codes(self, pool: Pool, rows: RowIndex, k_TKH: Tensor, v_TKV: Tensor) -> ops.Int8Rows:
        """Quantises and appends the new rows; returns the visible ones.

        The chunk that writes a sequence's first row fixes the mean that its keys are stored without.
        """
        scales, owners = pool.scales, self._owners
        assert scales is not None
        for slot, first, last in owners.fresh:
            scales.k_mean_LKH[slot] = k_TKH[first:last].float().mean(0)
        mean_BKH = scales.k_mean_LKH.index_select(0, owners.slots)
        centred = k_TKH.float() - mean_BKH.index_select(0, owners.sequence_of)
        (k8, k_scale), (v8, v_scale) = ops.quantize_int8(centred), ops.quantize_int8(v_TKV)
        return ops.Int8Rows(
            _extend(pool.k_RKH, k8, rows),
            _extend(scales.k_scale_RK, k_scale.squeeze(-1), rows),
            _extend(pool.v_RKV, v8, rows),
            _extend(scales.v_scale_RK, v_scale.squeeze(-1), rows),
            mean_BKH,
        )

    @cached_property
    def _owners(self) -> Owners:
        counts = np.asarray(self.counts, dtype=np.int64)
        ends = np.cumsum(counts)
        fresh = [
            (entry.slot, first := end - count, first + min(count, entry.mean_rows))
            for entry, start, count, end in zip(
                self.entries, self.starts, self.counts, ends.tolist(), strict=True
            )
            if start == 0
        ]
        slots = np.asarray([entry.slot for entry in self.entries], dtype=np.int64)
        return Owners(self._tensor(slots), self._tensor(np.repeat(np.arange(len(counts)), counts)), fresh)

    def lend(self, index: int, name: str, lists_KTn: Tensor, seq: Sequences, block_size: int) -> Tensor:
        """See `LayerCache.lend`: of offloaded rows only the listed blocks stay on the device."""
        if not self.cache.offloads or index not in self._wanted:
            return lists_KTn
        lengths = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        stage = stage_blocks(lists_KTn, seq.cu_seqlens.diff().tolist(), lengths, block_size)
        rows = np.concatenate([e.rows[at] for e, at in zip(self.entries, stage.positions, strict=True)])
        pool, source = self.cache.pools[index, name], torch.from_numpy(rows)
        dtype = self._published.pop((index, name))[0].dtype
        cu_seqlens_k = self._offsets([len(at) for at in stage.positions])
        if self.cache.lane is not None:
            coming = self.cache.lane.fetch([pool.k_RKH, pool.v_RKV], source, dtype)
            self._coming[index, name] = coming, cu_seqlens_k
            return stage.lists_KTn
        k, v = (
            to_device(rows.index_select(0, source), self.cache.device, dtype)
            for rows in (pool.k_RKH, pool.v_RKV)
        )
        self._published[index, name] = k, v, cu_seqlens_k
        return stage.lists_KTn

    def read(self, index: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
        source = self.cache.sources[index, name], name
        if source in self._coming:
            coming, cu_seqlens_k = self._coming.pop(source)
            k, v = coming.wait()
            self._published[source] = k, v, cu_seqlens_k
        return self._published[source]

    def _rows(self, pool: Pool) -> RowIndex:
        key = (pool.layout.window or 0, pool.ring_rows) if pool.ring_rows else (0, 0)
        found = self._index.get(key)
        if found is None:
            found = self._index[key] = self._ring_index(*key) if pool.ring_rows else self._page_index()
        return found

    def _page_index(self) -> RowIndex:
        spans = list(zip(self.entries, self.starts, self.counts, strict=True))
        write = np.concatenate([e.rows[start : start + n] for e, start, n in spans])
        read = np.concatenate([e.rows[: start + n] for e, start, n in spans])
        assert len(write) == sum(self.counts), "rows were not reserved"
        device = self.cache.page_device
        offsets = self._offsets([s + n for _, s, n in spans])
        return RowIndex(torch.from_numpy(write).to(device), self._compact(read, device), offsets)

    def _ring_index(self, window: int, ring: int) -> RowIndex:
        starts, counts = np.asarray(self.starts), np.asarray(self.counts)
        bases = np.asarray([entry.slot * ring for entry in self.entries])
        olds = np.where(self._gaps, 0, np.minimum(starts, window - 1))
        offsets = self._offsets((olds + counts).tolist())
        if counts.max() <= ring - window + 1:
            write = ring_rows(bases, starts, counts, ring)
            read = ring_rows(bases, starts - olds, olds + counts, ring)
            return RowIndex(self._tensor(write), self._tensor(read), offsets)
        kept = np.minimum(counts, ring)
        write = ring_rows(bases, starts + counts - kept, kept, ring)
        read = ring_rows(bases, starts - olds, olds, ring)
        keep_parts, order_parts = [], []
        old_at, new_at = 0, len(read)
        for n, old, last in zip(counts.tolist(), olds.tolist(), kept.tolist(), strict=True):
            keep_parts.append(np.arange(n - last, n) + (new_at - len(read)))
            order_parts += [np.arange(old_at, old_at + old), np.arange(new_at, new_at + n)]
            old_at, new_at = old_at + old, new_at + n
        keep, order = np.concatenate(keep_parts), np.concatenate(order_parts)
        return RowIndex(
            self._tensor(write), self._tensor(read), offsets, self._tensor(order), self._tensor(keep)
        )

    def _tensor(self, rows: Rows) -> Tensor:
        return torch.from_numpy(rows).to(self.cache.device)

    def _compact(self, rows: Rows, device: torch.device) -> Tensor | slice:
        """A range instead of an index where the rows are consecutive: reading is then free."""
        first, last = int(rows[0]), int(rows[-1])
        if last - first == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            return slice(first, last + 1)
        return torch.from_numpy(rows).to(device)

    def _offsets(self, lengths: list[int]) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(self.cache.device)


class LayerView:
    """One layer of a `ForwardCache`; implements `nn.attention.LayerCache`."""

    __slots__ = ("_forward", "_index")

    def __init__(self, forward: ForwardCache, index: int):
        self._forward, self._index = forward, index

    def extend(self, k_TKH: Tensor, v_TKV: Tensor, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        return self._forward.extend(self._index, name, k_TKH, v_TKV)

    def read(self, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        return self._forward.read(self._index, name)

    def lend(self, lists_KTn: Tensor, seq: Sequences, block_size: int, name: str = "kv") -> Tensor:
        return self._forward.lend(self._index, name, lists_KTn, seq, block_size)

    def attend(
        self,
        q_TNH: Tensor,
        k_TKH: Tensor,
        v_TKV: Tensor,
        *,
        cu_seqlens_q: Tensor,
        scale: float | None = None,
        window: int | None = None,
        sink_N: Tensor | None = None,
        name: str = "kv",
    ) -> Tensor:
        return self._forward.attend(
            self._index,
            name,
            q_TNH,
            k_TKH,
            v_TKV,
            cu_seqlens_q=cu_seqlens_q,
            scale=scale,
            window=window,
            sink_N=sink_N,
        )


def ring_rows(bases: Rows, firsts: Rows, counts: Rows, ring: int) -> Rows:
    """Pool rows of `counts[i]` positions from `firsts[i]` on in the ring that begins at `bases[i]`."""
    ends = np.cumsum(counts)
    within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    rows: Rows = np.repeat(bases, counts) + (np.repeat(firsts, counts) + within) % ring
    return rows


def _extend(pool: Tensor, new: Tensor, rows: RowIndex) -> Tensor:
    """Writes the new rows and returns the visible ones in the dtype of `new`, rounded as the pool rounds."""
    stored = new.to(pool.device, pool.dtype)
    if rows.order is None:
        pool.index_copy_(0, rows.write, stored)
        seen = pool[rows.read] if isinstance(rows.read, slice) else pool.index_select(0, rows.read)
        return seen.to(new.dtype) if pool.device == new.device else to_device(seen, new.device, new.dtype)
    assert isinstance(rows.read, Tensor)
    assert rows.keep is not None
    seen = torch.cat([pool.index_select(0, rows.read), stored]).index_select(0, rows.order)
    pool.index_copy_(0, rows.write, stored.index_select(0, rows.keep))
    return seen.to(new.dtype)
