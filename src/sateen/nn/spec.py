"""What may differ from layer to layer, as plain frozen dataclasses.

`models` builds these from `config.json`; `nn` builds modules from them; the engine allocates caches from
them. Nothing here imports torch.
"""

from __future__ import annotations

import copyreg
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


def _read_only(mapping: dict[str, Any]) -> MappingProxyType[str, Any]:
    return MappingProxyType(mapping)


# Python can neither copy nor pickle read-only mappings; models that hold specs need both.
copyreg.pickle(MappingProxyType, lambda proxy: (_read_only, (dict(proxy),)))


@dataclass(frozen=True)
class KVLayout:
    """What one attention layer needs an engine to keep per sequence.

    Attributes:
        kind: `paged` grows with the context, `ring` keeps the newest `window` rows, `shared` owns nothing and
            points at the rows of layer `source`.
        num_kv_heads: heads per row.
        head_dim: channels of a key head.
        v_head_dim: channels of a value head.
        window: rows a query may see, itself included; rings only.
        source: index of the layer that owns the rows; shared only.
        name: distinguishes the layouts of a layer that has several.
    """

    kind: Literal["paged", "ring", "shared"]
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    source: int | None = None
    name: str = "kv"

    @property
    def row_elements(self) -> int:
        """Numbers stored per token: keys and values of all heads."""
        return 0 if self.kind == "shared" else self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def row_bytes(self, size: int, *, is_scaled: bool = False) -> int:
        """Bytes per token for numbers of `size` bytes; int8 rows are scaled, by two float32 per head."""
        scales = 8 * self.num_kv_heads if is_scaled and self.kind != "shared" else 0
        return self.row_elements * size + scales

    def rows(self, context: int, draft: int = 0) -> int:
        """Rows a sequence of `context` tokens occupies, with room for `draft` rejected tokens in a ring."""
        if self.kind == "shared":
            return 0
        if self.kind == "ring":
            assert self.window is not None
            return min(context, self.window) if draft == 0 else self.window + draft
        return context


@dataclass(frozen=True)
class MoESpec:
    """A mixture of experts in place of the dense MLP.

    Attributes:
        num_experts: routed experts E.
        experts_per_token: experts A each token goes to.
        intermediate_size: width of one expert.
        norm_topk_prob: divide the chosen weights by their sum.
        routed_scaling_factor: multiplier of the routed output.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True)
class LayerSpec:
    """Everything that may differ between two decoder layers.

    Attributes:
        index: position in the decoder; MTP blocks continue the count after the last trunk layer.
        attention: registered attention kind, for example `full_attention` or `sliding_attention`.
        num_attention_heads: query heads N.
        num_key_value_heads: key/value heads K; divides N.
        head_dim: channels H of a query/key head.
        v_head_dim: channels V of a value head.
        rope_theta: base of the rotary angles.
        rotary_dim: leading channels of each head that are rotated; the rest pass through.
        window: keys a query sees, itself included; None for all earlier keys.
        has_sink: a learnable sink logit per query head takes part in the softmax.
        qkv_bias: q, k and v projections have a bias.
        o_bias: the output projection has a bias.
        qk_norm: RMSNorm over each query and key head before the rotation.
        value_scale: factor applied to the values before they are cached.
        kv_source: layer whose keys and values this one reads, for shared caches.
        intermediate_size: width of the dense MLP; unused when `moe` is set.
        moe: the mixture of experts, or None for a dense MLP.
        norm: kind of the two norms, a key of `nn.norm.NORMS`.
        mlp: kind of the dense MLP, a key of `nn.mlp.MLPS`.
        options: settings that one attention kind alone understands.
    """

    index: int
    attention: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rope_theta: float
    rotary_dim: int
    window: int | None = None
    has_sink: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    value_scale: float = 1.0
    kv_source: int | None = None
    intermediate_size: int = 0
    moe: MoESpec | None = None
    norm: str = "rms"
    mlp: str = "swiglu"
    options: MappingProxyType[str, Any] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    @property
    def is_moe(self) -> bool:
        return self.moe is not None


@dataclass(frozen=True)
class MTPSpec:
    """Multi-token prediction heads behind the trunk.

    Attributes:
        num_heads: heads; head k (from 0) at position t reads the embedding of token t+k+1 and predicts t+k+2.
        layer: the block inside each head.
        order: which half of the joined input comes first: `hidden` (MiMo-7B) or `embedding` (MiMo-V2-Flash).
        is_chained: head k reads the output of head k-1 (MiMo-7B); otherwise all read the trunk's state.
        path: module path of the list of heads inside `model`, as the checkpoint spells it.
        names: the four tensors around the block, our word -> the checkpoint's word.
    """

    num_heads: int
    layer: LayerSpec
    order: Literal["hidden", "embedding"]
    is_chained: bool
    path: str
    names: MappingProxyType[str, str] = field(hash=False)


@dataclass(frozen=True)
class QuantSpec:
    """Two-bit weights in place of a model's linear layers.

    Attributes:
        method: `phase` is Fairy±i's for complex layers, `fairy2i` the widely-linear form of real ones,
            `ternary` BitNet b1.58's, `int2` the codes -2 to 1.
        stages: of `fairy2i`, each quantising what the ones before left over; 1 for the other methods.
        act: how a layer's input is rounded: `int8` per token, each part of a complex one on its own, or
            `float` for not at all.
        packed: the weights are stored codes; otherwise full-precision masters that every forward quantises.
        skip: dotted pieces of module names that are left alone.
        int2_ratio: scale of `int2` over the mean |w|; 1.3 is near the least-squares scale of Gaussian weights
            (source: ours).
    """

    method: Literal["phase", "fairy2i", "ternary", "int2"]
    stages: int = 1
    act: Literal["int8", "float"] = "int8"
    packed: bool = False
    skip: tuple[str, ...] = ("lm_head",)
    int2_ratio: float = 1.3
