"""`ops.attention_and_blocks`: its output against dense attention, its lists against sorting all scores."""

from __future__ import annotations

import math
import os
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ShapeError
from sateen.ops import native as loader
from sateen.ops.attention_and_blocks import OP, chunked

needs_kernels = pytest.mark.skipif(
    loader.native_available() is not None, reason="needs the compiled kernels: a C++ compiler at install time"
)
LENGTHS = {
    "odd": ([1, 63, 0, 17], None),
    "past blocks": ([65], None),
    "cached": ([1, 3, 40], [300, 3, 90]),
    "queries without keys": ([4, 3], [2, 0]),
    "nothing": ([0], None),
}
# block size, blocks, forced window
CHOICES = [(16, 2, None), (64, 1, None), (7, 3, 9), (1, 12, None), (1, 5, 16), (32, 2, 40)]


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def by_sorting(q, k, cu_q, cu_k, block_size, num_blocks, forced_window, scale, aggregate):
    """The lists of every query, from a float64 softmax and Python's stable sort."""
    q, k, group, lists = q.double().numpy(), k.double().numpy(), q.shape[1] // k.shape[1], {}
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        for t in range(q0, q1):
            place = t - q0 + (k1 - k0) - (q1 - q0)
            for head in range(k.shape[1]):
                if place < 0:
                    lists[head, t] = [], []
                    continue
                heads = q[t, head * group : (head + 1) * group]
                weights = np.exp(scale * heads @ k[k0 : k0 + place + 1, head].T)
                probs = weights / weights.sum(1, keepdims=True)
                per_head = np.maximum.reduceat(probs, range(0, place + 1, block_size), axis=1)
                scores = (per_head.mean(0) if aggregate == "mean" else per_head.max(0)).tolist()
                first = len(scores)
                if forced_window is not None:
                    first = max(0, place - forced_window + 1) // block_size
                ranked = sorted(range(first), key=lambda b, s=scores: (-s[b], b))
                lists[head, t] = sorted(ranked[:num_blocks]), list(range(first, len(scores)))
    return lists


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("backend", OP.backends)
@pytest.mark.usefixtures("poisoned_memory")
def test_outputs_and_lists_match_their_definitions(backend, name, choice, aggregate, make_packed):
    lengths_q, lengths_k = LENGTHS[name]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k or lengths_q)
    block_size, num_blocks, forced_window = choice
    data = make_packed(lengths_q, lengths_k or lengths_q, (4, 2, 8, 6), torch.float32, seed=11)
    call = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k if lengths_k else None}
    out, lists = ops.attention_and_blocks(
        data["q"], data["k"], data["v"], sink_N=data["sink"], block_size=block_size, num_blocks=num_blocks,
        forced_window=forced_window, aggregate=aggregate, backend=backend, **call,
    )  # fmt: skip
    want = ops.attention(data["q"], data["k"], data["v"], sink_N=data["sink"], backend="reference", **call)
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    assert lists.dtype == torch.int32
    by_definition = by_sorting(data["q"], data["k"], cu_q, cu_k, *choice, 8**-0.5, aggregate)
    for (head, t), (chosen, recent) in by_definition.items():
        row = lists[head, t].tolist()
        assert row[:num_blocks] == chosen + [-1] * (num_blocks - len(chosen))
        assert row[num_blocks:] == recent + [-1] * (len(row) - num_blocks - len(recent))


@pytest.mark.parametrize("shape", [(8, 1, 16, 16), (16, 1, 8, 8), (6, 2, 5, 3)], ids=str)
@pytest.mark.parametrize("block_size", [1, 5, 16, 64])
@pytest.mark.parametrize("backend", set(OP.backends) - {"reference"})
def test_equal_scores_go_to_the_lower_block(backend, block_size, shape, make_packed):
    # Small whole numbers and a scale of 1/4 make scores that are equal and exact in float32.
    data = make_packed([150], [150], shape, torch.float32, seed=12)
    q, k, v = ((data[name] * 1.5).round() for name in "qkv")
    call = {"block_size": block_size, "num_blocks": 3, "scale": 0.25, "cu_seqlens_q": offsets([150])}
    _, lists = ops.attention_and_blocks(q, k, v, backend=backend, **call)
    _, lse, maxima = ops.attention(
        q, k, v, cu_seqlens_q=offsets([150]), scale=0.25, return_lse=True, block_max=block_size,
        backend="reference",
    )  # fmt: skip
    assert torch.equal(lists, ops.select_blocks(maxima, lse, num_kv_heads=shape[1], num_blocks=3))
    top = (maxima - lse.unsqueeze(-1)).unflatten(0, (shape[1], -1)).amax(1).sort(descending=True).values
    if block_size == 1:
        assert (top[..., 2] == top[..., 3]).any()  # the choice had to break a tie


@pytest.mark.parametrize("backend", OP.backends)
def test_heads_are_compared_by_probability_not_by_logit(backend):
    # Head 0 has large logits, but spread evenly over 8 keys; head 1 small ones, almost all on key 5.
    q = torch.tensor([[[10.0, 0.0], [0.0, 1.0]]])
    k = torch.zeros(8, 1, 2)
    k[:, 0, 0] = 1.0
    k[2, 0, 0] = 1.001
    k[5, 0, 1] = 8.0
    _, lists = ops.attention_and_blocks(
        q, k, k, block_size=1, num_blocks=1, cu_seqlens_q=offsets([1]), cu_seqlens_k=offsets([8]), scale=1.0,
        backend=backend,
    )  # fmt: skip
    assert lists.tolist() == [[[5]]]
    assert int((k[:, 0] @ q[0].T).max(-1).values.argmax()) == 2


@pytest.mark.parametrize("backend", OP.backends)
def test_a_group_may_rank_by_its_mean_instead_of_its_most_certain_head(backend):
    # Head 0 puts nine tenths on key 1; the others put half on key 2.
    logits = torch.tensor([[0.0, 0.9, 0.1], [0.45, 0.05, 0.5], [0.45, 0.05, 0.5], [0.45, 0.05, 0.5]])
    q = (logits + 1e-3).log()[None]
    k = torch.eye(3)[:, None]
    chosen = [
        ops.attention_and_blocks(
            q, k, k, block_size=1, num_blocks=1, cu_seqlens_q=offsets([1]), cu_seqlens_k=offsets([3]),
            scale=1.0, aggregate=aggregate, backend=backend,
        )[1].item()
        for aggregate in ("max", "mean")
    ]  # fmt: skip
    assert chosen == [1, 2]


def test_another_aggregate_is_refused():
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ShapeError, match="aggregate 'sum' must be 'max' or 'mean'"):
        ops.attention_and_blocks(
            x, x, x, block_size=1, num_blocks=1, cu_seqlens_q=offsets([1]), aggregate="sum"
        )


@needs_kernels
@pytest.mark.parametrize("level", ["generic", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.usefixtures("poisoned_memory")
def test_every_instruction_set_and_number_of_threads_agree(level, make_packed):
    try:
        loader.native().select_isa(level)
    except ValueError:
        pytest.skip(f"needs a processor with {level}")
    before = torch.get_num_threads()
    try:
        for lengths_q, lengths_k in (([200, 5], [200, 5]), ([1], [1700]), ([2, 1], [900, 300])):
            data = make_packed(lengths_q, lengths_k, (8, 2, 24, 20), torch.float32, seed=13)
            cu = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
            q, k, v = (data[name] for name in "qkv")
            want = ops.attention(q, k, v, return_lse=True, block_max=48, backend="reference", **cu)
            for threads in (1, 3):
                torch.set_num_threads(threads)
                got = ops.attention(q, k, v, return_lse=True, block_max=48, backend="native", **cu)
                for ours, theirs in zip(got, want, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
                for block_size, num_blocks in ((48, 3), (1, 70), (16, 10)):
                    for aggregate in ("max", "mean"):
                        settings = {"block_size": block_size, "num_blocks": num_blocks}
                        lists = [
                            ops.attention_and_blocks(
                                q, k, v, backend=backend, aggregate=aggregate, **settings, **cu
                            )[1]
                            for backend in ("native", "reference")
                        ]
                        assert torch.equal(*lists)
    finally:
        torch.set_num_threads(before)
        loader.native().select_isa(os.environ.get("SATEEN_CPU_ISA", ""))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", OP.backends)
def test_only_the_output_has_a_gradient(backend, dtype, make_packed, attention_truth, measure):
    data = make_packed([70, 9], [70, 9], (4, 2, 8, 6), dtype, seed=14)
    d_out = data.pop("d_out")
    inputs = {name: x.requires_grad_() for name, x in data.items()}
    cu = offsets([70, 9])
    out, lists = ops.attention_and_blocks(
        inputs["q"], inputs["k"], inputs["v"], sink_N=inputs["sink"], block_size=16, num_blocks=2,
        cu_seqlens_q=cu, backend=backend,
    )  # fmt: skip
    out.backward(d_out)
    assert out.dtype == dtype
    assert not lists.requires_grad
    want = attention_truth(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        cu_q=cu.tolist(),
        cu_k=cu.tolist(),
        sink=inputs["sink"],
        d_out=d_out,
    )
    for name, tensor in ({"out": out} | {f"d_{name}": x.grad for name, x in inputs.items()}).items():
        rms, _ = measure(tensor, getattr(want, name))
        assert rms <= (4e-6 if dtype == torch.float32 else 2e-2), f"{name}: relative RMS error {rms:.2e}"


@needs_kernels
def test_the_custom_operator_holds_its_contract_and_compiles(make_packed):
    data = make_packed([9, 11], [9, 11], (4, 2, 16, 8), torch.float32, seed=15)
    q, k, v, sink = (data[name].requires_grad_() for name in ("q", "k", "v", "sink"))
    cu = offsets([9, 11])
    for columns, chosen in ((3, 2), (5, 0)):
        arguments = (q, k, v, cu, cu, sink, 0.3, 4, columns, chosen, 0, False)
        torch.library.opcheck(torch.ops.sateen.oracle_forward.default, arguments)

    def both(q, k, v):
        out, lists = ops.attention_and_blocks(
            q * 2, k, v, block_size=4, num_blocks=2, cu_seqlens_q=cu, backend="native"
        )
        return out, lists

    plain = both(q, k, v)
    traced = torch.compile(both, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(plain[0], traced[0])
    assert torch.equal(plain[1], traced[1])


@pytest.mark.parametrize("forced", [None, 6])
@pytest.mark.parametrize(("lengths", "old"), [([40, 0, 9], [0, 0, 0]), ([12, 3], [20, 1])])
def test_lists_do_not_depend_on_how_queries_are_cut(lengths, old, forced, monkeypatch, make_packed):
    keys = [n + m for n, m in zip(lengths, old, strict=True)]
    data = make_packed(lengths, keys, (4, 2, 6, 6), torch.float32, seed=3)
    lists = []
    for chunk in (256, 7, 1):
        monkeypatch.setattr(chunked, "CHUNK", chunk)
        _, found = ops.attention_and_blocks(
            data["q"], data["k"], data["v"], block_size=4, num_blocks=3, forced_window=forced,
            cu_seqlens_q=offsets(lengths), cu_seqlens_k=offsets(keys), backend="torch",
        )  # fmt: skip
        lists.append(found)
    assert torch.equal(lists[0], lists[1])
    assert torch.equal(lists[0], lists[2])


def test_the_best_of_many_tokens_need_no_sort(make_packed):
    """1,000 of 5,000 tokens for one query, against `topk` of the exact scores."""
    data = make_packed([1], [5000], (2, 1, 16, 4), torch.float32, seed=16)
    _, lists = ops.attention_and_blocks(
        data["q"], data["k"], data["v"], block_size=1, num_blocks=1000, cu_seqlens_q=offsets([1]),
        cu_seqlens_k=offsets([5000]),
    )  # fmt: skip
    scores = (data["q"][0].double() @ data["k"][:, 0].double().T / math.sqrt(16)).softmax(-1).amax(0)
    assert lists[0, 0].tolist() == scores.topk(1000).indices.sort().values.tolist()


def test_errors_name_what_was_given_and_what_is_accepted():
    q, k, v = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)

    def call(q=q, **changes):
        options = {"block_size": 2, "num_blocks": 1, "cu_seqlens_q": offsets([4])} | changes
        return ops.attention_and_blocks(q, k.to(q.dtype), v.to(q.dtype), **options)

    for changes in ({"block_size": 0}, {"num_blocks": 0}, {"forced_window": 0}):
        with pytest.raises(ShapeError, match="of at least 1; got"):
            call(**changes)
    with pytest.raises(ShapeError, match="multiple of key/value heads"):
        call(q=torch.zeros(4, 3, 8))
    for backend in ("torch", "native"):
        with pytest.raises(BackendUnavailable, match=r"float64|missing"):
            call(q=q.double(), backend=backend)
    assert call(q=q.double())[0].dtype == torch.float64
