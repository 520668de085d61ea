"""HySparse layers against their definition, written out query by query in float64, and their identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sateen.nn.attention import Attention, LayerLinks, Sequences
from sateen.nn.spec import LayerSpec

D, EPS = 12, 1e-6
BASE = LayerSpec(
    index=0, attention="oracle_attention", num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    v_head_dim=4, rope_theta=100.0, rotary_dim=4,
)  # fmt: skip


def oracle_and_sparse(*, num_blocks, block_size, window=5, seed=0, consumers=1, forced=None, **options):
    """The two kinds of layer with random weights; the sparse ones read layer 0."""
    chosen = {"num_blocks": num_blocks, "block_size": block_size, "forced_window": forced}
    specs = [replace(BASE, options=chosen)]
    for i in range(consumers):
        settings = {"block_size": block_size} | options
        specs.append(
            replace(
                BASE, index=i + 1, attention="sparse_attention", kv_source=0, window=window, options=settings
            )
        )
    layers = [Attention.kinds[spec.attention](D, spec, EPS) for spec in specs]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.normal_(0.0, 0.5, generator=generator)
    return layers


def hidden(T, seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def rotated(x_TNH, theta, dim):
    """Pairs (j, j + dim/2) as complex numbers turned by position * theta^(-2j/dim)."""
    half = dim // 2
    pairs = torch.complex(x_TNH[..., :half], x_TNH[..., half:dim])
    rates = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / dim)
    turned = pairs * torch.exp(1j * torch.arange(len(x_TNH)).double()[:, None, None] * rates)
    return torch.cat([turned.real, turned.imag, x_TNH[..., dim:]], dim=-1)


def heads(layer, name, x, size):
    return (x @ getattr(layer, name).weight.detach().double().T).unflatten(1, (-1, size))


def by_definition(oracle, sparse, x_oracle, x):
    """One sequence through the sparse layer in float64: eq. 3 for the blocks, eq. 4-9 for the output."""
    x_oracle, x = x_oracle.double(), x.double()
    spec, options = sparse.spec, sparse.spec.options
    block_size, T, N, H = options["block_size"], len(x), spec.num_attention_heads, spec.head_dim
    group = N // spec.num_key_value_heads
    turn = (spec.rope_theta, spec.rotary_dim)
    own = (options.get("swa_rope_theta", turn[0]), options.get("swa_rotary_dim", turn[1]))
    q_oracle = rotated(heads(oracle, "q_proj", x_oracle, H), *turn)
    k = rotated(heads(oracle, "k_proj", x_oracle, H), *turn)
    v = heads(oracle, "v_proj", x_oracle, spec.v_head_dim)
    k_oracle = k
    if not options.get("share_kv_sa", True):
        k, v = rotated(heads(sparse, "k_proj", x, H), *turn), heads(sparse, "v_proj", x, spec.v_head_dim)
    q = heads(sparse, "q_proj", x, H)
    gates = (x @ sparse.gate_proj.weight.detach().double().T).sigmoid()
    gates = gates.view(T, 1 if spec.window is None else 2, N, -1)
    out = torch.zeros(T, N, spec.v_head_dim, dtype=torch.float64)
    lists = []
    for t in range(T):
        for n in range(N):
            scores = {}
            for h in range(n // group * group, (n // group + 1) * group):
                probs = (k_oracle[: t + 1, n // group] @ q_oracle[t, h] / math.sqrt(H)).softmax(0)
                for j, prob in enumerate(probs.tolist()):
                    block = j // block_size
                    scores[block] = max(scores.get(block, 0.0), prob)
            budget, window = oracle.spec.options["num_blocks"], oracle.spec.options["forced_window"]
            forced = (
                set() if window is None else {j // block_size for j in range(max(0, t - window + 1), t + 1)}
            )
            ranked = sorted((b for b in scores if b not in forced), key=lambda b: (-scores[b], b))
            chosen = forced | set(ranked[:budget])
            lists.append(chosen)
            rows = [j for j in range(t + 1) if j // block_size in chosen]
            sink = sparse.sink_sa.detach().double()[n : n + 1]
            logits = k[rows, n // group] @ rotated(q, *turn)[t, n] / math.sqrt(H)
            probs = torch.cat([logits, sink]).softmax(0)[:-1]
            out[t, n] = gates[t, 0, n] * (probs @ v[rows, n // group])
            if spec.window is not None:
                if sparse.swa_k_proj is None:
                    k_own, v_own = k, v
                else:
                    k_own = rotated(heads(sparse, "swa_k_proj", x, H), *own)
                    v_own = heads(sparse, "swa_v_proj", x, spec.v_head_dim)
                rows = list(range(max(0, t - spec.window + 1), t + 1))
                logits = k_own[rows, n // group] @ rotated(q, *own)[t, n] / math.sqrt(H)
                probs = torch.cat([logits, sparse.sink_swa.detach().double()[n : n + 1]]).softmax(0)[:-1]
                out[t, n] += gates[t, 1, n] * (probs @ v_own[rows, n // group])
    return out.flatten(1) @ sparse.o_proj.weight.detach().double().T, lists


@pytest.mark.parametrize(
    "settings",
    [
        {"num_blocks": 2, "block_size": 4},
        {"num_blocks": 1, "block_size": 5, "gate_granularity": "element"},
        {"num_blocks": 2, "block_size": 3, "swa_rope_theta": 7.0, "swa_rotary_dim": 6},
        {"num_blocks": 3, "block_size": 1, "window": None, "forced": 4},
        {"num_blocks": 1, "block_size": 3, "window": None, "forced": 4},
        {"num_blocks": 2, "block_size": 4, "share_kv_sa": False},
        {"num_blocks": 2, "block_size": 4, "share_kv_sa": False, "window": None},
        {"num_blocks": 2, "block_size": 4, "share_kv_swa": True},
    ],
    ids=[
        "gated",
        "gate per channel",
        "own rotation",
        "tokens and a forced window",
        "blocks and a forced window",
        "no sharing",
        "no sharing and no window",
        "sharing in both branches",
    ],
)
def test_outputs_and_lists_are_those_of_the_definition(settings):
    oracle, sparse = oracle_and_sparse(**settings)
    T = 23
    x_oracle, x, seq, links = hidden(T), hidden(T, seed=2), Sequences.of_lengths([T]), LayerLinks()
    oracle(x_oracle, seq, None, links)
    got = sparse(x, seq, None, links)
    want, lists = by_definition(oracle, sparse, x_oracle, x)
    chosen = links.selections[0]
    for i, blocks in enumerate(lists):
        t, n = divmod(i, 4)
        row = [b for b in chosen[n // 2, t].tolist() if b >= 0]
        assert len(row) == len(set(row))
        assert set(row) == blocks
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def open_gates(sparse, first, second):
    """Gates of exactly these values, 0 or 1, for inputs whose channel 0 is 1."""
    N = sparse.spec.num_attention_heads
    with torch.no_grad():
        sparse.gate_proj.weight.zero_()
        sparse.gate_proj.weight[:N, 0] = 1e4 if first else -1e4
        sparse.gate_proj.weight[N:, 0] = 1e4 if second else -1e4


def dense(q, k, v, window=None):
    """Causal attention of [T, N, .] without grouping, by torch's softmax."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("tnh,snh->nts", q, k) / math.sqrt(q.shape[-1])
    seen = torch.ones(len(q), len(q)).tril().bool()
    if window is not None:
        seen &= ~torch.ones(len(q), len(q)).tril(-window).bool()
    return torch.einsum("nts,snv->tnv", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def test_a_budget_of_all_blocks_equals_dense_attention_over_the_shared_rows_with_gradients():
    T, theta = 21, (100.0, 4)
    layers = oracle_and_sparse(num_blocks=6, block_size=4, consumers=2)
    oracle, *consumers = layers
    for sparse in consumers:
        open_gates(sparse, 1, 0)
        with torch.no_grad():
            sparse.sink_sa.fill_(-math.inf)
            sparse.sink_swa.fill_(-math.inf)
    inputs = [hidden(T, seed=i) for i in range(3)]
    for x in inputs:
        x[:, 0] = 1.0
    d_out = [hidden(T, seed=i + 9) for i in range(3)]

    def ours():
        seq, links = Sequences.of_lengths([T]), LayerLinks()
        return [layer(x, seq, None, links) for layer, x in zip(layers, inputs, strict=True)]

    def by_hand():
        k = rotated(oracle.k_proj(inputs[0]).unflatten(1, (2, 6)), *theta).float()
        v = oracle.v_proj(inputs[0]).unflatten(1, (2, 4))
        queries = (layer.q_proj(x).unflatten(1, (4, 6)) for layer, x in zip(layers, inputs, strict=True))
        outs = [dense(rotated(q, *theta).float(), k, v) for q in queries]
        return [layer.o_proj(out.flatten(1)) for layer, out in zip(layers, outs, strict=True)]

    found = []
    for forward in (ours, by_hand):
        for layer in layers:
            layer.zero_grad()
        outs = forward()
        sum((out * d).sum() for out, d in zip(outs, d_out, strict=True)).backward()
        names = ("q_proj", "o_proj")
        grads = [getattr(layer, name).weight.grad.clone() for layer in layers for name in names]
        grads += [oracle.k_proj.weight.grad.clone(), oracle.v_proj.weight.grad.clone()]
        found.append([*outs, *grads])
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    # The oracle's keys and values also learn from each consumer: without them the gradient is another one.
    oracle.zero_grad()
    (ours()[0] * d_out[0]).sum().backward()
    for name, whole in (("k_proj", found[1][-2]), ("v_proj", found[1][-1])):
        assert (getattr(oracle, name).weight.grad - whole).abs().max() > 0.1


def test_closing_the_first_gate_leaves_sliding_attention_over_own_rows():
    T = 17
    oracle, sparse = oracle_and_sparse(num_blocks=1, block_size=4)
    open_gates(sparse, 0, 1)
    with torch.no_grad():
        sparse.sink_swa.fill_(-math.inf)
    x = hidden(T)
    x[:, 0] = 1.0
    seq, links = Sequences.of_lengths([T]), LayerLinks()
    oracle(x, seq, None, links)
    q, k = (getattr(sparse, name)(x).unflatten(1, (-1, 6)) for name in ("q_proj", "swa_k_proj"))
    v = sparse.swa_v_proj(x).unflatten(1, (-1, 4))
    want = dense(rotated(q, 100.0, 4).float(), rotated(k, 100.0, 4).float(), v, window=5)
    torch.testing.assert_close(
        sparse(x, seq, None, links), sparse.o_proj(want.flatten(1)), rtol=1e-5, atol=1e-5
    )


def test_a_gate_of_one_half_halves_a_sliding_layer():
    spec = replace(BASE, attention="sliding_attention", window=4, options={})
    plain = Attention.kinds["sliding_attention"](D, spec, EPS)
    gated = Attention.kinds["gated_sliding_attention"](D, spec, EPS)
    gated.load_state_dict(plain.state_dict() | {"gate_proj.weight": torch.zeros(4, D)})
    with torch.no_grad():
        plain.o_proj.bias = gated.o_proj.bias = None
    x, seq = hidden(11), Sequences.of_lengths([11])
    want = plain(x, seq, None, LayerLinks()) / 2
    torch.testing.assert_close(gated(x, seq, None, LayerLinks()), want, rtol=1e-6, atol=1e-6)


def test_an_oracle_is_a_full_layer_and_one_that_lends_nothing_chooses_nothing():
    oracle = oracle_and_sparse(num_blocks=2, block_size=4)[0]
    full = Attention.kinds["full_attention"](D, replace(BASE, options={}), EPS)
    full.load_state_dict(oracle.state_dict())
    x, seq, links = hidden(19), Sequences.of_lengths([12, 7]), LayerLinks()
    # The kernel that also lists blocks is another one: it adds up in another order.
    torch.testing.assert_close(
        oracle(x, seq, None, links), full(x, seq, None, LayerLinks()), rtol=1e-6, atol=1e-6
    )
    assert links.selections[0].shape == (2, 19, 2)
    silent = Attention.kinds["oracle_attention"](D, replace(BASE, options={"publishes_input": True}), EPS)
    links = LayerLinks()
    silent(x, seq, None, links)
    assert (links.selections, links.kv) == ({}, {})
    assert torch.equal(links.hidden[0], x)
