"""Decode steps at static shapes, which CUDA replays as a graph: one launch per step, not one per operation.

A step has one new token in each of up to 32 sequences. Its tokens, positions, row numbers and lengths stand
in buffers that are filled before each step; the model's own modules run on them, so there is no second
forward. Batches and cached rows are rounded up to buckets, each with a graph of its own: lanes without a
sequence repeat one that has, and the rows behind the last belong to a sequence without queries.

Capturing has never run: no machine of ours has CUDA. What tests hold against the ordinary forward is the same
step without capture, on the CPU. Shape letters: B lanes, T sequences, R row numbers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sateen.engine.cache.forward_cache import ForwardCache, RowIndex
from sateen.engine.cache.kv_cache import KVCache, Pool
from sateen.models.decoder import Decoder
from sateen.nn.attention import Attention, FullAttention, Sequences, SlidingAttention
from sateen.nn.moe import MoE
from sateen.ops.attention.triton import MAX_HEAD
from sateen.ops.triton import triton_available

BATCHES = (1, 2, 4, 8, 16, 32)
LEAST_ROWS = 256  # paged rows of the smallest bucket; the others are powers of two

Kind = tuple[int, int]  # window and rows of a ring; (0, 0) for pages


def graph_step(model: Decoder, cache: KVCache) -> GraphStep | None:
    """The step where it pays and can run, on CUDA; None elsewhere."""
    return GraphStep(model, cache) if model.device.type == "cuda" and why_not(model, cache) is None else None


def why_not(model: Decoder, cache: KVCache) -> str | None:
    """What stands against static steps of this model and cache, or None."""
    if type(model) is not Decoder:
        return f"it is for plain decoders and this is {type(model).__name__}"
    if cache.has_integers or cache.is_scaled:
        return f"it reads float rows and the cache is {cache.dtype} with attention {cache.attention!r}"
    for name, module in model.model.layers.named_modules():
        if isinstance(module, MoE):
            return f"layer {name} routes to experts, whose loads are read on the host"
        if isinstance(module, Attention) and type(module) not in (FullAttention, SlidingAttention):
            return f"layer {name} is {module.spec.attention!r}"
    if model.device.type == "cpu":
        return None
    widest = max(max(pool.layout.head_dim, pool.layout.v_head_dim) for pool in cache.pools.values())
    if widest > MAX_HEAD:
        return f"its attention takes heads of up to {MAX_HEAD} channels and these have {widest}"
    return triton_available(model.model.embed_tokens.weight)


class GraphStep:
    """A model and its caches, ready for steps of one token per sequence.

    Attributes:
        captures: replay graphs; without CUDA the same step runs operation by operation.
        steps: bucket (B, R) -> its buffers and graph.
    """

    def __init__(self, model: Decoder, cache: KVCache):
        self.model, self.cache = model, cache
        self.captures = model.device.type == "cuda"
        self.steps: dict[tuple[int, int], StaticStep] = {}
        self._places: list[int] = []
        self._pool = torch.cuda.graph_pool_handle() if self.captures else None

    def fits(self, view: ForwardCache) -> bool:
        """Whether a forward is such a step: one new token each, and a bucket for them."""
        return len(view.counts) <= BATCHES[-1] and all(count == 1 for count in view.counts)

    @torch.inference_mode()
    def trunk(self, ids: Sequence[int], view: ForwardCache) -> Tensor:
        """Hidden states [T, D] before the final norm; the caches get the new rows.

        Args:
            ids: the newest token of each sequence.
            view: the caches' view of this forward, for which `fits` holds.
        """
        self._forget_moved()
        lanes = next(size for size in BATCHES if size >= len(ids))
        # Idle lanes do the work of the shortest sequence again: the same numbers go to the same rows.
        shortest = min(range(len(ids)), key=view.starts.__getitem__)
        chosen = [*range(len(ids)), *[shortest] * (lanes - len(ids))]
        starts = [view.starts[i] for i in chosen]
        padded = ForwardCache(self.cache, [view.entries[i] for i in chosen], starts, [1] * lanes)
        rows = LEAST_ROWS if self.cache.has_pages else 0
        while self.cache.has_pages and rows < sum(starts) + lanes:
            rows *= 2
        step = self.steps.get((lanes, rows))
        if step is None:
            step = self.steps[lanes, rows] = StaticStep(self.model, self.cache, lanes, rows)
        step.fill([ids[i] for i in chosen], starts, padded)
        return step.run(self._pool)[: len(ids)]

    def _forget_moved(self) -> None:
        """A graph reads weights where they were; weights that change in place stay there."""
        places = [parameter.data_ptr() for parameter in self.model.parameters()]
        if places != self._places:
            self.steps.clear()
            self._places = places


@dataclass
class StaticRows:
    """The row numbers of one kind of layout: `write` [B], `read` [R], `cu_seqlens_k` int32 [B + 2]."""

    write: Tensor
    read: Tensor
    cu_seqlens_k: Tensor

    def fill(self, rows: RowIndex) -> None:
        """Copies the row numbers of B lanes; what was behind them stays, and belongs to no query."""
        assert rows.order is None, "a ring holds the new row beside its window"
        read = rows.read
        if isinstance(read, slice):
            read = torch.arange(read.start, read.stop, device=self.read.device)
        self.write.copy_(rows.write)
        self.read[: len(read)].copy_(read)
        self.cu_seqlens_k[:-1].copy_(rows.cu_seqlens_k)


class StaticCache(ForwardCache):
    """A view of the caches whose row numbers stand in buffers."""

    def __init__(self, cache: KVCache, lanes: int, rows: int):
        super().__init__(cache, [], [], [])
        self.kinds: dict[Kind, StaticRows] = {}
        self.samples: dict[Kind, Pool] = {}
        for pool in cache.pools.values():
            kind = _kind(pool)
            if kind not in self.kinds:
                size = rows if kind == (0, 0) else lanes * kind[0]
                offsets = torch.full((lanes + 2,), size, dtype=torch.int32, device=cache.device)
                write, read = (torch.zeros(n, dtype=torch.int64, device=cache.device) for n in (lanes, size))
                self.kinds[kind] = StaticRows(write, read, offsets)
                self.samples[kind] = pool

    def fill(self, view: ForwardCache) -> None:
        """Takes over the row numbers of a view of B lanes."""
        for kind, rows in self.kinds.items():
            rows.fill(view._rows(self.samples[kind]))

    def _rows(self, pool: Pool) -> RowIndex:
        rows = self.kinds[_kind(pool)]
        return RowIndex(rows.write, rows.read, rows.cu_seqlens_k)


class StaticStep:
    """The buffers of one bucket, and the graph over them."""

    def __init__(self, model: Decoder, cache: KVCache, lanes: int, rows: int):
        self.model = model
        self.view = StaticCache(cache, lanes, rows)
        self.ids, self.positions = torch.zeros(2, lanes, dtype=torch.int64, device=cache.device)
        # The last sequence has no query and the rows that are left over.
        offsets = [*range(lanes + 1), lanes]
        self.cu_seqlens_q = torch.tensor(offsets, dtype=torch.int32, device=cache.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden: Tensor | None = None

    def fill(self, ids: Sequence[int], positions: Sequence[int], view: ForwardCache) -> None:
        """Tokens and positions of the B lanes, and their rows."""
        self.ids.copy_(torch.tensor(ids))
        self.positions.copy_(torch.tensor(positions))
        self.view.fill(view)

    def run(self, pool: Any) -> Tensor:
        """Hidden states [B, D] of what the buffers hold.

        Args:
            pool: the memory that all graphs share, because one runs at a time; None runs without a graph.
        """
        if pool is None:
            return self._forward()
        if self._graph is None:
            self._capture(pool)
        assert self._graph is not None
        assert self._hidden is not None
        self._graph.replay()
        return self._hidden.clone()  # the next replay writes there

    def _forward(self) -> Tensor:
        # Fresh for every forward, because it keeps the rotations of its positions.
        seq = Sequences(self.cu_seqlens_q, self.positions)
        return self.model.trunk(self.ids, seq, self.view)

    def _capture(self, pool: Any) -> None:
        """Runs the step twice, so that kernels are compiled and libraries ready, then records it.

        Running a step again writes the same rows again.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._hidden = self._forward()


def _kind(pool: Pool) -> Kind:
    return (pool.layout.window or 0, pool.ring_rows) if pool.ring_rows else (0, 0)
