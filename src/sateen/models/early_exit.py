"""HySparse2's early exit of prefill: rows whose hidden states nobody reads leave the trunk half way.

Where later full layers project their keys from the input of the first one, a token's keys in every layer are
known once that input is. The rows behind it are needed only as far as wanted outputs reach back through
windows. Source: HySparse2 (arXiv 2609.26368); the cut of the first full layer's own queries is ours. Shape
letters: T packed tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from sateen.models.base import ModelConfig
from sateen.nn.attention import Attention, LayerCache, LayerLinks, Sequences

if TYPE_CHECKING:
    from sateen.models.decoder import Cache, Decoder


class NewestRows(Protocol):
    """What a cache offers besides, so that layers can leave rows out."""

    def layer(self, index: int) -> LayerCache: ...

    def newest(self, counts: Sequence[int]) -> NewestRows:
        """The same forward for layers that compute the last `counts[i]` rows of each sequence alone."""
        ...


@dataclass(frozen=True)
class EarlyExit:
    """Which rows of a model's layers are needed.

    Attributes:
        source: the full layer whose input gives all later full layers their keys; up to its keys and values
            every row is computed.
        extra: per layer, rows beyond the wanted ones that it computes. Layer l computes the newest
            `wanted + sum over layers j >= l with a window of (window_j - 1)` rows of a chunk: what windows of
            wanted rows see, and what the rings must hold for rows to come. With one wanted row and n sliding
            layers of window W behind the source, its queries are W + (n - 1)(W - 1) rows. Layers before the
            source compute all and are not counted here.
    """

    source: int
    extra: tuple[int, ...]

    @staticmethod
    def of(config: ModelConfig) -> EarlyExit | None:
        """The exit of a model; None where some layer behind the first full one needs every row."""
        specs = config.specs
        source = next((spec.index for spec in specs if spec.options.get("publishes_input")), None)
        if source is None:
            return None
        extra, rows = [0] * len(specs), 0
        for spec in reversed(specs[source:]):
            layouts = Attention.kinds[spec.attention].kv_layouts(spec)
            is_bridged = spec.index == source or spec.options.get("input_from") == source
            if not is_bridged and any(layout.kind == "paged" for layout in layouts):
                return None
            rows += sum(layout.window - 1 for layout in layouts if layout.window is not None)
            extra[spec.index] = rows
        return EarlyExit(source, tuple(extra))

    def rows(self, layer: int, count: int, wanted: int) -> int:
        """Rows of a chunk of `count` tokens that a layer computes when `wanted` outputs are read."""
        return count if layer < self.source else min(count, wanted + self.extra[layer])

    def trunk(
        self,
        model: Decoder,
        x_TD: Tensor,
        seq: Sequences,
        cache: Cache | None,
        links: LayerLinks,
        wanted: Sequence[int],
    ) -> Tensor:
        """Hidden states [T, D] before the final norm; zeros in all but the newest wanted rows.

        Args:
            model: of the config that this was made for.
            x_TD: embeddings.
            seq: all rows of the forward.
            cache: one with `newest`; layers that keep all rows get keys and values of all, rings those of the
                computed ones.
            links: `hidden` gets all rows of the source's input; other values cover the computed rows.
            wanted: for each sequence how many of its newest rows are read, 1 or more.
        """
        counts = seq.cu_seqlens.diff().tolist()
        whole = cast(NewestRows | None, cache)
        here, view = seq, whole
        place_T = torch.arange(len(x_TD), device=x_TD.device)
        out_TD = torch.zeros_like(x_TD)
        for index, layer in enumerate(model.model.layers):
            if index == self.source:
                norm = cast(nn.Module, layer.input_layernorm)
                links.hidden[index], links.hidden_seq = norm(x_TD), seq
            needed = [self.rows(index, n, r) for n, r in zip(counts, wanted, strict=True)]
            if sum(needed) < len(x_TD):
                rows_T, here = here.newest(needed)
                x_TD, place_T = x_TD[rows_T], place_T[rows_T]
                links.selections = {i: lists[:, rows_T] for i, lists in links.selections.items()}
                links.lists = {i: lists[:, rows_T] for i, lists in links.lists.items()}
                view = whole.newest(needed) if whole is not None else None
            is_bridged = index == self.source or "input_from" in model.config.specs[index].options
            rows = whole if is_bridged else view
            x_TD = layer(x_TD, here, rows.layer(index) if rows is not None else None, links)
        out_TD[place_T] = x_TD
        return out_TD
