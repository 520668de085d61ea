"""Which layers may attend with integers: each one's error on a text, measured beside float attention.

Shape letters: T tokens, B sequences, N and K query and key/value heads, H and V head sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from sateen import ops
from sateen.engine.cache.kv_cache import INTEGER_FORMS, MEAN_ROWS, KVCache
from sateen.errors import BackendUnavailable, ConfigError
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences
from sateen.ops.native import native, native_available

log = logging.getLogger("sateen.engine")

ATTENTION = ("auto", "float", *INTEGER_FORMS)
PROBE_TOKENS = 512  # of the text that errors are measured on (source: ours)
BUDGET = 0.05  # relative L2 error of a layer's attention (source: ours)
PROBE_TEXT = """The harbour lies on the west side of the island, behind a wall of grey stone. In the morning
the boats come back with herring and crab, and the people of the town wait for them with baskets and carts.
"How much for the two large ones?" asks a woman in a red coat. "Four coins, or three if you take the
small one too." She thinks about it, counts what is in her purse (there are 17 coins, mostly copper) and
takes all three.

Later that day the schoolteacher wrote on the board: 12 + 7 = 19, and 3 x 8 = 24. Then she read from a
book about the sea. Water that is heated expands, rises and gives room to colder water from below; in
this way a current begins which may carry warmth for thousands of kilometres. Nobody in the first row
listened, because a dog had come in through the open door.

def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("sides are not negative")
    return width * height

Notes: 1. Check the ropes before noon. 2. The lamp on the pier needs oil. 3. Write to the office about
the new nets; the old ones are torn in several places and cannot be mended again. At night the wind
turned to the north.
"""


@dataclass(frozen=True)
class Int8Layers:
    """What was measured.

    Attributes:
        attention: `int8` or `int8-half`.
        rows: dtype of the cached rows.
        budget: the largest error with which a layer attends in integers.
        errors: relative L2 error of each layer's int8 attention on the probe, by layer.
        float_layers: those above the budget, which attend in floating point.
        num_tokens: of the probe.
    """

    attention: str
    rows: torch.dtype
    budget: float
    errors: dict[int, float]
    float_layers: tuple[int, ...]
    num_tokens: int

    def as_dict(self) -> dict[str, Any]:
        """For `LLM.stats` and receipts; layers by the names of their modules."""
        return {
            "attention": self.attention,
            "kv_cache_dtype": str(self.rows).removeprefix("torch."),
            "budget": self.budget,
            "probe_tokens": self.num_tokens,
            "errors": {_name(layer): error for layer, error in self.errors.items()},
            "float_layers": [_name(layer) for layer in self.float_layers],
        }


def _name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn"


def choose_attention(
    wanted: str, model: Decoder, cache: KVCache, probe: Sequence[int] | None, budget: float
) -> Int8Layers | None:
    """Tells the cache how its layers attend; None where all of them do in floating point.

    Args:
        wanted: one of `ATTENTION`. `auto` is `int8` over int8 rows wherever that is the faster form: there,
            rows would have to be widened for every step. Else it is `float`.
        probe, budget: see `choose_layers`.

    Raises:
        ConfigError, BackendUnavailable: as `choose_layers`; `auto` never raises the latter.
    """
    if wanted == "auto":
        cache.attention = "float" if not cache.is_scaled or _is_slow(cache) else "int8"
    try:
        found = choose_layers(model, cache, probe, budget)
    except BackendUnavailable as error:
        if wanted != "auto":
            raise
        log.info("attention in floating point over int8 rows: %s", error)
        cache.attention, found = "float", None
    return found


def _is_slow(cache: KVCache) -> bool:
    """Whether attention over codes is slower here than widening them."""
    # Plain code has no fast integer products. On GPUs nothing was measured.
    return cache.device.type != "cpu" or native_available() is not None or native().current_isa() == "generic"


def warn_if_slow(wanted: str, cache: KVCache) -> None:
    """Says where integers were asked for and floating point is faster."""
    if wanted not in INTEGER_FORMS:
        return
    if not cache.reads_codes:
        log.warning(
            "attention %r over rows of %s quantises all of them in every step; "
            "kv_cache_dtype='int8' with attention='int8' does it once",
            cache.attention,
            cache.dtype,
        )
    elif cache.device.type == "cpu" and _is_slow(cache):
        log.warning("attention 'int8' is slower than 'float' on this processor, which lacks AVX2")
    elif cache.device.type == "cpu" and native().current_isa() == "avx2":
        log.warning("attention 'int8' reads prompts more slowly than 'float' on this processor: no AVX-512")


@torch.inference_mode()
def choose_layers(
    model: Decoder, cache: KVCache, probe: Sequence[int] | None, budget: float
) -> Int8Layers | None:
    """Measures the trunk's layers on a probe, tells the cache which attend in floats; None without int8.

    Every layer gets what the layers before it make of the probe in floating point, so that its error is its
    own. The layers of MTP heads, whose output only proposes tokens, are not measured.

    Args:
        probe: token ids; None for ids spread over the vocabulary.

    Raises:
        ConfigError: a budget that is not positive.
        BackendUnavailable: a layer that reads its rows as floats.
    """
    if not budget > 0:
        raise ConfigError(f"int8_budget is {budget}; accepted: a relative error above 0, such as {BUDGET}")
    if not cache.has_integers:
        return None
    if not probe:
        count = min(PROBE_TOKENS, model.config.max_position_embeddings)
        probe = [(7919 * i + 1) % model.config.vocab_size for i in range(count)]
    ids = torch.tensor(list(probe)[: min(PROBE_TOKENS, model.config.max_position_embeddings)])
    view = Probe(cache)
    model.trunk(ids.to(model.device), Sequences.of_lengths([len(ids)], model.device), view)
    above = tuple(layer for layer, error in view.errors.items() if not error <= budget)
    cache.float_layers = frozenset(above)
    found = Int8Layers(cache.attention, cache.dtype, budget, view.errors, above, len(ids))
    if above:
        errors = ", ".join(f"{_name(layer)} {view.errors[layer]:.3f}" for layer in above)
        log.warning("int8 attention errs more than %g in %s: floating point there", budget, errors)
    else:
        log.info("int8 attention errs at most %.3f in any layer", max(view.errors.values(), default=0.0))
    return found


class Probe:
    """A cache that keeps nothing: layers get float attention, the error of the cache's own form is noted."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.errors: dict[int, float] = {}

    def layer(self, index: int) -> ProbeLayer:
        return ProbeLayer(self, index)


class ProbeLayer:
    """One layer of a `Probe`; implements `nn.attention.LayerCache`."""

    def __init__(self, probe: Probe, index: int):
        self._probe, self._index = probe, index

    def extend(self, k_TKH: Tensor, v_TKV: Tensor, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        raise BackendUnavailable(
            f"attention {self._probe.cache.attention!r} cannot serve layer {self._index}, which reads its "
            "rows as floats; use attention='auto'"
        )

    def read(self, name: str = "kv") -> tuple[Tensor, Tensor, Tensor]:
        return self.extend(torch.empty(0), torch.empty(0), name)

    def lend(self, lists_KTn: Tensor, seq: Sequences, block_size: int, name: str = "kv") -> Tensor:
        return lists_KTn

    def attend(
        self, q_TNH: Tensor, k_TKH: Tensor, v_TKV: Tensor, *, cu_seqlens_q: Tensor, **options: Any
    ) -> Tensor:
        options.pop("name", None)
        options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_q}
        want = cast(Tensor, ops.attention(q_TNH, k_TKH, v_TKV, **options))
        cache = self._probe.cache
        k, v = k_TKH, v_TKV
        rows = ops.quantize_rows(k, v, cu_seqlens_q)
        if cache.is_scaled:
            mean = k_TKH[:MEAN_ROWS].float().mean(0)
            (k8, k_scale), (v8, v_scale) = ops.quantize_int8(k_TKH.float() - mean), ops.quantize_int8(v_TKV)
            rows = ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean[None])
            k, v = rows.floats(cu_seqlens_q, k_TKH.dtype)
        got: Any
        if cache.attention == "int8-half":
            got = ops.int8_attention(q_TNH, k, v, pv="float", **options)
        else:
            got = ops.int8_rows_attention(q_TNH, rows, **options)
        gap = (got.float() - want.float()).norm() / want.float().norm()
        self._probe.errors[self._index] = round(float(gap), 5)
        return want
