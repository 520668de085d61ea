"""`ops.block_sparse_attention` against a float64 oracle, and the selections it is fed with."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ShapeError
from sateen.ops.block_sparse_attention import OP, gathered

BACKENDS = [name for name in OP.backends if name != "triton"]  # test_block_sparse_attention_triton.py has it
# dtype -> relative RMS error of the output and log-sum-exp, of the gradients.
TOLERANCES = {torch.float32: (2e-6, 4e-6), torch.bfloat16: (4e-3, 2e-2)}
# lengths of queries, of keys (None: the same), (N, K, H, V), block size, blocks per query, has a sink
GRID = {
    "one token": ([1], None, (2, 1, 8, 8), 64, 1, True),
    "a block less one": ([63], None, (4, 2, 8, 8), 64, 1, False),
    "a block": ([64], None, (4, 1, 8, 6), 64, 2, True),
    "a block and one": ([65], None, (2, 2, 6, 10), 64, 1, True),
    "odd blocks": ([50, 3, 0, 21], None, (4, 2, 8, 8), 7, 2, True),
    "single tokens": ([70, 9], None, (4, 1, 8, 4), 1, 5, True),
    "past a chunk": ([300], None, (2, 1, 8, 8), 16, 3, True),
    "far past the chosen": ([400], None, (2, 1, 8, 8), 8, 2, False),
    "decode": ([1, 3, 1, 0], [9, 3, 300, 4], (4, 2, 8, 4), 16, 2, True),
    "chunked prefill": ([33, 2], [130, 40], (2, 1, 8, 8), 64, 1, False),
    "queries without keys": ([4, 3, 2], [2, 0, 5], (2, 1, 8, 8), 2, 1, True),
    "nothing": ([0, 0], None, (2, 1, 8, 8), 4, 1, True),
}


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def random_lists(lengths_q, lengths_k, K, block_size, n, seed=0):
    """Distinct blocks per row in any order, padded, some of them ahead of the query."""
    rng = np.random.default_rng(seed)
    rows = np.full((K, sum(lengths_q), n), -1, dtype=np.int32)
    at = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        for t in range(at, at + length_q):
            for head in range(K):
                order = rng.permutation(max(1, -(-length_k // block_size)))[: rng.integers(0, n + 1)]
                rows[head, t, : len(order)] = order
        at += length_q
    return torch.from_numpy(rows)


def truth(q, k, v, idx, *, cu_q, cu_k, block_size, sink=None, d_out=None):
    """Output, log-sum-exp and gradients written out query by query in float64."""
    qs, ks, vs = (x.detach().double().numpy() for x in (q, k, v))
    T, N, H = qs.shape
    group, scale = N // ks.shape[1], H**-0.5
    grad = np.zeros((T, N, vs.shape[2])) if d_out is None else d_out.double().numpy()
    got = {"out": np.zeros((T, N, vs.shape[2])), "lse": np.full((N, T), -np.inf)}
    got |= {
        "d_q": np.zeros_like(qs),
        "d_k": np.zeros_like(ks),
        "d_v": np.zeros_like(vs),
        "d_sink": np.zeros(N),
    }
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        for t in range(q0, q1):
            place = t - q0 + (k1 - k0) - (q1 - q0)
            for n in range(N):
                listed = set(idx[n // group, t].tolist()) - {-1}
                rows = [k0 + j for j in range(place + 1) if j // block_size in listed]
                if not rows:
                    continue
                keys, values = ks[rows, n // group], vs[rows, n // group]
                scores = scale * keys @ qs[t, n]
                lse = scores.max() + np.log(np.exp(scores - scores.max()).sum())
                logit = -np.inf if sink is None else float(sink.detach()[n])
                norm = np.logaddexp(lse, logit)
                probs = np.exp(scores - norm)
                d_probs = values @ grad[t, n]
                mean = float(probs @ d_probs)
                d_scores = probs * (d_probs - mean)
                got["out"][t, n], got["lse"][n, t] = probs @ values, lse
                got["d_q"][t, n] += scale * d_scores @ keys
                got["d_k"][rows, n // group] += scale * np.outer(d_scores, qs[t, n])
                got["d_v"][rows, n // group] += np.outer(probs, grad[t, n])
                got["d_sink"][n] -= np.exp(logit - norm) * mean
    return got


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_gradients_match_the_oracle(backend, case, dtype, measure, make_packed):
    lengths_q, lengths_k, shape, block_size, n, has_sink = GRID[case]
    lengths_k = lengths_k or lengths_q
    data = make_packed(lengths_q, lengths_k, shape, dtype, seed=1)
    d_out, sink = data.pop("d_out"), data.pop("sink")
    inputs = {name: x.requires_grad_() for name, x in data.items()}
    if has_sink:
        inputs["sink"] = sink.requires_grad_()
    idx = random_lists(lengths_q, lengths_k, shape[1], block_size, n)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    out, lse = ops.block_sparse_attention(
        inputs["q"], inputs["k"], inputs["v"], idx, block_size=block_size, cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k if lengths_k != lengths_q else None,
        sink_N=inputs.get("sink"), return_lse=True, backend=backend,
    )  # fmt: skip
    out.backward(d_out)
    want = truth(
        inputs["q"], inputs["k"], inputs["v"], idx, cu_q=cu_q.tolist(), cu_k=cu_k.tolist(),
        block_size=block_size, sink=inputs.get("sink"), d_out=d_out,
    )  # fmt: skip
    assert out.dtype == dtype
    assert not lse.requires_grad
    for name, tensor in ({"out": out, "lse": lse} | {f"d_{k}": x.grad for k, x in inputs.items()}).items():
        rms, _ = measure(tensor, want[name])
        allowed = 1e-5 if name == "lse" else TOLERANCES[dtype][name not in ("out", "lse")]
        assert rms <= allowed, f"{name}: relative RMS error {rms:.2e}"


def test_the_oracle_gradients_are_those_of_its_forward(make_packed):
    data = make_packed([3, 2], [5, 2], (2, 1, 3, 2), torch.float64, seed=2)
    d_out, sink = data.pop("d_out"), data.pop("sink").double()
    idx = random_lists([3, 2], [5, 2], 1, 2, 2, seed=3)
    settings = {"cu_q": [0, 3, 5], "cu_k": [0, 5, 7], "block_size": 2}

    def loss():
        return float((truth(*data.values(), idx, sink=sink, **settings)["out"] * d_out.numpy()).sum())

    want = truth(*data.values(), idx, sink=sink, d_out=d_out, **settings)
    for name, tensor in {**data, "sink": sink}.items():
        for i in range(tensor.numel()):
            flat = tensor.view(-1)
            centre = float(flat[i])
            flat[i] = centre + 1e-5
            above = loss()
            flat[i] = centre - 1e-5
            below = loss()
            flat[i] = centre
            assert (above - below) / 2e-5 == pytest.approx(float(want[f"d_{name}"].flat[i]), abs=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([130, 7], [130, 7]), ([3, 1], [200, 65])])
def test_lists_of_all_blocks_equal_dense_attention(backend, lengths_q, lengths_k, make_packed):
    data = make_packed(lengths_q, lengths_k, (4, 2, 8, 6), torch.float32, seed=4)
    d_out, sink = data.pop("d_out"), data.pop("sink")
    cu = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    idx = torch.arange(4, dtype=torch.int32).flip(0).expand(2, sum(lengths_q), 4)
    results = []
    for sparse in (True, False):
        inputs = [x.clone().requires_grad_() for x in (*data.values(), sink)]
        q, k, v, s = inputs
        if sparse:
            out = ops.block_sparse_attention(q, k, v, idx, block_size=64, sink_N=s, backend=backend, **cu)
        else:
            out = ops.attention(q, k, v, sink_N=s, backend="reference", **cu)
        out.backward(d_out)
        results.append([out, *(x.grad for x in inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gathering_and_reading_the_prefix_agree(make_packed, monkeypatch):
    data = make_packed([90], [90], (4, 2, 8, 8), torch.float32, seed=5)
    idx = random_lists([90], [90], 2, 8, 3, seed=6)
    results = []
    for cost, gathers in ((0, True), (10**6, False)):
        monkeypatch.setattr(gathered, "GATHER_COST", cost)
        monkeypatch.setattr(gathered, "GATHERED", 8000)  # 20 queries of 3 * 8 keys of 16 numbers
        spans = gathered._spans([0, 90], [0, 90], 16, 24)
        assert {span[-1] for span in spans} == {gathers}
        assert len(spans) == (5 if gathers else 1)
        inputs = [data[name].clone().requires_grad_() for name in "qkv"]
        out = ops.block_sparse_attention(
            *inputs, idx, block_size=8, cu_seqlens_q=offsets([90]), sink_N=data["sink"], backend="torch"
        )
        out.backward(data["d_out"])
        results.append([out, *(x.grad for x in inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 16, 16), (16, 1, 8, 8)], ids=["8 to 1", "16 to 1"])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 1000, 1024, 1025])
def test_block_scores_are_the_largest_probabilities(length, shape, make_packed):
    data = make_packed([length], [length], shape, torch.float32, seed=7)
    q, k = data["q"].double(), data["k"].double()
    _, lse, maxima = ops.attention(
        data["q"], data["k"], data["v"], cu_seqlens_q=offsets([length]), return_lse=True, block_max=64
    )
    got = (maxima - lse.unsqueeze(-1)).exp()
    scores = torch.einsum("tnh,sh->nts", q, k[:, 0]) / math.sqrt(shape[2])
    probs = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf).softmax(-1)
    for block in range(-(-length // 64)):
        want = probs[..., block * 64 : (block + 1) * 64].amax(-1)
        torch.testing.assert_close(got[..., block].double(), want, rtol=1e-5, atol=1e-7)
    assert got.max() <= 1 + 1e-5
    torch.testing.assert_close(got.amax(-1).double(), probs.amax(-1), rtol=1e-5, atol=1e-7)


def test_shape_errors_name_what_was_given_and_what_is_accepted():
    q, k, v = torch.zeros(4, 4, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    idx, cu = torch.zeros(2, 4, 1, dtype=torch.int32), offsets([4])

    def call(q=q, k=k, v=v, idx=idx, block_size=2, cu=cu, **changes):
        return ops.block_sparse_attention(q, k, v, idx, block_size=block_size, cu_seqlens_q=cu, **changes)

    with pytest.raises(ShapeError, match=r"takes q \[T,N,H\], k \[S,K,H\], v \[S,K,V\]; got"):
        call(v=torch.zeros(3, 2, 8))
    with pytest.raises(ShapeError, match=r"multiple of key/value heads; got q \(4, 3, 8\)"):
        call(q=torch.zeros(4, 3, 8))
    for wrong in (idx[:1], idx[:, :3], idx[..., :0], idx.float(), idx[0]):
        with pytest.raises(ShapeError, match=r"takes integer idx \[K,T,n\] with n at least 1; got"):
            call(idx=wrong)
    with pytest.raises(ShapeError, match="at least 1 key; got block_size 0"):
        call(block_size=0)
    with pytest.raises(ShapeError, match=r"one sink per query head; got \(2,\)"):
        call(sink_N=torch.zeros(2))
    with pytest.raises(ShapeError, match=r"offsets end at \(3, 3\)"):
        call(cu=offsets([3]))
    with pytest.raises(BackendUnavailable, match=r"cannot run this call: .*float64"):
        call(q=q.double(), k=k.double(), v=v.double(), backend="torch")
    assert call(q=q.double(), k=k.double(), v=v.double()).dtype == torch.float64
