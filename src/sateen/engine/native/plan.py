"""A model and its caches as the kernels of native/decode.h take them: pointers to weights, vectors and rows.

`native_step` builds a plan once and again when tensors have moved. What is refused here runs in torch. Shape
letters: T tokens, E experts, F and D the output and input width of a matrix.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from sateen.engine.cache.kv_cache import PAGE, KVCache, Pool
from sateen.engine.native.forms import form_of, mixed, projections
from sateen.models.decoder import Decoder, DecoderLayer
from sateen.nn.attention import Attention
from sateen.nn.attention.full import FullAttention, SlidingAttention
from sateen.nn.attention.hysparse import GatedSlidingAttention, OracleAttention, SparseAttention
from sateen.nn.mlp import SwiGLU
from sateen.nn.moe import Experts, MoE, Router
from sateen.nn.mtp import MTPHead
from sateen.nn.norm import RMSNorm
from sateen.nn.quant.int8 import IntegerExperts
from sateen.nn.rotary import rotary_frequencies
from sateen.nn.spec import LayerSpec
from sateen.ops.attention_and_blocks.reference import recent_blocks
from sateen.ops.native import native, native_available

ATTENTION = (FullAttention, SlidingAttention, GatedSlidingAttention, OracleAttention, SparseAttention)
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def blocks(model: Decoder, cache: KVCache) -> list[nn.Module]:
    """The layers that have a cache: the trunk's, then the MTP heads at work."""
    layers = model.model.layers
    return [*layers, *model.mtp_heads()[: len(cache.layouts) - len(layers)]]


def why_not(model: Decoder, cache: KVCache) -> str | None:
    """What stands against a plan, or None."""
    if model.device.type != "cpu":
        return f"it is for the CPU and the model is on {model.device.type}"
    if type(model) is not Decoder:
        return f"it is for plain decoders and this is {type(model).__name__}"
    if cache.dtype not in ROW_DTYPES or (cache.has_integers and not cache.reads_codes):
        return f"it has no attention {cache.attention!r} over rows of {cache.dtype}"
    for index, block in enumerate(blocks(model, cache)):
        attention = cast(Attention, block.self_attn)
        if type(attention) in (OracleAttention, SparseAttention) and (cache.is_scaled or cache.offloads):
            rows = "int8" if cache.is_scaled else "offloaded"
            return f"layer {index}: {attention.spec.attention!r} does not read {rows} rows"
        for name, module in block.named_modules():
            if reason := _unfit(module):
                return f"layer {index}: {name or 'it'} {reason}"
    if type(model.model.norm) is not RMSNorm:
        return f"the final norm is {type(model.model.norm).__name__}"
    if form_of(model.model.embed_tokens) is None or form_of(model.lm_head) is None:
        return "the embedding or output matrix is stored in another way"
    return native_available()


def _unfit(module: nn.Module) -> str | None:
    """Why a part of a layer cannot run natively, or None."""
    if isinstance(module, Attention):
        if type(module) not in ATTENTION:
            return f"is {module.spec.attention!r}"
        options = module.spec.options
        if not options.get("share_kv_sa", True) or options.get("share_kv_swa", False):
            return "reads other rows than HySparse's layers do"
        if options.get("aggregate", "max") != "max":
            return "ranks blocks by the mean of its heads"
        if module.spec.rotary_dim % 2 or options.get("swa_rotary_dim", 0) % 2:
            return "rotates an odd number of channels"
        return mixed(*(form_of(x) for x in projections(module).values() if x is not None))
    if isinstance(module, SwiGLU):
        return mixed(form_of(module.gate_proj), form_of(module.up_proj))
    if isinstance(module, (Experts, IntegerExperts)):
        forms = [form_of(module, f"{part}_proj") for part in ("gate", "up", "down")]
        return "is stored in another way" if None in forms else mixed(*forms[:2])
    if type(module) in (MTPHead, DecoderLayer, MoE, Router, RMSNorm) or form_of(module) is not None:
        return None
    return f"is {type(module).__name__} or stored in another way"


def _pool(cache: KVCache, index: int, spec: LayerSpec) -> Pool:
    """The rows of a layer; where it has none of its own, those that it reads."""
    name = "kv" if spec.kv_source is None else "swa"
    return cache.pools[(index, name) if (index, name) in cache.pools else (cast(int, spec.kv_source), "kv")]


class PlanBuilder:
    """Builds a plan.

    Attributes:
        plan: the native object; it keeps the memory of all tensors alive.
        tensors: those whose place the plan relies on.
        routed: layers of the trunk with experts, in order.
        oracles: layers that list key blocks -> columns of their lists, in order.
    """

    def __init__(self, model: Decoder, cache: KVCache):
        self.tensors: list[Tensor] = []
        self.routed: list[int] = []
        self.oracles: dict[int, tuple[int, int]] = {}
        self._angles: dict[tuple[float, int], int] = {}
        self.plan = native().DecodePlan(model.config.hidden_size, model.config.rms_norm_eps, PAGE)
        for index, block in enumerate(blocks(model, cache)):
            attention = cast(Attention, block.self_attn)
            pool = _pool(cache, index, attention.spec)
            if isinstance(block, MTPHead):
                numbers = self._head(block)
            else:
                assert isinstance(block, DecoderLayer)
                numbers = {"mlp_norm": self._norm(block.post_attention_layernorm)} | self._mlp(block.mlp)
                if isinstance(block.mlp, MoE):
                    self.routed.append(index)
            numbers |= {"input_norm": self._norm(block.input_layernorm), "ring_rows": pool.ring_rows}
            numbers |= self._attention(attention) | self._sparse(attention)
            if numbers.get("listed"):
                self.oracles[index] = pool.layout.num_kv_heads, numbers["listed"] + numbers["recent"]
            if pool.scales is not None:
                parts = ("k_scale", "v_scale", "k_mean")
                numbers |= {part: self._keep(x) for part, x in zip(parts, pool.scales, strict=True)}
                numbers["integers"] = int(cache.reads_codes and index not in cache.float_layers)
            self.plan.layer(numbers, self._keep(pool.k_RKH), self._keep(pool.v_RKV))
        ends = self._matrix(model.model.embed_tokens), self._matrix(model.lm_head)
        self.plan.ends(*ends, self._norm(model.model.norm))

    def _attention(self, attention: Attention) -> dict[str, Any]:
        """The branch over a layer's own rows, and what reads its input."""
        spec, options = attention.spec, attention.spec.options
        is_sparse = isinstance(attention, SparseAttention)
        theta = options.get("swa_rope_theta", spec.rope_theta) if is_sparse else spec.rope_theta
        dim = options.get("swa_rotary_dim", spec.rotary_dim) if is_sparse else spec.rotary_dim
        norms = (getattr(attention, f"{part}_norm", None) for part in "qk")
        q_norm, k_norm = (-1 if norm is None else self._norm(norm) for norm in norms)
        matrices = {part: -1 if x is None else self._matrix(x) for part, x in projections(attention).items()}
        if matrices["gate_proj"] < 0:
            del matrices["gate_proj"]
        return matrices | {
            "q_norm": q_norm,
            "k_norm": k_norm,
            "sink": self._vector(getattr(attention, "sink_swa" if is_sparse else "attention_sink_bias")),
            "o": self._matrix(cast(nn.Module, attention.o_proj)),
            "value_scale": 1.0 if is_sparse else spec.value_scale,
            "angles": self._rotation(theta, dim),
            "window": spec.window or 0,
        }

    def _sparse(self, attention: Attention) -> dict[str, Any]:
        """What an oracle chooses and lends, and what a sparse layer reads of it; empty for other layers."""
        spec, options = attention.spec, attention.spec.options
        if not isinstance(attention, OracleAttention | SparseAttention):
            return {}
        is_oracle = isinstance(attention, OracleAttention)
        forced, size = options.get("forced_window"), options.get("block_size") or 0
        return {
            "listed": (options.get("num_blocks") or 0) if is_oracle else 0,
            "recent": recent_blocks(size, forced) if is_oracle and size else 0,
            "block_size": size,
            "forced_window": forced or 0,
            "source": -1 if spec.kv_source is None else spec.kv_source,
            "listed_angles": self._rotation(spec.rope_theta, spec.rotary_dim),
            "listed_sink": self._vector(
                attention.sink_sa if isinstance(attention, SparseAttention) else None
            ),
            "lends_input": int(bool(options.get("publishes_input"))),
            "borrows_input": int(options.get("input_from") is not None),
        }

    def _mlp(self, mlp: nn.Module) -> dict[str, Any]:
        parts = ("gate", "up", "down")
        if not isinstance(mlp, MoE):
            return {part: self._matrix(mlp.get_submodule(f"{part}_proj")) for part in parts}
        spec = mlp.spec
        return {part: self._matrix(mlp.experts, f"{part}_proj") for part in parts} | {
            "router": self._vector(mlp.gate.weight),
            "router_bias": self._vector(mlp.gate.e_score_correction_bias),
            "num_experts": spec.num_experts,
            "experts_per_token": spec.experts_per_token,
            "scaling": spec.routed_scaling_factor,
            "is_normalised": int(spec.norm_topk_prob),
        }

    def _head(self, head: MTPHead) -> dict[str, Any]:
        names = head.mtp.names
        norms = ("hidden_norm", "embedding_norm", "mlp_norm", "final_norm")
        numbers = {word: self._norm(head.get_submodule(names[word])) for word in norms}
        numbers |= {"join": self._matrix(head.get_submodule(names["join"]))}
        return numbers | {"hidden_first": int(head.mtp.order == "hidden")} | self._mlp(head.mlp)

    def _rotation(self, theta: float, dim: int) -> int:
        if (theta, dim) not in self._angles:
            frequencies = rotary_frequencies(theta, dim, torch.device("cpu"))
            self._angles[theta, dim] = self.plan.angles(frequencies)
        return self._angles[theta, dim]

    def _norm(self, norm: nn.Module) -> int:
        assert isinstance(norm, RMSNorm)
        return self._vector(norm.weight)

    def _vector(self, x: Tensor | None) -> int:
        index: int = -1 if x is None else self.plan.vector(self._keep(x))
        return index

    def _matrix(self, module: nn.Module, name: str = "") -> int:
        form = form_of(module, name)
        assert form is not None
        scales = None if form.scales is None else self._keep(form.scales)
        index: int = self.plan.linear(
            form.kind, *form.shape, self._keep(form.weight), scales, self._vector(form.bias), form.num_stacked
        )
        return index

    def _keep(self, x: Tensor) -> Tensor:
        self.tensors.append(x)
        return x.detach()
