"""`ops.attention` and `ops.select_blocks` against a float64 oracle; the backends written in torch."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ShapeError
from sateen.ops.attention import OP

# dtype -> relative RMS error of the output, the log-sum-exp, the gradients. A backward pass reads the rounded
# output, so a bfloat16 gradient that nearly cancels (one key and a sink) keeps fewer digits than the output.
TOLERANCES = {torch.float32: (2e-6, 2e-6, 2e-6), torch.bfloat16: (4e-3, 1e-5, 3e-2)}
# dtype -> the largest absolute error per unit of the largest true value.
LARGEST = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
# lengths of queries, of keys (None: the same), (N, K, H, V), window, has a sink
GRID = {
    "one token": ([1], None, (2, 1, 8, 8), None, True),
    "odd": ([7], None, (4, 2, 8, 8), None, False),
    "a tile": ([64], None, (2, 2, 16, 8), None, True),
    "a tile and one": ([65], None, (4, 1, 6, 10), 64, False),
    "chunk less one": ([255], None, (2, 1, 8, 4), None, True),
    "chunk": ([256], None, (2, 1, 8, 8), 256, True),
    "chunk and one": ([257], None, (2, 1, 8, 8), 256, True),
    "chunk and one, flash": ([257], None, (2, 1, 8, 8), None, True),
    "far past the window": ([600], None, (2, 1, 8, 8), 37, True),
    "window of one": ([65, 3], None, (2, 1, 8, 8), 1, True),
    "window as long as the batch": ([33, 33, 33], None, (4, 2, 8, 8), 33, True),
    "equal lengths": ([33, 33, 33], None, (4, 2, 8, 8), None, True),
    "equal lengths, window one short": ([33, 33, 33], None, (4, 2, 8, 8), 32, True),
    "empty sequences": ([0, 3, 0, 5, 0], None, (2, 1, 8, 8), None, True),
    "nothing": ([0, 0], None, (2, 1, 8, 8), None, True),
    "decode": ([1, 3, 1, 0], [9, 3, 300, 4], (4, 2, 8, 4), None, True),
    "decode in a window": ([1, 3, 1, 2], [9, 65, 300, 130], (4, 2, 8, 8), 64, True),
    "chunked prefill": ([257, 2], [300, 40], (2, 1, 8, 8), 30, False),
    "queries without keys": ([4, 3, 2], [2, 0, 5], (2, 1, 8, 8), 2, True),
    "queries without keys or sinks": ([4, 3, 2], [2, 0, 5], (2, 1, 8, 8), None, False),
}
BACKENDS = ["reference", "torch"]


def offsets(lengths):
    return [0, *accumulate(lengths)]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", GRID)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_gradients_match_the_oracle(backend, case, dtype, attention_truth, measure, make_packed):
    lengths_q, lengths_k, shape, window, has_sink = GRID[case]
    lengths_k = lengths_k or lengths_q
    data = make_packed(lengths_q, lengths_k, shape, dtype, seed=1)
    d_out, sink = data.pop("d_out"), data.pop("sink")
    inputs = {name: x.requires_grad_() for name, x in data.items()}
    if has_sink:
        inputs["sink"] = sink.requires_grad_()
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    out, lse = ops.attention(
        inputs["q"], inputs["k"], inputs["v"],
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32) if cu_k != cu_q else None,
        window=window, sink_N=inputs.get("sink"), return_lse=True, backend=backend,
    )  # fmt: skip
    out.backward(d_out)
    want = attention_truth(
        inputs["q"], inputs["k"], inputs["v"],
        cu_q=cu_q, cu_k=cu_k, d_out=d_out, window=window, sink=inputs.get("sink"),
    )  # fmt: skip

    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    got = {"out": out, "lse": lse} | {f"d_{name}": x.grad for name, x in inputs.items()}
    for name, tensor in got.items():
        truth = getattr(want, name)
        assert tensor.shape == truth.shape, name
        rms, largest = measure(tensor, truth)
        allowed_rms = TOLERANCES[dtype][{"out": 0, "lse": 1}.get(name, 2)]
        top = abs(truth[abs(truth) < math.inf]).max(initial=1.0)
        assert rms <= allowed_rms, f"{name}: relative RMS error {rms:.2e}"
        assert largest <= LARGEST[dtype] * top, f"{name}: largest error {largest:.2e} of {top:.2e}"


def test_the_oracle_gradients_are_those_of_its_forward(attention_truth, make_packed):
    data = make_packed([3, 2], [5, 2], (2, 1, 3, 2), torch.float64, seed=2)
    d_out = data.pop("d_out")
    sink = data.pop("sink").double()
    settings = {"cu_q": [0, 3, 5], "cu_k": [0, 5, 7], "window": 3}

    def loss():
        out = attention_truth(*data.values(), sink=sink, **settings).out
        return float((out * d_out.numpy()).sum())

    want = attention_truth(*data.values(), sink=sink, d_out=d_out, **settings)
    for name, tensor in {**data, "sink": sink}.items():
        analytic = torch.from_numpy(getattr(want, f"d_{name}")).flatten()
        for i in range(tensor.numel()):
            flat = tensor.view(-1)
            centre = float(flat[i])
            flat[i] = centre + 1e-5
            above = loss()
            flat[i] = centre - 1e-5
            below = loss()
            flat[i] = centre
            assert (above - below) / 2e-5 == pytest.approx(float(analytic[i]), abs=1e-7)


@pytest.mark.usefixtures("poisoned_memory")
def test_poisoned_memory_bites():
    like = torch.zeros(3)
    for fresh in (torch.empty(3), like.new_empty(3), torch.empty_like(like), torch.empty_strided((3,), (1,))):
        assert fresh.isnan().all()
    assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2


def test_poisoned_memory_ends_with_its_test():
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_multiplies_the_scores_but_not_the_sink(backend):
    q, k = torch.full((1, 1, 4), 2.0), torch.full((1, 1, 4), 3.0)
    v = torch.ones(1, 1, 4)
    cu = torch.tensor([0, 1], dtype=torch.int32)
    out, lse = ops.attention(
        q, k, v, cu_seqlens_q=cu, scale=0.125, sink_N=torch.tensor([3.0]), return_lse=True, backend=backend
    )
    assert lse.item() == pytest.approx(3.0)  # 24 * 0.125, equal to the sink
    assert out[0, 0].tolist() == pytest.approx([0.5] * 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lengths", "window"), [([40, 9], 7), ([40, 9], None), ([33, 33], None)])
def test_sink_limits_and_the_sigmoid_identity(backend, lengths, window, make_packed):
    data = make_packed(lengths, lengths, (4, 2, 8, 8), torch.float32, seed=3)
    sink = data["sink"]
    cu = torch.tensor(offsets(lengths), dtype=torch.int32)

    def attend(sink_N):
        return ops.attention(
            data["q"], data["k"], data["v"],
            cu_seqlens_q=cu, window=window, sink_N=sink_N, return_lse=True, backend=backend,
        )  # fmt: skip

    plain, lse = attend(None)
    with_sink, lse_with_sink = attend(sink)
    torch.testing.assert_close(lse_with_sink, lse, rtol=0, atol=0)
    kept = torch.sigmoid(lse - sink[:, None])
    torch.testing.assert_close(with_sink, plain * kept.t().unsqueeze(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attend(torch.full((4,), -math.inf))[0], plain, rtol=1e-6, atol=1e-6)
    assert attend(torch.full((4,), math.inf))[0].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("lengths", "window"), [([9, 4], 5), ([8, 8], None)])
def test_gradients_stay_finite_at_infinite_sinks(backend, lengths, window, make_packed):
    data = make_packed(lengths, lengths, (2, 1, 4, 4), torch.float32, seed=4)
    cu = torch.tensor(offsets(lengths), dtype=torch.int32)
    plain = [data[name].clone().requires_grad_() for name in "qkv"]
    ops.attention(*plain, cu_seqlens_q=cu, window=window, backend=backend).backward(data["d_out"])
    for limit, factor in ((-math.inf, 1.0), (math.inf, 0.0)):
        inputs = [data[name].clone().requires_grad_() for name in "qkv"]
        sink = torch.full((2,), limit).requires_grad_()
        ops.attention(*inputs, cu_seqlens_q=cu, window=window, sink_N=sink, backend=backend).backward(
            data["d_out"]
        )
        for got, want in zip(inputs, plain, strict=True):
            torch.testing.assert_close(got.grad, want.grad * factor, rtol=1e-5, atol=1e-6)
        assert sink.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_precision_of_scores(backend, attention_truth, measure, make_packed):
    data = make_packed([70], [70], (2, 1, 16, 16), torch.float32, seed=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.attention(
            data["q"], data["k"], data["v"],
            cu_seqlens_q=torch.tensor([0, 70], dtype=torch.int32), window=20, backend=backend,
        )  # fmt: skip
    want = attention_truth(data["q"], data["k"], data["v"], cu_q=[0, 70], cu_k=[0, 70], window=20)
    assert measure(out, want.out)[0] < TOLERANCES[torch.float32][0]


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([65, 1, 0, 130], [65, 1, 0, 130]), ([2, 1], [70, 129])]
)
@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.usefixtures("poisoned_memory")
def test_tile_maxima_are_raw_scaled_scores(
    lengths_q, lengths_k, block, attention_truth, measure, make_packed
):
    data = make_packed(lengths_q, lengths_k, (4, 2, 8, 8), torch.float32, seed=6)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    out, lse, maxima = ops.attention(
        data["q"], data["k"], data["v"],
        cu_seqlens_q=torch.tensor(cu_q, dtype=torch.int32),
        cu_seqlens_k=torch.tensor(cu_k, dtype=torch.int32),
        sink_N=data["sink"], return_lse=True, block_max=block, backend="reference",
    )  # fmt: skip
    want = attention_truth(
        data["q"], data["k"], data["v"], cu_q=cu_q, cu_k=cu_k, sink=data["sink"], block=block
    )
    assert maxima.dtype == torch.float32
    assert maxima.shape == want.block_max.shape
    for got, truth in ((out, want.out), (lse, want.lse), (maxima, want.block_max)):
        assert measure(got, truth)[0] < 2e-6


def test_selection_takes_the_group_maximum_of_probabilities_not_of_logits():
    # Head 0 has large logits and spreads them evenly; head 1 is sure of block 2 at small logits. Ranked by
    # raw logits the group would keep blocks 0 and 1; by probability it keeps 2 and one of head 0's.
    maxima = torch.tensor([[[9.0, 8.9, 8.8]], [[-3.0, -4.0, 1.0]]])
    lse = torch.tensor([[10.1], [1.1]])
    assert ops.select_blocks(maxima, lse, num_kv_heads=1, num_blocks=1).tolist() == [[[2]]]
    assert ops.select_blocks(maxima, lse, num_kv_heads=1, num_blocks=2).tolist() == [[[0, 2]]]
    # As heads of their own, each keeps its own best.
    assert ops.select_blocks(maxima, lse, num_kv_heads=2, num_blocks=1).tolist() == [[[0]], [[2]]]


def test_selection_ties_go_to_the_lower_block_and_short_rows_are_padded():
    inf = math.inf
    maxima = torch.tensor([[[1.0, 2.0, 1.0, 1.0], [5.0, -inf, -inf, -inf], [-inf, -inf, -inf, -inf]]])
    lse = torch.tensor([[3.0, 5.0, -inf]])
    chosen = ops.select_blocks(maxima, lse, num_kv_heads=1, num_blocks=3)
    assert chosen.dtype == torch.int32
    assert chosen.tolist() == [[[0, 1, 2], [0, -1, -1], [-1, -1, -1]]]
    wide = ops.select_blocks(maxima, lse, num_kv_heads=1, num_blocks=6)
    assert wide.tolist() == [[[0, 1, 2, 3, -1, -1], [0, -1, -1, -1, -1, -1], [-1] * 6]]


def test_shape_errors_name_what_was_given_and_what_is_accepted():
    q, k, v = torch.zeros(4, 3, 8), torch.zeros(4, 2, 8), torch.zeros(4, 2, 8)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(
        ShapeError, match=r"query heads that are a multiple of key/value heads; got q \(4, 3, 8\)"
    ):
        ops.attention(q, k, v, cu_seqlens_q=cu)
    q = torch.zeros(4, 4, 8)
    with pytest.raises(ShapeError, match=r"takes q \[T,N,H\], k \[S,K,H\], v \[S,K,V\]; got"):
        ops.attention(q, torch.zeros(4, 2, 6), v, cu_seqlens_q=cu)
    with pytest.raises(ShapeError, match=r"takes q \[T,N,H\]"):
        ops.attention(q, k, torch.zeros(3, 2, 8), cu_seqlens_q=cu)
    with pytest.raises(ShapeError, match=r"offsets end at \(3, 3\)"):
        ops.attention(q, k, v, cu_seqlens_q=torch.tensor([0, 3], dtype=torch.int32))
    with pytest.raises(ShapeError, match="for 2 and 1 sequences"):
        ops.attention(q, k, v, cu_seqlens_q=torch.tensor([0, 1, 4], dtype=torch.int32), cu_seqlens_k=cu)
    with pytest.raises(ShapeError, match="at least 1; got 0"):
        ops.attention(q, k, v, cu_seqlens_q=cu, window=0)
    with pytest.raises(ShapeError, match=r"one sink per query head; got \(2,\)"):
        ops.attention(q, k, v, cu_seqlens_q=cu, sink_N=torch.zeros(2))


def test_a_named_backend_is_refused_with_its_reason_and_auto_finds_another(make_packed):
    data = make_packed([5], [5], (2, 1, 8, 8), torch.float32, seed=7)
    call = {"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32), "block_max": 4}
    with pytest.raises(
        BackendUnavailable, match=r"attention: backend 'torch' cannot run this call: .*tile maxima"
    ):
        ops.attention(data["q"], data["k"], data["v"], backend="torch", **call)
    with pytest.raises(
        BackendUnavailable, match=r"unknown attention backend 'flsh'.*known: .*auto.*reference"
    ):
        ops.attention(data["q"], data["k"], data["v"], backend="flsh", **call)
    out, maxima = ops.attention(data["q"], data["k"], data["v"], **call)
    assert maxima.shape == (2, 5, 2)
    assert out.shape == (5, 2, 8)
    assert OP.backends["reference"].priority == 0
