"""Activation checkpointing: training keeps a layer's inputs and computes the rest again in the backward pass.

A second forward must be the first one over again. Choices by rounded scores could flip, so key blocks and
experts are repeated; rows that another layer published are kept, not computed twice; nothing is reported to
the trainer a second time. Source: Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv
1604.06174), for the idea; what is kept of HySparse and of experts is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sateen.nn.attention.base import LayerLinks, Sequences
from sateen.nn.spec import LayerSpec

Block = Callable[..., Tensor]


@dataclass(frozen=True)
class Recompute:
    """What layers with a `recompute` run their forward through while gradients are on and there is no cache.

    Attributes:
        context: what the second forward runs in besides autocast, which torch restores.
    """

    context: Callable[[], AbstractContextManager[None]] = nullcontext

    def __call__(
        self, block: Block, spec: LayerSpec, x: tuple[Tensor, ...], seq: Sequences, links: LayerLinks
    ) -> Tensor:
        """`block(*x, seq, None, links)`, of which only the inputs are kept.

        Args:
            block: a layer's forward. It must draw no random numbers.
            spec: the layer's; it names the layers whose rows or inputs this one reads.
            x: the layer's own inputs.
            seq: the packed batch.
            links: of this forward.
        """
        lent = _Lent.to(spec, links)
        known: dict[str, Tensor] = {}
        unused = [links]

        def run(*inputs: Tensor) -> Tensor:
            own, others = inputs[: len(x)], inputs[len(x) :]
            if unused:
                return block(*own, seq, None, unused.pop())
            again = lent.links(others)
            again.wants_balance_loss = wants_balance_loss
            if "experts" in known:
                again.forced_router_ids[spec.index] = known["experts"]
            if "blocks" in known:
                again.known_selections[spec.index] = known["blocks"]
            with self.context():
                return block(*own, seq, None, again)

        wants_balance_loss = links.wants_balance_loss
        inputs = (*x, *lent.tensors(links))
        out = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
        for name, chosen in (("experts", links.router_ids), ("blocks", links.selections)):
            if spec.index in chosen:
                known[name] = chosen[spec.index]
        return cast(Tensor, out)


@dataclass(frozen=True)
class _Lent:
    """What a layer reads of layers before it; passed as arguments, so that autograd keeps and checks it."""

    kv: tuple[int, ...]
    selections: tuple[int, ...]
    hidden: tuple[int, ...]

    @staticmethod
    def to(spec: LayerSpec, links: LayerLinks) -> _Lent:
        reads = [i for i in (spec.kv_source, spec.options.get("input_from")) if i is not None]
        published = links.kv, links.selections, links.hidden
        return _Lent(*(tuple(i for i in reads if i in place) for place in published))

    def tensors(self, links: LayerLinks) -> list[Tensor]:
        rows = [tensor for i in self.kv for tensor in links.kv[i]]
        return [
            *rows,
            *(links.selections[i] for i in self.selections),
            *(links.hidden[i] for i in self.hidden),
        ]

    def links(self, tensors: Sequence[Tensor]) -> LayerLinks:
        """Links of their own for the second forward: the inverse of `tensors`."""
        left = iter(tensors)
        return LayerLinks(
            kv={i: (next(left), next(left), next(left)) for i in self.kv},
            selections={i: next(left) for i in self.selections},
            hidden={i: next(left) for i in self.hidden},
        )
