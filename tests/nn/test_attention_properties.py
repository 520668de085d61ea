"""Properties that every registered attention kind must have; a kind without specs here fails the suite.

A case is a stack of layers run one after the other, so that a kind which reads an earlier layer brings
it along.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sateen.nn.attention import Attention, LayerCache, LayerLinks, Sequences
from sateen.nn.spec import LayerSpec

D, EPS = 16, 1e-6
BASE = LayerSpec(
    index=0, attention="", num_attention_heads=4, num_key_value_heads=2, head_dim=6, v_head_dim=6,
    rope_theta=100.0, rotary_dim=4,
)  # fmt: skip
FULL = replace(BASE, attention="full_attention")
SLIDING = replace(BASE, attention="sliding_attention", window=5)
ORACLE = replace(BASE, attention="oracle_attention", options={"num_blocks": 2, "block_size": 3})
SPARSE = replace(BASE, attention="sparse_attention", kv_source=0, window=5, options={"block_size": 3})
GATED = replace(SLIDING, attention="gated_sliding_attention")
COMPLEX = replace(BASE, attention="complex_attention", rotary_dim=6)
# Single tokens and a forced window, no rotation, keys and values projected from the first full layer's input.
SOURCE = replace(BASE, attention="oracle_attention", options={"publishes_input": True})
BRIDGED = replace(
    BASE, attention="oracle_attention", rotary_dim=0,
    options={"num_blocks": 4, "block_size": 1, "forced_window": 3, "input_from": 0},
)  # fmt: skip
UNIFIED = replace(SPARSE, window=None, kv_source=2, rotary_dim=0, options={"block_size": 1})
# Attention kind -> stacks to test, the kind itself last in each: the plain one, then the switches it has.
STACKS: dict[str, list[tuple[LayerSpec, ...]]] = {
    "full_attention": [
        (FULL,),
        (replace(FULL, has_sink=True, v_head_dim=4, value_scale=0.7, num_key_value_heads=1),),
        (replace(FULL, qkv_bias=True, o_bias=True, qk_norm=True, rotary_dim=6),),
    ],
    "sliding_attention": [
        (SLIDING,),
        (replace(SLIDING, has_sink=True, v_head_dim=4, value_scale=0.7, window=1),),
        (replace(SLIDING, has_sink=True, qkv_bias=True, qk_norm=True, window=7),),
        (replace(SLIDING, has_sink=True), FULL, replace(SLIDING, window=3)),
    ],
    "oracle_attention": [
        (ORACLE,),
        (SOURCE, GATED, BRIDGED),
    ],
    "sparse_attention": [
        (ORACLE, SPARSE),
        (ORACLE, SPARSE, replace(SPARSE, window=7, options={"block_size": 3, "gate_granularity": "element"})),
        (
            replace(ORACLE, v_head_dim=4, num_key_value_heads=1, qk_norm=True),
            replace(
                SPARSE,
                v_head_dim=4,
                num_key_value_heads=1,
                window=4,
                qkv_bias=True,
                options={"block_size": 3, "swa_rope_theta": 9.0, "swa_rotary_dim": 6, "sink_swa": False},
            ),
        ),
        (ORACLE, replace(SPARSE, window=None, options={"block_size": 3, "sink_sa": False})),
        (ORACLE, replace(SPARSE, options={"block_size": 3, "share_kv_sa": False})),
        (ORACLE, replace(SPARSE, window=None, options={"block_size": 3, "share_kv_sa": False})),
        (ORACLE, replace(SPARSE, options={"block_size": 3, "share_kv_swa": True})),
        (SOURCE, GATED, BRIDGED, UNIFIED, UNIFIED),
    ],
    "complex_attention": [
        (COMPLEX,),
        (replace(COMPLEX, num_key_value_heads=1, v_head_dim=4, options={"scale": 0.9}),),
        (SLIDING, COMPLEX),
    ],
    "gated_sliding_attention": [
        (GATED,),
        (replace(GATED, has_sink=True, options={"gate_granularity": "element"}),),
    ],
}
CASES = [
    pytest.param(stack, id=f"{kind}-{i}")
    for kind in Attention.kinds
    for i, stack in enumerate(STACKS.get(kind, []))
]
WINDOWED = [case for case in CASES if len(case.values[0]) == 1 and case.values[0][0].window is not None]
WHOLE = [case for case in CASES if len(case.values[0]) == 1 and case.values[0][0].window is None]


class NaiveCache(LayerCache):
    """Keeps what one layer stores; a ring hands out no more rows than a ring of its size would still have."""

    def __init__(self, spec, num_sequences, stack):
        self.layouts = {layout.name: layout for layout in Attention.kinds[spec.attention].kv_layouts(spec)}
        self.rows = {name: [[] for _ in range(num_sequences)] for name in self.layouts}
        self.stack = stack
        self.cu_new = None

    def extend(self, k_TKH, v_TKV, name="kv"):
        layout = self.layouts[name]
        assert k_TKH.shape[1:] == (layout.num_kv_heads, layout.head_dim)
        assert v_TKV.shape[1:] == (layout.num_kv_heads, layout.v_head_dim)
        for i, rows in enumerate(self.rows[name]):
            kept = rows if layout.kind == "paged" else rows[max(0, len(rows) - (layout.window - 1)) :]
            rows[:] = [*kept, *((k_TKH[t], v_TKV[t]) for t in range(self.cu_new[i], self.cu_new[i + 1]))]
        return self.visible(name)

    def read(self, name="kv"):
        layout = self.layouts[name]
        assert layout.kind == "shared"
        return self.stack.caches[layout.source].visible("kv")

    def visible(self, name):
        lengths = [len(rows) for rows in self.rows[name]]
        keys, values = zip(*(row for rows in self.rows[name] for row in rows), strict=True)
        return torch.stack(keys), torch.stack(values), Sequences.of_lengths(lengths).cu_seqlens


class Stack(nn.Module):
    """The layers of a case, each fed by the one before."""

    def __init__(self, specs, seed=0):
        super().__init__()
        self.specs = tuple(replace(spec, index=i) for i, spec in enumerate(specs))
        self.layers = nn.ModuleList(Attention.kinds[spec.attention](D, spec, EPS) for spec in self.specs)
        self.caches = []
        generator = torch.Generator().manual_seed(seed)
        # Each layer magnifies the rounding of those before it: deep stacks get weights small enough that the
        # tolerance of `close` is well above what float32 itself leaves.
        std = 0.4 / len(specs) ** 0.5
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)

    def open_caches(self, num_sequences):
        self.caches = [NaiveCache(spec, num_sequences, self) for spec in self.specs]

    def forward(self, x, seq):
        links = LayerLinks()
        for cache in self.caches:
            cache.cu_new = seq.cu_seqlens.tolist()
        for i, layer in enumerate(self.layers):
            x = layer(F.rms_norm(x, (D,)), seq, self.caches[i] if self.caches else None, links)
        return x


def hidden(T, seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def run(layer, x, lengths):
    return layer(x, Sequences.of_lengths(lengths))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_every_registered_kind_is_tested():
    assert set(STACKS) == set(Attention.kinds), "add stacks for the new attention kind to STACKS"
    assert all(
        stacks and all(stack[-1].attention == kind for stack in stacks) for kind, stacks in STACKS.items()
    )


@pytest.mark.parametrize("stack", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_equals_separate(stack):
    layer, lengths = Stack(stack), [1, 12, 0, 5, 7]
    x = hidden(sum(lengths))
    together = run(layer, x, lengths).split(lengths)
    for part, rows, length in zip(together, x.split(lengths), lengths, strict=True):
        close(part, run(layer, rows, [length]))


@pytest.mark.parametrize("stack", CASES)
def test_batch_order_does_not_matter(stack):
    layer, lengths = Stack(stack), [3, 9, 6]
    parts = hidden(18).split(lengths)
    there = run(layer, torch.cat(parts), lengths).split(lengths)
    back = run(layer, torch.cat(parts[::-1]), lengths[::-1]).split(lengths[::-1])
    for a, b in zip(there, back[::-1], strict=True):
        close(a, b)


@pytest.mark.parametrize("stack", CASES)
def test_later_tokens_never_change_earlier_outputs(stack):
    layer = Stack(stack)
    x = hidden(20)
    before = run(layer, x, [12, 8])
    x[7] += 3.0
    after = run(layer, x, [12, 8])
    changed = (before != after).any(-1)
    assert not changed[:7].any()
    assert not changed[12:].any()
    assert changed[7]
    if stack[-1].window != 1:
        assert changed[8:12].any()


@pytest.mark.parametrize("stack", WINDOWED + WHOLE)
def test_a_key_leaves_the_window_exactly_when_it_should(stack):
    layer, window = Stack(stack), stack[0].window
    x = hidden(20)
    before = run(layer, x, [20])
    x[4] += 3.0
    changed = (run(layer, x, [20]) != before).any(-1).nonzero().flatten().tolist()
    assert changed == list(range(4, 20 if window is None else 4 + window))


@pytest.mark.parametrize(
    "stack", [case for case in WINDOWED if case.values[0][0].attention == SLIDING.attention]
)
def test_a_window_as_long_as_the_sequence_equals_full_attention(stack):
    T, spec = 11, stack[0]
    full = Stack((replace(spec, attention="full_attention", window=None),))
    x = hidden(T)
    want = run(full, x, [T])
    for window, equal in ((T, True), (T + 40, True), (T - 1, False)):
        windowed = Stack((replace(spec, window=window),))
        windowed.load_state_dict(full.state_dict())
        assert torch.allclose(run(windowed, x, [T]), want, rtol=1e-5, atol=1e-6) == equal


@pytest.mark.parametrize("stack", CASES)
@pytest.mark.parametrize(
    "chunks",
    [[23], [1] * 23, [5, 1, 1, 1, 8, 7], [22, 1], [3, 20]],
    ids=lambda chunks: "+".join(map(str, chunks)),
)
def test_prefill_and_decode_equal_one_forward(stack, chunks):
    layer = Stack(stack)
    first, second = hidden(23, seed=2), hidden(23, seed=3)
    want = run(layer, torch.cat([first, second]), [23, 23])
    layer.open_caches(2)
    done, parts = 0, [[], []]
    for size in chunks:
        positions = torch.arange(done, done + size).repeat(2)
        offsets = torch.tensor([0, size, 2 * size], dtype=torch.int32)
        seq = Sequences(offsets, positions)
        x = torch.cat([first[done : done + size], second[done : done + size]])
        out = layer(x, seq).split(size)
        for part, rows in zip(parts, out, strict=True):
            part.append(rows)
        done += size
    close(torch.cat([*parts[0], *parts[1]]), want)


@pytest.mark.parametrize("stack", CASES)
def test_a_new_sequence_joins_others_that_decode(stack):
    layer = Stack(stack)
    old, new = hidden(9, seed=4), hidden(6, seed=5)
    want_old, want_new = run(layer, old, [9]), run(layer, new, [6])
    layer.open_caches(2)
    seq = Sequences(torch.tensor([0, 8, 8], dtype=torch.int32), torch.arange(8))
    close(layer(old[:8], seq), want_old[:8])
    seq = Sequences(torch.tensor([0, 1, 7], dtype=torch.int32), torch.tensor([8, 0, 1, 2, 3, 4, 5]))
    out = layer(torch.cat([old[8:], new]), seq)
    close(out, torch.cat([want_old[8:], want_new]))


@pytest.mark.parametrize("stack", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_reach_every_parameter(stack):
    layer = Stack(stack)
    x = hidden(15).requires_grad_()
    run(layer, x, [9, 6]).square().sum().backward()
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
        if name.endswith("attention_sink_bias"):
            assert (parameter.grad.abs() > 1e-6).all()


@pytest.mark.parametrize("stack", CASES)
def test_the_layout_holds_what_the_layer_stores(stack):
    spec = stack[-1]
    layouts = Attention.kinds[spec.attention].kv_layouts(spec)
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        if layout.kind == "ring":
            assert [layout.rows(n) for n in (1, spec.window, spec.window + 9)] == [
                1,
                spec.window,
                spec.window,
            ]
            assert layout.rows(1, draft=3) == spec.window + 3
        else:
            assert layout.rows(1000) == (1000 if layout.kind == "paged" else 0)
        stored = spec.num_key_value_heads * (spec.head_dim + spec.v_head_dim)
        assert layout.row_elements == (0 if layout.kind == "shared" else stored)
