"""HySparse: full layers choose key blocks by their own softmax; the sparse layers after them read those rows.

`oracle_attention` is full attention that other layers lean on; `sparse_attention` has queries of its own, the
oracle's keys and values, and in its gated form a second branch over a window of its own rows;
`gated_sliding_attention` is HySparse2's sliding layer. Plain full layers stay `full_attention`.
Source: Xiaomi 2026, HySparse (arXiv 2602.03560) §3; HySparse2 (arXiv 2609.26368). Shape letters as in
`nn.attention.base`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sateen import ops
from sateen.nn.attention.base import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.attention.full import FullAttention, SlidingAttention
from sateen.nn.attention.replay import replayed_blocks
from sateen.nn.rotary import apply_rotary
from sateen.nn.spec import KVLayout, LayerSpec


class OracleAttention(FullAttention, kind="oracle_attention"):
    """Full attention that publishes its rows, its choice of key blocks, or its input.

    Options of the spec: `num_blocks` blocks of `block_size` keys chosen per query (0 or absent: nothing is
    chosen or lent), `forced_window` newest keys listed besides, `aggregate` over a group's heads (`max` or
    `mean`), `publishes_input`, and `input_from`, the layer whose published input the keys and values are
    projected from.
    """

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        spec, options = self.spec, self.spec.options
        source = options.get("input_from")
        if options.get("publishes_input"):
            source = spec.index
            if links.hidden_seq is None:  # else a trunk that exits early has published all rows already
                links.hidden[source] = x_TD
        kv_seq = links.hidden_seq or seq
        q, k, v = self.project(x_TD, seq, None if source is None else links.hidden[source], kv_seq)
        cu_seqlens_k = kv_seq.cu_seqlens
        if cache is not None:
            k, v, cu_seqlens_k = cache.extend(k, v)
        if options.get("num_blocks"):
            links.kv[spec.index] = k, v, cu_seqlens_k
            out, links.selections[spec.index] = ops.attention_and_blocks(
                q, k, v, block_size=options["block_size"], num_blocks=options["num_blocks"],
                forced_window=options.get("forced_window"), aggregate=options.get("aggregate", "max"),
                cu_seqlens_q=seq.cu_seqlens, cu_seqlens_k=cu_seqlens_k, sink_N=self.attention_sink_bias,
                lists_KTn=links.known_selections.get(spec.index),
            )  # fmt: skip
            forced = links.forced_selections.get(spec.index)
            links.selections[spec.index] = replayed_blocks(links.selections[spec.index], forced)
            if cache is not None:
                del links.kv[spec.index]  # readers ask the cache, which may keep less of it
                links.lists[spec.index] = cache.lend(links.selections[spec.index], seq, options["block_size"])
        else:
            out = ops.attention(  # type: ignore[assignment]
                q,
                k,
                v,
                cu_seqlens_q=seq.cu_seqlens,
                cu_seqlens_k=cu_seqlens_k,
                sink_N=self.attention_sink_bias,
            )
        result: Tensor = self.o_proj(out.flatten(1))
        return result


class SparseAttention(Attention, kind="sparse_attention"):
    """Attention over the key blocks that the oracle `spec.kv_source` chose, and over a window of own rows.

    The spec's rotation is the oracle's and applies to the queries alone: shared keys come rotated. With a
    `window` the second branch exists; its options are `swa_rope_theta`, `swa_rotary_dim` and
    `swa_num_kv_heads`, the first branch's settings where absent. Other options: `block_size`, `sink_sa`,
    `sink_swa`, `gate_granularity` (`head`: a gate per head and branch, `element`: one per channel).

    Two options are for the ablation of HySparse (arXiv 2602.03560 Table 4). `share_kv_sa` False: the layer
    takes the oracle's choice of blocks but reads its own keys and values, of the whole context and the same
    in both branches. `share_kv_swa` True: the window too reads the oracle's rows, and the layer has none.
    """

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__(hidden_size, spec, eps)
        N, options = spec.num_attention_heads, spec.options
        swa_heads = _swa_kv_heads(spec)
        self.q_proj = nn.Linear(hidden_size, N * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(N * spec.v_head_dim, hidden_size, bias=spec.o_bias)
        self.swa_k_proj = self.swa_v_proj = self.k_proj = self.v_proj = None
        if not options.get("share_kv_sa", True):
            K = spec.num_key_value_heads
            self.k_proj = nn.Linear(hidden_size, K * spec.head_dim, bias=spec.qkv_bias)
            self.v_proj = nn.Linear(hidden_size, K * spec.v_head_dim, bias=spec.qkv_bias)
        elif spec.window is not None and not options.get("share_kv_swa", False):
            self.swa_k_proj = nn.Linear(hidden_size, swa_heads * spec.head_dim, bias=spec.qkv_bias)
            self.swa_v_proj = nn.Linear(hidden_size, swa_heads * spec.v_head_dim, bias=spec.qkv_bias)
        self.gate_proj = _gate_projection(hidden_size, spec, 1 if spec.window is None else 2)
        self.sink_sa = nn.Parameter(torch.zeros(N)) if options.get("sink_sa", True) else None
        has_swa_sink = spec.window is not None and options.get("sink_swa", True)
        self.sink_swa = nn.Parameter(torch.zeros(N)) if has_swa_sink else None

    @staticmethod
    def kv_layouts(spec: LayerSpec) -> tuple[KVLayout, ...]:
        H, V = spec.head_dim, spec.v_head_dim
        if not spec.options.get("share_kv_sa", True):
            return (KVLayout("paged", spec.num_key_value_heads, H, V),)
        shared = KVLayout("shared", spec.num_key_value_heads, H, V, source=spec.kv_source)
        if spec.window is None or spec.options.get("share_kv_swa", False):
            return (shared,)
        return shared, KVLayout("ring", _swa_kv_heads(spec), H, V, window=spec.window, name="swa")

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        spec, options = self.spec, self.spec.options
        assert spec.kv_source is not None
        q_TNH = self.q_proj(x_TD).view(x_TD.shape[0], spec.num_attention_heads, spec.head_dim)
        k, v, cu_seqlens_k = rows = self._rows(x_TD, seq, cache, links)
        rotated_TNH = apply_rotary(q_TNH, seq.rotary(spec.rope_theta, spec.rotary_dim))
        lists = links.selections[spec.kv_source]
        if self.k_proj is None:  # the cache may have lent the oracle's rows in another order
            lists = links.lists.get(spec.kv_source, lists)
        branches: list[Tensor] = [
            ops.block_sparse_attention(  # type: ignore[list-item]
                rotated_TNH,
                k,
                v,
                lists,
                block_size=options["block_size"],
                cu_seqlens_q=seq.cu_seqlens,
                cu_seqlens_k=cu_seqlens_k,
                sink_N=self.sink_sa,
            )
        ]
        if spec.window is not None:
            if self.swa_k_proj is None:
                branches.append(self._window(rotated_TNH, rows, seq))
            else:
                branches.append(self._window_branch(x_TD, q_TNH, seq, cache))
        out = _gated(self.gate_proj, x_TD, branches)
        result: Tensor = self.o_proj(out.flatten(1))
        return result

    def _rows(
        self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and their offsets for the first branch: the oracle's, or this layer's own."""
        spec, T = self.spec, x_TD.shape[0]
        assert spec.kv_source is not None
        if self.k_proj is None or self.v_proj is None:
            return links.kv[spec.kv_source] if cache is None else cache.read()
        k = self.k_proj(x_TD).view(T, spec.num_key_value_heads, spec.head_dim)
        k = apply_rotary(k, seq.rotary(spec.rope_theta, spec.rotary_dim))
        v = self.v_proj(x_TD).view(T, spec.num_key_value_heads, spec.v_head_dim)
        return (k, v, seq.cu_seqlens) if cache is None else cache.extend(k, v)

    def _window_branch(self, x_TD: Tensor, q_TNH: Tensor, seq: Sequences, cache: LayerCache | None) -> Tensor:
        spec, options, T = self.spec, self.spec.options, x_TD.shape[0]
        assert self.swa_k_proj is not None
        assert self.swa_v_proj is not None
        tables = seq.rotary(
            options.get("swa_rope_theta", spec.rope_theta), options.get("swa_rotary_dim", spec.rotary_dim)
        )
        k = apply_rotary(self.swa_k_proj(x_TD).view(T, _swa_kv_heads(spec), spec.head_dim), tables)
        v = self.swa_v_proj(x_TD).view(T, _swa_kv_heads(spec), spec.v_head_dim)
        cu_seqlens_k = seq.cu_seqlens
        if cache is not None:
            k, v, cu_seqlens_k = cache.extend(k, v, "swa")
        return self._window(apply_rotary(q_TNH, tables), (k, v, cu_seqlens_k), seq)

    def _window(self, q_TNH: Tensor, rows: tuple[Tensor, Tensor, Tensor], seq: Sequences) -> Tensor:
        """Attention over the newest of these rows."""
        spec = self.spec
        k, v, cu_seqlens_k = rows
        out: Tensor = ops.attention(  # type: ignore[assignment]
            q_TNH,
            k,
            v,
            cu_seqlens_q=seq.cu_seqlens,
            cu_seqlens_k=cu_seqlens_k,
            window=spec.window,
            sink_N=self.sink_swa,
        )
        return out


class GatedSlidingAttention(SlidingAttention, kind="gated_sliding_attention"):
    """Sliding attention with a sigmoid gate before the output projection, as HySparse2 has it."""

    def __init__(self, hidden_size: int, spec: LayerSpec, eps: float):
        super().__init__(hidden_size, spec, eps)
        self.gate_proj = _gate_projection(hidden_size, spec, 1)

    def forward(self, x_TD: Tensor, seq: Sequences, cache: LayerCache | None, links: LayerLinks) -> Tensor:
        q, k, v = self.project(x_TD, seq)
        attend = ops.attention if cache is None else cache.attend
        out: Tensor = attend(  # type: ignore[assignment]
            q, k, v, cu_seqlens_q=seq.cu_seqlens, window=self.spec.window, sink_N=self.attention_sink_bias
        )
        result: Tensor = self.o_proj(_gated(self.gate_proj, x_TD, [out]).flatten(1))
        return result


def _swa_kv_heads(spec: LayerSpec) -> int:
    heads: int = spec.options.get("swa_num_kv_heads", spec.num_key_value_heads)
    return heads


def _gate_projection(hidden_size: int, spec: LayerSpec, num_branches: int) -> nn.Linear:
    per_head = spec.v_head_dim if spec.options.get("gate_granularity") == "element" else 1
    return nn.Linear(hidden_size, num_branches * spec.num_attention_heads * per_head, bias=False)


def _gated(gate_proj: nn.Linear, x_TD: Tensor, branches: list[Tensor]) -> Tensor:
    """The branches [T, N, V], each times its own sigmoid in float32, summed.

    Source: HySparse eq. 8-9; the gates are independent and need not add up to 1.
    """
    T, N, _ = branches[0].shape
    width = gate_proj.out_features // (len(branches) * N)
    gates = torch.sigmoid(gate_proj(x_TD).float()).view(T, len(branches), N, width)
    out = sum(gates[:, i] * branch.float() for i, branch in enumerate(branches))
    assert isinstance(out, Tensor)
    return out.to(branches[0].dtype)
