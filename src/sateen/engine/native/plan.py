"""A model and its caches as the kernels of native/decode.h take them: pointers to weights, vectors and rows.

`native_step` builds a plan once and again when tensors have moved. What is refused here runs in torch. Shape
letters: T tokens, E experts, F and D the output and input width of a matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sateen.engine.cache.kv_cache import PAGE, KVCache
from sateen.models.decoder import Decoder, DecoderLayer
from sateen.nn.attention import Attention
from sateen.nn.attention.full import FullAttention, SlidingAttention
from sateen.nn.mlp import SwiGLU
from sateen.nn.moe import Experts, MoE, Router
from sateen.nn.mtp import MTPHead
from sateen.nn.norm import RMSNorm
from sateen.nn.quant.int8 import IntegerExperts, IntegerLinear
from sateen.nn.rotary import rotary_frequencies
from sateen.ops.lowbit_matmul.native import FORMATS, INT4, INT8
from sateen.ops.native import native, native_available

INTEGERS = {"int8": INT8, "int4": INT4}
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


class Form(NamedTuple):
    """One matrix, or a stack of `num_stacked`, as native/linear.h stores it."""

    kind: int
    shape: tuple[int, ...]
    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    num_stacked: int = 1


def form_of(module: nn.Module, name: str = "") -> Form | None:
    """The form of a layer's weights, of stacked experts those called `name`; None where there is none."""
    if isinstance(module, IntegerLinear):
        shape = module.out_features, module.in_features
        return Form(INTEGERS[module.weights], shape, module.codes, module.scales, module.bias)
    if isinstance(module, IntegerExperts):
        codes, scales = getattr(module, f"{name}_codes"), getattr(module, f"{name}_scales")
        return Form(INTEGERS[module.weights], module.shapes[name], codes, scales, None, len(codes))
    if type(module) not in (nn.Linear, nn.Embedding, Experts):
        return None
    weight = getattr(module, name or "weight")
    if weight.dtype not in FORMATS or not weight.is_contiguous():
        return None
    num_stacked = weight.shape[0] if weight.ndim == 3 else 1
    shape = tuple(weight.shape[-2:])
    return Form(FORMATS[weight.dtype], shape, weight, None, getattr(module, "bias", None), num_stacked)


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
        if type(module) not in (FullAttention, SlidingAttention):
            return f"is {module.spec.attention!r}"
        if module.spec.rotary_dim % 2:
            return "rotates an odd number of channels"
        return _mixed(*(form_of(module.get_submodule(f"{part}_proj")) for part in "qkv"))
    if isinstance(module, SwiGLU):
        return _mixed(form_of(module.gate_proj), form_of(module.up_proj))
    if isinstance(module, (Experts, IntegerExperts)):
        forms = [form_of(module, f"{part}_proj") for part in ("gate", "up", "down")]
        return "is stored in another way" if None in forms else _mixed(*forms[:2])
    if type(module) in (MTPHead, DecoderLayer, MoE, Router, RMSNorm) or form_of(module) is not None:
        return None
    return f"is {type(module).__name__} or stored in another way"


def _mixed(*forms: Form | None) -> str | None:
    """Matrices with one input must read it in one form; int8 and int4 weights do."""
    kinds = {min(form.kind, INT8) for form in forms if form is not None}
    return None if len(kinds) < 2 else "has matrices of several kinds"


class PlanBuilder:
    """Builds a plan.

    Attributes:
        plan: the native object; it keeps the memory of all tensors alive.
        tensors: those whose place the plan relies on.
        routed: layers of the trunk with experts, in order.
    """

    def __init__(self, model: Decoder, cache: KVCache):
        self.tensors: list[Tensor] = []
        self.routed: list[int] = []
        self._angles: dict[tuple[float, int], int] = {}
        self.plan = native().DecodePlan(model.config.hidden_size, model.config.rms_norm_eps, PAGE)
        for index, block in enumerate(blocks(model, cache)):
            pool = cache.pools[index, "kv"]
            if isinstance(block, MTPHead):
                numbers = self._head(block)
            else:
                assert isinstance(block, DecoderLayer)
                numbers = {"mlp_norm": self._norm(block.post_attention_layernorm)} | self._mlp(block.mlp)
                if isinstance(block.mlp, MoE):
                    self.routed.append(index)
            numbers |= {"input_norm": self._norm(block.input_layernorm), "ring_rows": pool.ring_rows}
            assert isinstance(block.self_attn, FullAttention)
            numbers |= self._attention(block.self_attn)
            if pool.scales is not None:
                parts = ("k_scale", "v_scale", "k_mean")
                numbers |= {part: self._keep(x) for part, x in zip(parts, pool.scales, strict=True)}
                numbers["integers"] = int(cache.reads_codes and index not in cache.float_layers)
            self.plan.layer(numbers, self._keep(pool.k_RKH), self._keep(pool.v_RKV))
        ends = self._matrix(model.model.embed_tokens), self._matrix(model.lm_head)
        self.plan.ends(*ends, self._norm(model.model.norm))

    def _attention(self, attention: FullAttention) -> dict[str, Any]:
        spec = attention.spec
        return {
            "q_norm": -1 if attention.q_norm is None else self._norm(attention.q_norm),
            "k_norm": -1 if attention.k_norm is None else self._norm(attention.k_norm),
            "sink": self._vector(attention.attention_sink_bias),
            "q": self._matrix(attention.q_proj),
            "k": self._matrix(attention.k_proj),
            "v": self._matrix(attention.v_proj),
            "o": self._matrix(attention.o_proj),
            "value_scale": spec.value_scale,
            "angles": self._rotation(spec.rope_theta, spec.rotary_dim),
            "window": spec.window or 0,
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
