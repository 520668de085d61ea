"""The interface every attention kind implements, and what flows through it.

One packed `forward` serves training (no cache), prefill and decode (a cache): keys and values come back from
the cache as a packed tensor with their own offsets, so a layer never asks how they are stored. Shape letters:
T query tokens (packed over sequences), S key tokens, N query heads, K key/value heads, H and V head sizes,
D hidden size, A experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from sateen import ops
from sateen.nn.rotary import rotary_tables
from sateen.nn.spec import KVLayout, LayerSpec


@dataclass
class Sequences:
    """The packed batch as the layers see it.

    Attributes:
        cu_seqlens: int32 [B + 1], offsets of each sequence's query tokens; first 0, last T.
        position_ids: int64 [T], the absolute position of each query token in its sequence.
    """

    cu_seqlens: Tensor
    position_ids: Tensor
    _rotary: dict[tuple[float, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def of_lengths(cls, lengths: list[int], device: torch.device | str | None = None) -> Sequences:
        """Fresh sequences of these lengths, each starting at position 0."""
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        positions = (
            torch.cat([torch.arange(n) for n in lengths]) if lengths else torch.zeros(0, dtype=torch.int64)
        )
        return cls(offsets.to(device), positions.to(device))

    def newest(self, counts: list[int]) -> tuple[Tensor, Sequences]:
        """The last `counts[i]` rows of every sequence: where they stand [T'], and they alone."""
        offsets = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        ends = self.cu_seqlens[1:].tolist()
        spans = [torch.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        rows = torch.cat(spans).to(self.position_ids.device) if spans else self.position_ids
        return rows, Sequences(offsets.to(self.cu_seqlens.device), self.position_ids[rows])

    def rotary(self, theta: float, dim: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, dim] in float32; computed once per forward and base."""
        key = (theta, dim)
        if key not in self._rotary:
            self._rotary[key] = rotary_tables(self.position_ids, theta, dim)
        return self._rotary[key]


class LayerCache(Protocol):
    """One layer's view of the engine's cache during one forward."""

    def extend(self, k_TKH: Tensor, v_TKV: Tensor, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        """Appends the new rows; returns all visible keys [S,K,H], values [S,K,V] and their cu_seqlens [B+1].

        The newest key of each sequence is its last query token, so masks are right-aligned. A ring returns at
        least the rows that the window of the oldest new query needs.
        """
        ...

    def read(self, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        """The visible keys and values that another layer already appended (`shared` layouts)."""
        ...

    def lend(self, lists_KTn: Tensor, seq: Sequences, block_size: int, name: str = "kv") -> Tensor:
        """Called when a layer's lists are known: the lists as they count the keys that `read` returns.

        A cache that keeps rows elsewhere brings the listed blocks of `block_size` keys near.
        """
        return lists_KTn

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
        """Appends the new rows; returns the attention [T,N,V] of the queries over all visible ones.

        Only the cache knows in which form it keeps rows, so it picks the operator that reads them.
        """
        k, v, cu_seqlens_k = self.extend(k_TKH, v_TKV, name)
        return ops.attention(  # type: ignore[return-value]
            q_TNH,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=scale,
            window=window,
            sink_N=sink_N,
        )


@dataclass
class LayerLinks:
    """The only way a layer talks to later ones, to the trainer and to replay; fresh for every forward.

    Attributes:
        kv: layer index -> (k_SKH, v_SKV, cu_seqlens_k) published for layers that share them.
        selections: layer index -> int32 [K, T, n] key blocks chosen by an oracle layer.
        lists: the same as layers that read the keys count them, where a cache lends only some of these.
        forced_selections: layer index -> int32 [K, T, n] key blocks to use instead of choosing; tokens whose
            lists are all -1 choose freely.
        known_selections: layer index -> the lists that this very forward chose, where it is computed again.
        hidden: layer index -> [T, D] normalised input published for layers that project keys from it.
        hidden_seq: the rows of `hidden`, where layers behind compute fewer of them.
        router_ids: layer index -> [T, A] experts chosen in this forward.
        forced_router_ids: layer index -> [T, A] experts to use instead of choosing; -1 rows choose freely.
        expert_counts: layer index -> int64 [E] tokens each expert received.
        balance_losses: one scalar per MoE layer, filled while `wants_balance_loss`.
        wants_balance_loss: compute the sequence-level balance loss.
    """

    kv: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    selections: dict[int, Tensor] = field(default_factory=dict)
    lists: dict[int, Tensor] = field(default_factory=dict)
    forced_selections: dict[int, Tensor] = field(default_factory=dict)
    known_selections: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)
    hidden_seq: Sequences | None = None
    router_ids: dict[int, Tensor] = field(default_factory=dict)
    forced_router_ids: dict[int, Tensor] = field(default_factory=dict)
    expert_counts: dict[int, Tensor] = field(default_factory=dict)
    balance_losses: list[Tensor] = field(default_factory=list)
    wants_balance_loss: bool = False


class Attention(nn.Module):
    """The base of every attention kind; subclasses register under the name `config.json` uses."""

    kinds: ClassVar[dict[str, type[Attention]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            Attention.kinds[kind] = cls

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__()
        self.spec = spec

    @staticmethod
    def kv_layouts(spec: LayerSpec) -> tuple[KVLayout, ...]:
        """What a cache must allocate for a layer of this kind."""
        raise NotImplementedError

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        """The layer's output [T, D]; `x_TD` is already normalised."""
        raise NotImplementedError
