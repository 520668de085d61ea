"""Softmax attention over complex heads, as real heads of twice the width.

The score of a complex query and key is the real part of their Hermitian product, re·re + im·im. With both
stored as [re | im] that is an ordinary dot product, and values add up part by part, so operators, caches and
the engine need no second form. Source: Fairy±i, arXiv 2508.05571, and its published code
(PKULab1806/Fairy-plus-minus-i).
"""

from __future__ import annotations

from torch import Tensor

from sateen import ops
from sateen.nn.attention.base import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.complex import ComplexLinear, ComplexRMSNorm
from sateen.nn.rotary import apply_rotary
from sateen.nn.spec import KVLayout, LayerSpec


class ComplexAttention(Attention, kind="complex_attention"):
    """Causal attention of Fairy±i: complex projections and rotation, a norm before the output projection.

    `hidden_size`, `spec.head_dim`, `spec.v_head_dim` and `spec.rotary_dim` count real numbers: twice the
    complex entries. `spec.options["scale"]` multiplies the scores; 1/sqrt(spec.head_dim) where it is absent.
    """

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__(hidden_size, spec, eps)
        h, N, K = hidden_size // 2, spec.num_attention_heads, spec.num_key_value_heads
        self.q_proj = ComplexLinear(h, N * spec.head_dim // 2)
        self.k_proj = ComplexLinear(h, K * spec.head_dim // 2)
        self.v_proj = ComplexLinear(h, K * spec.v_head_dim // 2)
        self.attn_layernorm = ComplexRMSNorm(N * spec.v_head_dim, eps)
        self.o_proj = ComplexLinear(N * spec.v_head_dim // 2, h)

    @staticmethod
    def kv_layouts(spec: LayerSpec) -> tuple[KVLayout, ...]:
        return (KVLayout("paged", spec.num_key_value_heads, spec.head_dim, spec.v_head_dim),)

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        spec = self.spec
        # Half-split rotation over the whole width turns (re, im) of channel j by position * theta^(-j/c),
        # j = 0..c-1 over the c complex channels of a head: one angle per complex channel.
        tables = seq.rotary(spec.rope_theta, spec.rotary_dim)
        q = apply_rotary(split_heads(self.q_proj(x_TD), spec.num_attention_heads), tables)
        k = apply_rotary(split_heads(self.k_proj(x_TD), spec.num_key_value_heads), tables)
        v = split_heads(self.v_proj(x_TD), spec.num_key_value_heads)
        attend = ops.attention if cache is None else cache.attend
        out: Tensor = attend(  # type: ignore[assignment]
            q, k, v, cu_seqlens_q=seq.cu_seqlens, scale=spec.options.get("scale")
        )
        result: Tensor = self.o_proj(self.attn_layernorm(join_heads(out)))
        return result


def split_heads(x_TD: Tensor, num_heads: int) -> Tensor:
    """[T, 2 * N * c] of [re | im] over all heads as [T, N, 2c] of [re | im] within each head."""
    heads: Tensor = x_TD.unflatten(-1, (2, num_heads, -1))
    return heads.transpose(1, 2).flatten(2)


def join_heads(x_TNH: Tensor) -> Tensor:
    """The inverse of `split_heads`."""
    parts: Tensor = x_TNH.unflatten(-1, (2, -1))
    return parts.transpose(1, 2).flatten(1)
