"""The trunk of a small step in one native call: no Python between layers, rows read where the cache has them.

`Runner` and `Drafter` use it for few tokens, where a forward in torch is hundreds of small operations; the
torch forward stays the reference and serves everything else. Activations are float32 between the matrix
products, also for models in bfloat16, whose torch forward rounds after every operation. Shape letters: T
tokens, M rows, V vocabulary, D hidden size, L layers with experts, A experts per token.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sateen.engine.cache.forward_cache import ForwardCache
from sateen.engine.cache.kv_cache import PAGE, KVCache
from sateen.engine.native.plan import PlanBuilder, why_not
from sateen.errors import BackendUnavailable, ConfigError, unknown_name
from sateen.models.decoder import Decoder
from sateen.nn.attention import LayerLinks

log = logging.getLogger("sateen.engine")

# Most tokens of a step that runs natively. Its products are as fast as torch's whatever their size and little
# happens between them; beyond, its attention, which takes few queries at a time, costs more than that saves.
MAX_TOKENS = 512
# The same with HySparse: more queries share blocks, which torch's operator then reads once for all of them.
MAX_SPARSE_TOKENS = 32
MAX_MAXIMA = 2**24  # block maxima of an oracle in a step, float32
MODES = ("auto", "native", "torch")


def native_step(mode: str, model: Decoder, cache: KVCache) -> NativeStep | None:
    """The native step of a model and its caches, or None where steps run in torch; says which, once.

    Raises:
        ConfigError: an unknown mode.
        BackendUnavailable: `native` was asked for and cannot run.
    """
    if mode not in MODES:
        raise ConfigError(unknown_name("step", mode, MODES))
    if mode == "torch":
        return None
    reason = NativeStep.why_not(model, cache)
    if reason is None:
        log.info("decode steps run natively")
        return NativeStep(model, cache)
    if mode == "native":
        raise BackendUnavailable(f"step 'native' cannot run this model: {reason}")
    log.info("decode steps run in torch: %s", reason)
    return None


class NativeStep:
    """A model and its caches, ready for native/decode.h.

    The plan points at the tensors, so weights that change in place are used at once. Tensors that moved are
    noticed before the next step, and the plan is built anew.
    """

    def __init__(self, model: Decoder, cache: KVCache):
        self.model, self.cache = model, cache
        self._build()

    @staticmethod
    def why_not(model: Decoder, cache: KVCache) -> str | None:
        """What stands against the native step, or None."""
        return why_not(model, cache)

    def fits(self, view: ForwardCache) -> bool:
        """Whether a forward of this view is one that the native step is good at."""
        tokens = sum(view.counts)
        if not self._oracles:
            return tokens <= MAX_TOKENS
        longest = max(start + count for start, count in zip(view.starts, view.counts, strict=True))
        specs = [self.model.config.specs[layer] for layer in self._oracles]
        maxima = max(s.num_attention_heads * -(-longest // s.options["block_size"]) for s in specs)
        return tokens <= MAX_SPARSE_TOKENS and tokens * maxima <= MAX_MAXIMA

    def _build(self) -> None:
        built = PlanBuilder(self.model, self.cache)
        self._plan, self._tensors, self._routed = built.plan, built.tensors, built.routed
        self._oracles = built.oracles
        self._places = [tensor.data_ptr() for tensor in self._tensors]
        self._float_layers = self.cache.float_layers
        self._dtype = self.model.model.embed_tokens.weight.dtype

    def _current(self) -> Any:
        moved = [tensor.data_ptr() for tensor in self._tensors] != self._places
        if moved or self._float_layers != self.cache.float_layers:
            self._build()
        return self._plan

    def trunk(self, ids: Sequence[int], view: ForwardCache, links: LayerLinks) -> Tensor:
        """Hidden states [T, D] before the final norm, in the model's dtype; the caches get the new rows.

        Args:
            ids: the packed tokens.
            view: the caches' view of this forward, which says where the tokens stand.
            links: gets `router_ids` and `selections`.
        """
        out, routes, lists = self._step(-1, None, np.asarray(ids, dtype=np.int64), view)
        at = 0
        for layer, (heads, columns) in self._oracles.items():
            size = heads * len(ids) * columns
            links.selections[layer] = torch.from_numpy(lists[at : at + size]).view(heads, len(ids), columns)
            at += size
        if self._routed:
            # Every layer of a model has as many experts per token.
            routes_LTA = torch.from_numpy(routes).view(len(self._routed), len(ids), -1)
            links.router_ids.update(zip(self._routed, routes_LTA, strict=True))
        return out.to(self._dtype)

    def head(self, k: int, hidden_TD: Tensor, ids_T: Tensor, view: ForwardCache) -> Tensor:
        """The normed float32 output [T, D] of MTP head k, from 0; arguments as for `Decoder.mtp`."""
        hidden = hidden_TD.float().contiguous().numpy()
        return self._step(k, hidden, ids_T.numpy(), view)[0]

    def _step(self, head: int, hidden: Any, ids: Any, view: ForwardCache) -> tuple[Tensor, Any, Any]:
        plan = self._current()
        routes = np.empty(len(ids) * plan.routes_per_token, dtype=np.int32)
        lists = np.empty(len(ids) * plan.lists_per_token, dtype=np.int32)
        out = torch.empty(len(ids), self.model.config.hidden_size)
        ends = [start + count for start, count in zip(view.starts, view.counts, strict=True)]
        pages = [entry.rows[:end:PAGE] for entry, end in zip(view.entries, ends, strict=True)]
        plan.step(
            head,
            hidden,
            ids,
            _offsets(view.counts),
            np.asarray(view.starts, dtype=np.int64),
            np.concatenate(pages),
            _offsets([len(rows) for rows in pages])[:-1],
            np.asarray([entry.slot for entry in view.entries], dtype=np.int64),
            np.asarray([entry.mean_rows for entry in view.entries], dtype=np.int64),
            out.numpy(),
            routes,
            lists,
            torch.get_num_threads(),
        )
        return out, routes, lists

    def logits(self, hidden_MD: Tensor, *, is_normed: bool = False) -> Tensor:
        """Float32 logits [M, V] of the trunk's hidden states, or of an MTP head's normed ones."""
        x = hidden_MD.float().contiguous()
        out = torch.empty(len(x), self.model.lm_head.out_features)
        self._current().logits(x.numpy(), out.numpy(), is_normed, torch.get_num_threads())
        return out


def _offsets(lengths: Sequence[int]) -> Any:
    return np.cumsum([0, *lengths], dtype=np.int64)
