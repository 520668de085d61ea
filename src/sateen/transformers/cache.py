"""The cache of `generate`: every layer's keys and values, joined call by call.

It is as simple as transformers' own dynamic cache and copies as much; windows are not cut. `sateen.LLM` has
paged and ring caches.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from sateen.models.base import ModelConfig
from sateen.nn.attention import LayerCache

Rows = list[tuple[Tensor, Tensor]]


class GrowingCache:
    """Keys and values of a batch between the calls of a model.

    Attributes:
        lengths: real tokens of each sequence so far.
        width: places of each sequence so far, padding included.
        rows: (layer, name) -> keys [S, K, H] and values [S, K, V] of each sequence.
    """

    def __init__(self, config: ModelConfig):
        self.sources = {spec.index: spec.kv_source for spec in config.specs}
        self.lengths: list[int] = []
        self.new: list[int] = []
        self.width = 0
        self.rows: dict[tuple[int, str], Rows] = {}

    def begin(self, counts: list[int], width: int) -> None:
        """Tells how many new tokens of each sequence, of so many places, the next call brings."""
        before = self.lengths or [0] * len(counts)
        self.lengths = [old + new for old, new in zip(before, counts, strict=True)]
        self.new, self.width = counts, self.width + width

    def layer(self, index: int) -> _LayerRows:
        return _LayerRows(self, index)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`width`, under the name that transformers asks for."""
        return self.width

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Puts sequence `beam_idx[i]` in the place of i, as beam search does."""
        order = beam_idx.tolist()
        self.lengths = [self.lengths[i] for i in order]
        self.rows = {key: [rows[i] for i in order] for key, rows in self.rows.items()}

    def visible(self, index: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """All rows of a layer, sequence after sequence, with their offsets."""
        keys, values = zip(*self.rows[index, name], strict=True)
        offsets = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=keys[0].device)
        return torch.cat(keys), torch.cat(values), offsets


class _LayerRows(LayerCache):
    """One layer's view."""

    def __init__(self, cache: GrowingCache, index: int):
        self.cache, self.index = cache, index

    def extend(self, k_TKH: Tensor, v_TKV: Tensor, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        rows: Rows = list(zip(k_TKH.split(self.cache.new), v_TKV.split(self.cache.new), strict=True))
        if old := self.cache.rows.get((self.index, name)):
            rows = [
                (torch.cat([k, new_k]), torch.cat([v, new_v]))
                for (k, v), (new_k, new_v) in zip(old, rows, strict=True)
            ]
        self.cache.rows[self.index, name] = rows
        return self.cache.visible(self.index, name)

    def read(self, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        source = self.cache.sources[self.index]
        assert source is not None
        return self.cache.visible(source, name)
