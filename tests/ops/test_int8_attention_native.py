"""The compiled int8 attention: integers against NumPy, results against float64 attention and the reference.

Every instruction set of this machine runs. Against the reference the relative L2 error is at most 2e-3:
codes of queries and values and all integer products are equal. Exponentials differ by 1e-7, which moves a
code of P by one where a number lies on a border between two: a few of ten thousand, by a 255th of the
largest weight. Means of keys are summed in another order, with the same effect on codes of keys.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate, pairwise, product

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable
from sateen.ops import native as loader
from sateen.ops.int8_attention import quantize_int8

pytestmark = pytest.mark.skipif(
    loader.native_available() is not None, reason="needs the compiled kernels: a C++ compiler at install time"
)
LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")
TO_REFERENCE = 2e-3
PAPER = {"smooth_k": False, "p_bits": "s8", "v_granularity": "head", "row_sum": "int8"}
FORMS = {"ours": {}, "half": {"pv": "float"}, "paper": PAPER}


def dense(q, k, v, cu_q, cu_k, *, causal=True, window=None, sink=None):
    """Float64 attention [T,N,V] and log-sum-exp [N,T] of packed sequences; right-aligned."""
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out, lse = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=torch.float64), []
    for (a, b), (c, d) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        keys, values = (x[c:d].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("tnh,snh->nts", q[a:b], keys) * q.shape[-1] ** -0.5
        place, key = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)
        seen = (key <= place) if causal else torch.ones(b - a, d - c, dtype=torch.bool)
        if window is not None:
            seen = seen & (key > place - window)
        scores = scores.masked_fill(~seen, -torch.inf)
        lse.append(scores.logsumexp(-1))
        total = lse[-1] if sink is None else torch.logaddexp(lse[-1], sink.double()[:, None])
        out[a:b] = torch.einsum("nts,snv->tnv", (scores - total[..., None]).exp().nan_to_num(0.0), values)
    return out, torch.cat(lse, 1)


def packed(lengths_q, lengths_k, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    N, K, H, V = shape
    sizes = (sum(lengths_q), N, H), (sum(lengths_k), K, H), (sum(lengths_k), K, V)
    return [torch.randn(size, generator=generator) for size in sizes]


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def gap(got, want):
    size = float(want.double().norm())
    return float((got.double() - want.double()).norm()) / (size or 1.0)


def check(lengths_q, lengths_k, shape, limit, seed=0, window=None, sink=None, causal=True, **options):
    """One call against float64 attention and, at the same block size, the reference."""
    q, k, v = packed(lengths_q, lengths_k, shape, seed)
    offset = {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
    how = {"causal": causal, "window": window, "sink_N": sink, "return_lse": True, **offset, **options}
    got, lse = ops.int8_attention(q, k, v, backend="native", block_size=64, **how)
    same, same_lse = ops.int8_attention(q, k, v, backend="reference", block_size=64, **how)
    want, want_lse = dense(
        q, k, v, *(x.tolist() for x in offset.values()), causal=causal, window=window, sink=sink
    )
    finite = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert gap(got, same) <= TO_REFERENCE
    assert gap(got, want) <= limit
    if finite.any():
        # With row_sum="int8" the sum is of codes, which may differ; otherwise both sum the same floats.
        assert float((lse - same_lse)[finite].abs().max()) <= (2e-2 if options.get("row_sum") else 1e-3)
    return got


@pytest.mark.parametrize(
    ("M", "L", "S"), [(1, 1, 1), (3, 40, 65), (5, 64, 64), (2, 255, 130), (4, 256, 17), (7, 6, 1000)]
)
def test_integer_products_equal_numpy(M, L, S):
    generator = np.random.default_rng(M * L + S)
    q, k = (generator.integers(-127, 128, size, dtype=np.int8) for size in ((M, L), (S, L)))
    q[0], k[0] = 127, -127  # the largest sums
    out = np.full((M, S), -1, dtype=np.int32)
    loader.native().int8_scores(q, k, out)
    assert np.array_equal(out, q.astype(np.int32) @ k.T.astype(np.int32))
    p, v = generator.integers(0, 256, (M, L), dtype=np.uint8), k.T.copy()
    p[0] = 255
    loader.native().int8_weighted(p, v, out)
    assert np.array_equal(out, p.astype(np.int32) @ v.astype(np.int32))


def test_long_sums_of_values_stay_exact():
    p, v = np.full((1, 1024), 255, dtype=np.uint8), np.full((1024, 20), 127, dtype=np.int8)
    p[0, 5], v[:, 1] = 254, -127
    out = np.zeros((1, 20), dtype=np.int32)
    loader.native().int8_weighted(p, v, out)
    assert np.array_equal(out, p.astype(np.int32) @ v.astype(np.int32))


# (N, K, H, V): groups of 1, 4 and 8 heads, head sizes of all kinds, V != H
SHAPES = (
    (2, 2, 40, 40), (4, 1, 64, 64), (8, 1, 80, 24), (2, 2, 128, 64), (4, 1, 192, 128), (2, 1, 256, 256),
    (3, 1, 16, 80),
)  # fmt: skip
LENGTHS = (1, 31, 64, 65, 200, 1000)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poisoned_memory")
def test_one_sequence(length, form):
    for i, shape in enumerate(SHAPES if length < 1000 else SHAPES[1:2]):
        limit = {"ours": 0.025, "half": 0.013, "paper": 0.05}[form]
        sink = torch.linspace(-1, 3, shape[0]) if i % 2 else None
        for window in (None, 50) if i % 3 else (None,):
            check([length], [length], shape, limit, window=window, sink=sink, **FORMS[form])
        check([length], [length], shape, 1.5 * limit, causal=False, sink=sink, **FORMS[form])


PACKED = {
    "empty sequences": ([5, 0, 70, 130], [5, 0, 70, 130]),
    "more keys than queries": ([1, 0, 3, 40, 7], [600, 3, 0, 90, 10]),
    "fewer keys than queries": ([40, 9], [7, 0]),
    "nothing": ([0, 0], [0, 3]),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for (form, options), window in product(FORMS.items(), (None, 16, 129)):
            limit = {"ours": 0.025, "half": 0.013, "paper": 0.05}[form]
            for causal in (True, False) if window is None else (True,):
                got = check(
                    *PACKED[name], (8, 2, 40, 24), 1.5 * limit, window=window, causal=causal, **options
                )
                assert torch.isfinite(got).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("block_size", [64, 128, 512, 1024])
def test_every_block_size_equals_the_reference_at_the_same_size(block_size):
    q, k, v = packed([700], [900], (2, 1, 64, 64))
    cu = {"cu_seqlens_q": offsets([700]), "cu_seqlens_k": offsets([900]), "block_size": block_size}
    for causal in (True, False):
        got, want = (
            ops.int8_attention(q, k, v, causal=causal, backend=name, **cu) for name in ("native", "reference")
        )
        assert gap(got, want) <= TO_REFERENCE


def test_earlier_blocks_count_in_the_causal_form():
    """The published Triton kernel forgets the running maximum, and so all keys, before the diagonal block."""
    q, k, v = packed([512], [512], (2, 2, 64, 64))
    cu = [0, 512]
    want, _ = dense(q, k, v, cu, cu)
    diagonal = torch.cat(
        [dense(*(x[a : a + 64] for x in (q, k, v)), [0, 64], [0, 64])[0] for a in range(0, 512, 64)]
    )
    for options in FORMS.values():
        got = ops.int8_attention(
            q, k, v, cu_seqlens_q=offsets([512]), backend="native", block_size=64, **options
        )
        assert gap(got, want) < 0.035
        assert gap(got, diagonal) > 0.5


def test_strided_and_half_precision_inputs_stay_as_they_were():
    q, k, v = packed([90], [90], (4, 2, 40, 24))
    cu = offsets([90])
    plain = ops.int8_attention(q, k, v, cu_seqlens_q=cu, backend="native")
    wide = [torch.cat([x * 3, x, x * 7], 1)[:, x.shape[1] : 2 * x.shape[1]] for x in (q, k, v)]
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v)]
    for views in (wide, turned):
        assert torch.equal(ops.int8_attention(*views, cu_seqlens_q=cu, backend="native"), plain)
    for dtype in (torch.bfloat16, torch.float16):
        inputs = [x.to(dtype) for x in (q, k, v)]
        before = [x.clone() for x in inputs]
        out = ops.int8_attention(*inputs, cu_seqlens_q=cu, backend="native")
        assert out.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))
        assert gap(out, dense(*inputs, [0, 90], [0, 90])[0]) < 0.02


@pytest.mark.parametrize("pv", ["int8", "float"])
def test_zeros_negative_scales_and_nan(pv):
    q, k, v = packed([70, 70], [70, 70], (2, 1, 16, 16))
    q[3], k[5], v[0] = 0, 0, 0
    cu = offsets([70, 70])
    for scale in (-0.25, 0.0, 1e-30, 300.0, -300.0):
        got, want = (
            ops.int8_attention(q, k, v, cu_seqlens_q=cu, scale=scale, pv=pv, backend=name, block_size=64)
            for name in ("native", "reference")
        )
        assert gap(got, want) <= TO_REFERENCE
    clean = ops.int8_attention(q, k, v, cu_seqlens_q=cu, pv=pv, backend="native")
    k[80] = torch.nan
    spoilt = ops.int8_attention(q, k, v, cu_seqlens_q=cu, pv=pv, backend="native")
    assert torch.equal(spoilt[:70], clean[:70])
    assert spoilt[80:].isnan().all()
    zeros = [torch.zeros_like(x) for x in (q, k, v)]
    assert torch.equal(ops.int8_attention(*zeros, cu_seqlens_q=cu, pv=pv, backend="native"), zeros[0])


def cached(k, v, mean):
    (k8, k_scale), (v8, v_scale) = quantize_int8(k - mean), quantize_int8(v)
    return ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean[None])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("poisoned_memory")
def test_cached_rows(shape, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cases = [(1, 1), (1, 64), (1, 700), (2, 65), (8, 300), (90, 130), (4, 3)]
        for i, ((T, S), window) in enumerate(product(cases, (None, 33))):
            q, k, v = packed([T], [S], shape, seed=i)
            k = k + torch.linspace(-2, 2, shape[2])
            rows = cached(k, v, k.mean(0))
            sink = torch.linspace(-1, 2, shape[0]) if i % 3 == 0 else None
            how = {
                "cu_seqlens_q": offsets([T]),
                "cu_seqlens_k": offsets([S]),
                "window": window,
                "sink_N": sink,
            }
            got, lse = ops.int8_rows_attention(
                q, rows, backend="native", block_size=64, return_lse=True, **how
            )
            same, same_lse = ops.int8_rows_attention(
                q, rows, backend="reference", block_size=64, return_lse=True, **how
            )
            want, _ = dense(q, k, v, [0, T], [0, S], window=window, sink=sink)
            seen = same_lse.isfinite()
            assert torch.equal(lse.isfinite(), seen)
            assert float((lse - same_lse)[seen].abs().max()) < 1e-3
            assert gap(got, same) <= TO_REFERENCE
            assert gap(got, want) <= 0.035
            assert gap(ops.int8_rows_attention(q, rows, backend="native", **how), want) <= 0.035
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Several threads cut the keys of a long sequence, and where depends on what else there is to do.
@pytest.mark.usefixtures("poisoned_memory", "one_thread")
def test_packed_cached_rows_equal_rows_alone():
    lengths_q, lengths_k = [1, 0, 3, 1, 60], [500, 4, 9, 0, 60]
    q, k, v = packed(lengths_q, lengths_k, (4, 2, 64, 32))
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    parts = [cached(k[a:b], v[a:b], k[a:b].mean(0).nan_to_num(0.0)) for a, b in pairwise(cu_k.tolist())]
    rows = ops.Int8Rows(*(torch.cat(x) for x in zip(*parts, strict=True)))
    got = ops.int8_rows_attention(q, rows, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, backend="native")
    for b, (a, c) in enumerate(pairwise(cu_q.tolist())):
        one = {"cu_seqlens_q": offsets([c - a]), "cu_seqlens_k": offsets([lengths_k[b]])}
        assert torch.equal(got[a:c], ops.int8_rows_attention(q[a:c], parts[b], backend="native", **one))
    assert torch.equal(got[4], torch.zeros_like(got[4]))


def test_it_is_chosen_and_says_what_it_cannot_do(caplog):
    q, k, v = packed([9], [9], (2, 1, 16, 16))
    cu = offsets([9])
    native = ops.int8_attention(q, k, v, cu_seqlens_q=cu, backend="native")
    assert torch.equal(ops.int8_attention(q, k, v, cu_seqlens_q=cu), native)
    with pytest.raises(BackendUnavailable, match="multiple of 64, at most 1024; got 100"):
        ops.int8_attention(q, k, v, cu_seqlens_q=cu, block_size=100, backend="native")
    with pytest.raises(BackendUnavailable, match="float64"):
        ops.int8_attention(q.double(), k.double(), v.double(), cu_seqlens_q=cu, backend="native")


def test_the_extension_refuses_what_would_read_outside_its_arrays():
    q, k, v = (x.numpy() for x in packed([4], [4], (2, 1, 8, 8)))
    out, lse = torch.empty(4, 2, 8).numpy(), torch.empty(2, 4).numpy()
    for cu_q, cu_k in (([0, 5], [0, 4]), ([0, 4], [0, 3]), ([0, 6, 4], [0, 2, 4]), ([0, 4], [0, 2, 4])):
        cu = (torch.tensor(x, dtype=torch.int32).numpy() for x in (cu_q, cu_k))
        with pytest.raises(ValueError, match=r"offsets|number of sequences"):
            loader.native().int8_attention(
                q, k, v, *cu, None, 1.0, True, 0, True, False, 255, True, False, 64, 1, out, lse
            )


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_passes_the_grid(level):
    if loader.native().current_isa() == level:
        pytest.skip("needs no process of its own: this run is at this level")
    try:
        loader.native().select_isa(level)
    except ValueError:
        pytest.skip(f"needs a processor with {level}")
    finally:
        loader.native().select_isa(os.environ.get("SATEEN_CPU_ISA", ""))
    environment = {**os.environ, "SATEEN_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    which = "products or sums or (one_sequence and 65) or (packed and 3) or (cached_rows and shape1) or zeros"
    tests = f"[{__file__!r}, '-q', '-p', 'no:cacheprovider', '-k', {which!r}]"
    code = f"import sys, pytest; sys.exit(pytest.main({tests}))"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert " passed" in ran.stdout
    assert "skipped" not in ran.stdout
