"""INT8 attention against float64 attention, its integers against a NumPy int32 loop.

Inputs and gates: 1,024 tokens, 64 channels, 4 heads, not causal; `offset` is N(0, 1) with a constant per
channel added to the keys and a few values channels that are 20 times larger.
"""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ShapeError
from sateen.ops.int8_attention import integer_matmul, quantize_int8
from sateen.ops.native import native_available


@pytest.fixture(params=["reference", "native"])
def int8(request):
    """The three operators by one backend; tests of block sizes that only the reference takes do without."""
    if request.param == "native" and native_available() is not None:
        pytest.skip("needs the compiled kernels: a C++ compiler at install time")
    by = {"backend": request.param}
    return SimpleNamespace(
        sdpa=partial(ops.int8_sdpa, **by),
        attention=partial(ops.int8_attention, **by),
        rows_attention=partial(ops.int8_rows_attention, **by),
    )


PAPER = {"smooth_k": False, "p_bits": "s8", "v_granularity": "head", "row_sum": "int8"}


def dense(q, k, v, *, causal, scale=None, window=None, sink=None):
    """Float64 attention of [B,N,T,H] tensors and its log-sum-exp; right-aligned."""
    q, k, v = (x.double() for x in (q, k, v))
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    place, key = torch.arange(T)[:, None] + S - T, torch.arange(S)
    seen = torch.ones(T, S, dtype=torch.bool) if not causal else key <= place
    if window is not None:
        seen = seen & (key > place - window)
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double()[:, None])
    out = (scores - total.unsqueeze(-1)).exp().nan_to_num(0.0) @ v
    return out, lse


def random(B, N, K, T, S, H, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (B, N, T, H), (B, K, S, H), (B, K, S, V)
    return [torch.randn(*size, generator=generator) for size in sizes]


def gap(got, want):
    return float((got.double() - want).norm() / want.norm())


def inputs(kind):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, 1024, 64, generator=generator) for _ in range(3))
    if kind == "uniform":
        q, k, v = (torch.rand(1, 4, 1024, 64, generator=generator) - 0.5 for _ in range(3))
    if kind == "offset":
        k = k + 5 * torch.randn(1, 4, 1, 64, generator=generator)
        v = v * torch.where(torch.arange(64) % 16 == 0, 20.0, 1.0)
    return q, k, v


# input -> largest relative L2 error with int8 and with float values
GATES = {"normal": (0.025, 0.010), "uniform": (0.006, 0.001), "offset": (0.025, 0.010)}


@pytest.mark.parametrize("pv", ["int8", "float"])
@pytest.mark.parametrize("kind", GATES)
def test_errors_stay_within_the_gates(kind, pv, int8):
    q, k, v = inputs(kind)
    want, _ = dense(q, k, v, causal=False)
    got = int8.sdpa(q, k, v, pv=pv)
    assert 1e-5 < gap(got, want) <= GATES[kind][pv == "float"]
    cosine = torch.nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)
    assert cosine >= 0.999


def test_the_papers_form_is_worse_than_ours_in_the_expected_places(int8):
    q, k, v = inputs("normal")
    want, _ = dense(q, k, v, causal=False)
    assert 0.02 < gap(int8.sdpa(q, k, v, **PAPER), want) < 0.04
    q, k, v = inputs("offset")
    want, _ = dense(q, k, v, causal=False)
    ours, paper = (gap(int8.sdpa(q, k, v, **options), want) for options in ({}, PAPER))
    assert paper > 3 * ours


def loop_int32(a, b):
    """Integer product by loops over int32 scalars; overflow is an error."""
    out = np.zeros((a.shape[0], b.shape[1]), dtype=np.int32)
    with np.errstate(over="raise"):
        for i, j, d in itertools.product(range(a.shape[0]), range(b.shape[1]), range(a.shape[1])):
            out[i, j] += np.int32(a[i, d]) * np.int32(b[d, j])
    return out


def test_integer_products_equal_a_numpy_int32_loop():
    generator = torch.Generator().manual_seed(0)
    q8 = torch.randint(-127, 128, (9, 192), generator=generator, dtype=torch.int8)
    k8 = torch.randint(-127, 128, (192, 11), generator=generator, dtype=torch.int8)
    got = integer_matmul(q8, k8, 192 * 127 * 127)
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy(), loop_int32(q8.numpy(), k8.numpy()))
    p8 = torch.randint(0, 256, (9, 64), generator=generator).float()
    got = integer_matmul(p8, k8[:64], 64 * 255 * 127)
    assert np.array_equal(got.numpy(), loop_int32(p8.int().numpy(), k8[:64].numpy()))


def test_integer_products_are_exact_at_their_largest_and_beyond_float32():
    for length, high in ((256, 127), (64, 255), (4096, 255)):
        a = torch.full((1, length), float(high))
        a[0, 0] = high - 1  # an odd one out: rounding to float32's grid would show
        b = torch.full((length, 1), 127, dtype=torch.int8)
        assert int(integer_matmul(a, b, length * high * 127)) == 127 * (length * high - 1)


@pytest.mark.parametrize("p_bits", ["u8", "s8"])
@pytest.mark.parametrize("row_sum", ["float", "int8"])
def test_the_algorithm_step_by_step(p_bits, row_sum):
    """Blocks of 4 keys, one query at a time, int32 products in NumPy: the steps of algorithm 1."""
    q, k, v = random(1, 1, 1, 5, 11, 8, 6)
    levels = {"u8": 255, "s8": 127}[p_bits]
    codes = [quantize_int8(x[0, 0]) for x in (q, k)]
    (q8, q_scale), (k8, k_scale) = ((c.numpy(), s.numpy()) for c, s in codes)
    v8, v_scale = (x.numpy() for x in quantize_int8(v[0, 0], (0, 1)))
    want = np.zeros((5, 6), dtype=np.float32)
    for i in range(5):
        top, total, out = -np.inf, 0.0, np.zeros(6)
        for first in range(0, 11, 4):
            visible = [j for j in range(first, min(first + 4, 11)) if j <= i + 6]
            if not visible:
                continue
            s32 = loop_int32(q8[i : i + 1], k8[visible].T)[0]
            scores = s32 * q_scale[i] * k_scale[visible, 0] * 8**-0.5 * np.log2(np.e)
            new = max(top, scores.max())
            p = np.exp2(scores - new)
            p8 = np.rint(levels * p).astype(np.int32)
            decay = np.exp2(top - new)
            total = decay * total + (p.sum() if row_sum == "float" else p8.sum() / levels)
            out = decay * out + loop_int32(p8[None], v8[visible])[0] * v_scale[0, 0] / levels
            top = new
        want[i] = out / total
    got = ops.int8_sdpa(
        q, k, v, causal=True, block_size=4, smooth_k=False, v_granularity="head",
        p_bits=p_bits, row_sum=row_sum,
    )  # fmt: skip
    assert np.allclose(got[0, 0].numpy(), want, rtol=1e-5, atol=1e-6)


CASES = [
    # T, S, N, K, H, V
    (1, 1, 1, 1, 64, 64), (31, 31, 4, 4, 40, 40), (64, 64, 4, 1, 64, 64), (65, 65, 8, 1, 80, 32),
    (200, 200, 2, 2, 128, 128), (1000, 1000, 2, 1, 64, 64), (1, 130, 4, 1, 192, 128), (7, 200, 8, 1, 64, 64),
    (70, 130, 4, 4, 40, 24),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("has_sink", [False, True])
def test_causal_matches_float_attention(case, window, has_sink, int8):
    T, S, N, K, H, V = case
    q, k, v = random(2, N, K, T, S, H, V, seed=T + S)
    sink = torch.linspace(-1, 3, N) if has_sink else None
    want, want_lse = dense(q, k, v, causal=True, window=window, sink=sink)
    got, lse = int8.sdpa(q, k, v, causal=True, window=window, sink_N=sink, return_lse=True)
    assert gap(got, want) < 0.025
    # Scores of N(0, 1) inputs are off by about 1 %, in a sum of exponentials by less.
    assert float((lse - want_lse).abs().max()) < 0.06
    half = int8.sdpa(q, k, v, causal=True, window=window, sink_N=sink, pv="float")
    assert gap(half, want) < 0.013


@pytest.mark.parametrize("options", [{}, PAPER], ids=["ours", "paper"])
def test_earlier_blocks_count_in_the_causal_form(options):
    """The published Triton kernel forgets the running maximum, and so all keys, before the diagonal block."""
    q, k, v = random(1, 2, 2, 256, 256, 64, 64)
    want, _ = dense(q, k, v, causal=True)
    diagonal = torch.cat(
        [dense(*(x[:, :, a : a + 32] for x in (q, k, v)), causal=True)[0] for a in range(0, 256, 32)], 2
    )
    got = ops.int8_sdpa(q, k, v, causal=True, block_size=32, **options)
    assert gap(got, want) < 0.035
    assert gap(got, diagonal) > 0.5


@pytest.mark.parametrize("block_size", [1, 16, 63, 500])
def test_the_block_size_moves_results_within_the_rounding(block_size):
    q, k, v = random(1, 2, 2, 100, 100, 32, 32)
    want, _ = dense(q, k, v, causal=True)
    assert gap(ops.int8_sdpa(q, k, v, causal=True, block_size=block_size), want) < 0.02


def test_a_constant_added_to_all_keys_changes_nothing_but_the_lse(int8):
    q, k, v = random(1, 2, 2, 90, 90, 64, 64)
    shift = torch.linspace(-20, 20, 64)
    plain, lse = int8.sdpa(q, k, v, causal=True, return_lse=True)
    moved, moved_lse = int8.sdpa(q, k + shift, v, causal=True, return_lse=True)
    assert gap(moved, plain.double()) < 1e-3
    assert torch.allclose(moved_lse, lse + 64**-0.5 * (q @ shift), atol=2e-3)
    without = int8.sdpa(q, k + shift, v, causal=True, smooth_k=False)
    assert gap(without, plain.double()) > 0.02


def test_sinks_weigh_against_the_true_scores_not_the_smoothed_ones(int8):
    q, k, v = random(1, 2, 2, 40, 40, 16, 16)
    k = k + 1.5
    sink = torch.tensor([0.5, 2.0])
    want, _ = dense(q, k, v, causal=True, sink=sink)
    assert gap(int8.sdpa(q, k, v, causal=True, sink_N=sink), want) < 0.02


@pytest.mark.parametrize("pv", ["int8", "float"])
def test_zeros_huge_logits_and_tiny_numbers_give_no_nan(pv, int8):
    q, k, v = random(1, 2, 2, 70, 70, 16, 16)
    q[:, :, 3], k[:, :, 5], v[:, 0] = 0, 0, 0
    got = int8.sdpa(q, k, v, causal=True, pv=pv)
    assert gap(got, dense(q, k, v, causal=True)[0]) < 0.02
    assert torch.equal(got[:, 0], torch.zeros_like(got[:, 0]))
    zeros = [torch.zeros_like(x) for x in (q, k, v)]
    assert torch.equal(int8.sdpa(*zeros, pv=pv), zeros[0])
    eye = torch.eye(16)[None, None]
    # Logits of +-1e4: each query takes the value of its own key, or of all others alike.
    one = int8.sdpa(100 * eye, 100 * eye, eye, scale=1.0, pv=pv)
    assert torch.allclose(one, eye, atol=1e-6)
    rest = int8.sdpa(100 * eye, -100 * eye, eye, scale=1.0, pv=pv)
    assert torch.allclose(rest, (1 - eye) / 15, atol=1e-3)
    tiny = int8.sdpa(q * 1e-40, k * 1e-40, v * 1e-40, pv=pv)
    assert torch.isfinite(tiny).all()


def test_packed_sequences_do_not_see_each_other_and_empty_rows_are_zero(int8):
    lengths_q, lengths_k = [4, 0, 3, 2], [2, 3, 0, 65]
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)
    )
    q, k, v = (x[0].transpose(0, 1) for x in random(1, 4, 2, 9, 70, 16, 8))
    for sink in (None, torch.ones(4)):
        out, lse = int8.attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sink_N=sink, return_lse=True)
        empty = [0, 1, 4, 5, 6]  # two queries before the first key of their sequence, three without keys
        assert torch.equal(out[empty], torch.zeros(5, 4, 8))
        assert torch.equal(lse[:, empty], torch.full((4, 5), -torch.inf))
        for b, (a, c) in enumerate(itertools.pairwise(cu_q.tolist())):
            if lengths_q[b] and lengths_k[b]:
                piece = slice(*cu_k[b : b + 2].tolist())
                alone = int8.attention(
                    q[a:c], k[piece], v[piece], sink_N=sink,
                    cu_seqlens_q=torch.tensor([0, c - a]), cu_seqlens_k=torch.tensor([0, lengths_k[b]]),
                )  # fmt: skip
                assert torch.equal(out[a:c], alone)
    nothing = int8.attention(q[:0], k[:0], v[:0], cu_seqlens_q=torch.zeros(1, dtype=torch.int32))
    assert nothing.shape == (0, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_as_they_were_and_outputs_have_their_dtype(dtype, int8):
    q, k, v = (x.to(dtype) for x in random(1, 4, 2, 33, 40, 16, 8))
    before = [x.clone() for x in (q, k, v)]
    out = int8.sdpa(q, k, v, causal=True)
    assert out.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    assert gap(out, dense(q, k, v, causal=True)[0]) < 0.02


def cached(k, v, mean):
    """[S,K,*] keys and values as a cache holds them."""
    (k8, k_scale), (v8, v_scale) = quantize_int8(k - mean), quantize_int8(v)
    return ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean[None])


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("T", [1, 90])
def test_cached_rows_match_float_attention(T, window, int8):
    q, k, v = random(1, 4, 2, T, 90, 32, 16)
    k = k + torch.linspace(-4, 4, 32)
    sink = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    rows = cached(k[0].transpose(0, 1), v[0].transpose(0, 1), k[0, :, :30].mean(1))
    cu_q, cu_k = torch.tensor([0, T]), torch.tensor([0, 90])
    out, lse = int8.rows_attention(
        q[0].transpose(0, 1), rows, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, window=window, sink_N=sink,
        return_lse=True,
    )  # fmt: skip
    want, want_lse = dense(q, k, v, causal=True, window=window, sink=sink)
    assert gap(out.transpose(0, 1)[None], want) < 0.025
    assert float((lse - want_lse[0]).abs().max()) < 0.06
    k_float, v_float = rows.floats(cu_k, torch.float32)
    assert float((k_float - k[0].transpose(0, 1)).abs().max()) <= float(rows.k_scale_SK.max()) / 2 + 1e-5
    assert float((v_float - v[0].transpose(0, 1)).abs().max()) <= float(rows.v_scale_SK.max()) / 2 + 1e-5


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"pv": "fp8"}, ShapeError, "unknown int8_attention pv 'fp8'"),
        ({"p_bits": "u4"}, ShapeError, "unknown int8_attention p_bits 'u4'"),
        ({"causal": False, "window": 4}, ShapeError, "window 4 needs causal=True"),
        ({"pv": "float", "row_sum": "int8"}, ShapeError, "needs pv='int8'"),
        ({"block_size": 0}, ShapeError, "block_size is 1 to 65536"),
        ({"window": 0}, ShapeError, "at least 1; got 0"),
        ({"sink_N": torch.zeros(3)}, ShapeError, "one sink per query head"),
        ({"cu_seqlens_q": torch.tensor([0, 5])}, ShapeError, "offsets end at"),
        ({"backend": "vnni"}, BackendUnavailable, "unknown int8_attention backend 'vnni'"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message):
    q, k, v = (x[0].transpose(0, 1) for x in random(1, 4, 2, 6, 6, 8, 8))
    with pytest.raises(error, match=message):
        ops.int8_attention(q, k, v, **({"cu_seqlens_q": torch.tensor([0, 6])} | change))
    with pytest.raises(ShapeError, match="int8_sdpa takes"):
        ops.int8_sdpa(q, k, v)
