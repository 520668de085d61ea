"""Softmax attention over all earlier keys or over a window: projections, rotation, sinks, cache.

`full_attention` keeps every row (paged), `sliding_attention` the newest `window` (ring); nothing else
differs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sateen import ops
from sateen.nn.attention.base import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.norm import RMSNorm
from sateen.nn.rotary import apply_rotary
from sateen.nn.spec import KVLayout, LayerSpec


class FullAttention(Attention, kind="full_attention"):
    """Grouped-query causal attention as the Llama, Qwen2, MiMo-7B and MiMo-V2-Flash checkpoints store it."""

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__(hidden_size, spec, eps)
        N, K = spec.num_attention_heads, spec.num_key_value_heads
        self.q_proj = nn.Linear(hidden_size, N * spec.head_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, K * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, K * spec.v_head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(N * spec.v_head_dim, hidden_size, bias=spec.o_bias)
        self.q_norm = RMSNorm(spec.head_dim, eps) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, eps) if spec.qk_norm else None
        self.attention_sink_bias = nn.Parameter(torch.zeros(N)) if spec.has_sink else None

    @staticmethod
    def kv_layouts(spec: LayerSpec) -> tuple[KVLayout, ...]:
        return (KVLayout("paged", spec.num_key_value_heads, spec.head_dim, spec.v_head_dim),)

    def project(
        self,
        x_TD: Tensor,
        seq: Sequences,
        kv_input_TD: Tensor | None = None,
        kv_seq: Sequences | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, scaled values; the latter two of `kv_input_TD` where it is given.

        `kv_seq` are the rows of `kv_input_TD` where they are others than the queries'.
        """
        spec, T = self.spec, x_TD.shape[0]
        y_TD = x_TD if kv_input_TD is None else kv_input_TD
        q = self.q_proj(x_TD).view(T, spec.num_attention_heads, spec.head_dim)
        k = self.k_proj(y_TD).view(len(y_TD), spec.num_key_value_heads, spec.head_dim)
        v = self.v_proj(y_TD).view(len(y_TD), spec.num_key_value_heads, spec.v_head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = seq.rotary(spec.rope_theta, spec.rotary_dim)
        key_tables = tables if kv_seq is None else kv_seq.rotary(spec.rope_theta, spec.rotary_dim)
        if spec.value_scale != 1.0:
            v = v * spec.value_scale
        return apply_rotary(q, tables), apply_rotary(k, key_tables), v

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        q, k, v = self.project(x_TD, seq)
        attend = ops.attention if cache is None else cache.attend
        out: Tensor = attend(  # type: ignore[assignment]
            q, k, v, cu_seqlens_q=seq.cu_seqlens, window=self.spec.window, sink_N=self.attention_sink_bias
        )
        result: Tensor = self.o_proj(out.flatten(1))
        return result


class SlidingAttention(FullAttention, kind="sliding_attention"):
    """The same over the newest `spec.window` keys, the query's own included."""

    @staticmethod
    def kv_layouts(spec: LayerSpec) -> tuple[KVLayout, ...]:
        return (
            KVLayout("ring", spec.num_key_value_heads, spec.head_dim, spec.v_head_dim, window=spec.window),
        )
