"""The Triton backends of `ops.int8_attention` and `ops.int8_rows_attention`, on CUDA or interpreted.

Integers are held against the reference's, results against float64 attention. The interpreter is chosen by a
variable that Triton reads when it is imported, so without CUDA the first test starts pytest on this file
again in a process with that variable, and the others are skipped here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import accumulate, pairwise

import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable
from sateen.ops.int8_attention import OP, ROWS_OP, Int8Rows, quantize_int8
from sateen.ops.spans import cut
from sateen.ops.triton import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs under the interpreter")
PAPER = {"smooth_k": False, "p_bits": "s8", "v_granularity": "head", "row_sum": "int8"}


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="starts the other tests where they cannot run")
def test_the_kernels_under_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) > len(CASES) + len(FORMS) + len(GATES)


def random(B, N, K, T, S, H, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (B, N, T, H), (B, K, S, H), (B, K, S, V)
    return [torch.randn(*size, generator=generator).to(DEVICE) for size in sizes]


def dense(q, k, v, *, causal, window=None, sink=None):
    """Float64 attention of [B,N,T,H] tensors and its log-sum-exp; right-aligned."""
    q, k, v = (x.double() for x in (q, k, v))
    T, S, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    place, key = torch.arange(T, device=DEVICE)[:, None] + S - T, torch.arange(S, device=DEVICE)
    hidden = key > place if causal else key < 0
    if window is not None:
        hidden = hidden | (key <= place - window)
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double()[:, None])
    return (scores - total.unsqueeze(-1)).exp().nan_to_num(0.0) @ v, lse


def gap(got, want):
    return float((got.double() - want).norm() / want.norm())


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def assert_same_up_to_half_way_codes(got, want):
    """Powers of two differ in the last bit between libraries, which moves codes of P that lie half-way."""
    off = (got - want).abs().amax(-1) > 3e-6 * float(want.abs().max())
    assert float(off.double().mean()) <= 0.02
    assert gap(got, want.double()) <= 3e-4


@runs_here
@pytest.mark.parametrize("granularity", ["channel", "head"])
@pytest.mark.parametrize("smooth_k", [True, False])
@pytest.mark.usefixtures("poisoned_memory")
def test_codes_scales_and_sums_are_those_of_the_definition(smooth_k, granularity):
    from sateen.ops.int8_attention.triton_quantize import quantize_keys_and_values

    lengths, size, K, H, V = [37, 0, 1, 20], 20, 2, 40, 24
    S, cu = sum(lengths), offsets(lengths)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(S, K, width, generator=generator).to(DEVICE) for width in (H, V))
    k[3], v[40, 1], k[5] = 0.0, 0.0, 1e-41
    k[7] = torch.arange(H) - 19.5
    k[7, :, 0] = 127.0  # the scale is 1 and all others are half-way between two codes
    blocks = cut(cu, S, size)
    codes = quantize_keys_and_values(
        k, v, cu, blocks, smooth_k=smooth_k, has_codes=True, per_channel=granularity == "channel", tile=32
    )
    for b, (first, stop) in enumerate(pairwise(cu.tolist())):
        if first == stop:
            continue
        keys = k[first:stop]
        if smooth_k:
            middle = codes.k_mean_BKH[b]
            assert float((middle - keys.double().mean(0)).abs().max()) <= 2e-6
            keys = keys - middle
        want, scale = quantize_int8(keys)
        assert torch.equal(codes.k8_KSH[:, first:stop, :H], want.transpose(0, 1))
        assert not codes.k8_KSH[:, first:stop, H:].any()
        assert torch.equal(codes.k_scale_KS[:, first:stop], scale.squeeze(-1).T)
        values, scale = quantize_int8(v[first:stop], 0 if granularity == "channel" else (0, 2))
        assert torch.equal(codes.v_scale_BKV[b], scale[0].expand(K, V))
        for m in range(-(-(stop - first) // size)):
            piece = values[m * size : (m + 1) * size]
            number = int(blocks.first_B[b]) + m
            found = codes.v8_KMVJ[:, number]
            assert torch.equal(found[:, :V, : len(piece)], piece.permute(1, 2, 0))
            assert not found[:, V:].any()
            assert not found[:, :, len(piece) :].any()
            assert torch.equal(codes.v_sum_KMV[:, number, :V], piece.sum(0, dtype=torch.int32))
    if not smooth_k:
        assert codes.k_mean_BKH is None


@runs_here
@pytest.mark.parametrize("p_bits", ["u8", "s8"])
@pytest.mark.parametrize("row_sum", ["float", "int8"])
def test_products_of_equal_probabilities_are_exact_means_of_codes(p_bits, row_sum):
    """Queries of zero give P = 1, so the output is the mean of the values' codes, without a rounding."""
    _, k, v = random(1, 4, 2, 70, 150, 16, 24)
    q = torch.zeros(1, 4, 70, 16, device=DEVICE)
    got = ops.int8_sdpa(q, k, v, causal=True, p_bits=p_bits, row_sum=row_sum, window=90, backend="triton")
    codes, scale = quantize_int8(v, 2)
    for t in range(70):
        seen = codes[0, :, max(0, t + 80 - 89) : t + 81].double()
        want = (seen.mean(1) * scale[0, :, 0].double()).repeat_interleave(2, 0)
        assert torch.allclose(got[0, :, t].double(), want, rtol=1e-6, atol=1e-7)


FORMS = {
    "ours": {},
    "paper": PAPER,
    "half": {"pv": "float"},
    "half, raw keys": {"pv": "float", "smooth_k": False},
    "values by head, codes summed": {"v_granularity": "head", "row_sum": "int8"},
    "odd blocks": {"block_size": 20},
    "wide blocks": {"block_size": 128},
    "not causal": {"causal": False},
    "not causal, odd blocks": {"causal": False, "block_size": 24, **PAPER},
    "window": {"window": 33},
    "window within a block": {"window": 5, "pv": "float"},
}


@runs_here
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("poisoned_memory")
def test_forms_match_the_reference(form):
    q, k, v = random(1, 4, 2, 40, 100, 40, 24, seed=3)
    sink = torch.linspace(-1, 2, 4, device=DEVICE)
    options = {"causal": True, "sink_N": sink, "return_lse": True} | FORMS[form]
    got, lse = ops.int8_sdpa(q, k, v, backend="triton", **options)
    want, want_lse = ops.int8_sdpa(q, k, v, backend="reference", **options)
    assert_same_up_to_half_way_codes(got, want)
    assert torch.allclose(lse, want_lse, atol=3e-4 if options.get("row_sum") == "int8" else 3e-6, rtol=1e-6)


CASES = [
    # T, S, N, K, H, V, window, has a sink
    (1, 1, 1, 1, 64, 64, None, True), (31, 31, 4, 4, 40, 40, None, False),
    (64, 64, 4, 1, 64, 64, 50, True),
    (65, 65, 8, 1, 80, 32, None, True), (1, 130, 4, 1, 192, 128, None, False),
    (7, 200, 8, 1, 64, 64, 50, True),
    (70, 130, 2, 2, 40, 24, 50, False), (130, 130, 1, 1, 256, 200, None, False),
]  # fmt: skip


@runs_here
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_causal_matches_float_attention(case):
    T, S, N, K, H, V, window, has_sink = case
    q, k, v = random(1, N, K, T, S, H, V, seed=T + S)
    sink = torch.linspace(-1, 3, N, device=DEVICE) if has_sink else None
    want, want_lse = dense(q, k, v, causal=True, window=window, sink=sink)
    options = {"causal": True, "window": window, "sink_N": sink, "backend": "triton"}
    got, lse = ops.int8_sdpa(q, k, v, return_lse=True, **options)
    assert gap(got, want) < 0.025
    assert float((lse - want_lse).abs().max()) < 0.06
    assert gap(ops.int8_sdpa(q, k, v, pv="float", **options), want) < 0.013


# input -> largest relative L2 error with int8 and with float values, as in test_int8_attention.py
GATES = {"normal": (0.025, 0.010), "uniform": (0.006, 0.001), "offset": (0.025, 0.010)}


def inputs(kind, tokens):
    q, k, v = random(1, 1, 1, tokens, tokens, 64, 64)
    if kind == "uniform":
        q, k, v = (torch.special.ndtr(x) - 0.5 for x in (q, k, v))
    if kind == "offset":
        generator = torch.Generator().manual_seed(1)
        k = k + 5 * torch.randn(1, 1, 1, 64, generator=generator).to(DEVICE)
        v = v * torch.where(torch.arange(64, device=DEVICE) % 16 == 0, 20.0, 1.0)
    return q, k, v


@runs_here
@pytest.mark.parametrize(
    ("kind", "tokens", "pv"),
    [(kind, 256, pv) for kind in GATES for pv in ("int8", "float")] + [("normal", 512, "int8")],
)
def test_errors_stay_within_the_gates(kind, tokens, pv):
    q, k, v = inputs(kind, tokens)
    want, _ = dense(q, k, v, causal=False)
    got = ops.int8_sdpa(q, k, v, pv=pv, backend="triton")
    assert 1e-5 < gap(got, want) <= GATES[kind][pv == "float"]
    assert torch.nn.functional.cosine_similarity(got.double().flatten(), want.flatten(), dim=0) >= 0.999


@runs_here
@pytest.mark.parametrize("options", [{}, PAPER], ids=["ours", "paper"])
def test_earlier_blocks_count_in_the_causal_form(options):
    """The published Triton kernel forgets the running maximum, and so all keys, before the diagonal block."""
    q, k, v = random(1, 2, 2, 128, 128, 64, 64)
    want, _ = dense(q, k, v, causal=True)
    diagonal = torch.cat(
        [dense(*(x[:, :, a : a + 32] for x in (q, k, v)), causal=True)[0] for a in range(0, 128, 32)], 2
    )
    got = ops.int8_sdpa(q, k, v, causal=True, block_size=32, backend="triton", **options)
    assert gap(got, want) < 0.035
    assert gap(got, diagonal) > 0.5


@runs_here
@pytest.mark.usefixtures("poisoned_memory")
def test_packed_sequences_do_not_see_each_other_and_empty_rows_are_zero():
    lengths_q, lengths_k = [4, 0, 3, 2], [2, 3, 0, 65]
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    q, k, v = (x[0].transpose(0, 1) for x in random(1, 4, 2, 9, 70, 16, 8))
    sink = torch.ones(4, device=DEVICE)
    out, lse = ops.int8_attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sink_N=sink, return_lse=True, backend="triton"
    )
    empty = [0, 1, 4, 5, 6]  # two queries before the first key of their sequence, three without keys
    assert not out[empty].any()
    assert (lse[:, empty] == -torch.inf).all()
    for b, (a, c) in enumerate(pairwise(cu_q.tolist())):
        if lengths_q[b] and lengths_k[b]:
            piece = slice(*cu_k[b : b + 2].tolist())
            alone = ops.int8_attention(
                q[a:c], k[piece], v[piece], sink_N=sink, backend="triton",
                cu_seqlens_q=offsets([c - a]), cu_seqlens_k=offsets([lengths_k[b]]),
            )  # fmt: skip
            assert torch.equal(out[a:c], alone)
    empty = ops.int8_attention(q[:0], k[:0], v[:0], cu_seqlens_q=offsets([]), backend="triton")
    assert empty.shape == (0, 4, 8)


@runs_here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pv", ["int8", "float"])
def test_sixteen_bit_inputs_stay_as_they_were(dtype, pv):
    q, k, v = (x.to(dtype) for x in random(1, 4, 2, 33, 40, 16, 8))
    before = [x.clone() for x in (q, k, v)]
    out = ops.int8_sdpa(q, k, v, causal=True, pv=pv, backend="triton")
    assert out.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))
    assert gap(out, dense(q, k, v, causal=True)[0]) < 0.02


@runs_here
@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize(
    "case",
    [
        # queries and keys of each sequence, N, K, H, V, window, keys of a block
        ([1, 1, 0, 1], [90, 7, 4, 200], 8, 1, 40, 24, None, 32),
        ([3, 2], [130, 1], 4, 2, 80, 64, 50, 20),
        ([6], [70], 6, 2, 32, 16, None, 16),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_memory")
def test_cached_rows_match_the_reference(case, parts):
    from sateen.ops.int8_attention.triton_rows import Tiles, rows_forward

    lengths_q, lengths_k, N, K, H, V, window, size = case
    T, S = sum(lengths_q), sum(lengths_k)
    q, k, v = (x[0].transpose(0, 1) for x in random(1, N, K, T, S, H, V, seed=4))
    mean = torch.linspace(-2, 3, len(lengths_q) * K * H, device=DEVICE).view(-1, K, H)
    (k8, k_scale), (v8, v_scale) = quantize_int8(k), quantize_int8(v * torch.linspace(0.1, 3, V).to(DEVICE))
    v8[5], v_scale[5] = 0, 0  # a row of zeros
    rows = Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean)
    cu_q, cu_k, sink = offsets(lengths_q), offsets(lengths_k), torch.linspace(-1, 2, N, device=DEVICE)
    want, want_lse = ops.int8_rows_attention(
        q, rows, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sink_N=sink, window=window, block_size=size,
        return_lse=True, backend="reference",
    )  # fmt: skip
    tiles = Tiles(rows=16, parts=parts)
    got, lse = rows_forward(
        q, rows, cu_q, cu_k, sink, scale=H**-0.5, window=window, block_size=size, tiles=tiles
    )
    assert_same_up_to_half_way_codes(got, want)
    assert torch.allclose(lse, want_lse, atol=1e-5, rtol=1e-6)
    if parts == 1:
        got = ops.int8_rows_attention(
            q, rows, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sink_N=sink, window=window, block_size=size,
            backend="triton",
        )  # fmt: skip
        assert_same_up_to_half_way_codes(got, want)


def test_auto_takes_the_kernels_on_cuda_only_and_refusals_say_why():
    q, k, v = (torch.zeros(6, heads, 8) for heads in (4, 2, 2))
    cu = torch.tensor([0, 6], dtype=torch.int32)
    options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
    assert OP.choose("auto", q, k, v, scale=1.0, **options).name != "triton"
    row = torch.zeros(6, 2)
    rows = Int8Rows(k.to(torch.int8), row, v.to(torch.int8), row, torch.zeros(1, 2, 8))
    assert ROWS_OP.choose("auto", q, rows, scale=1.0, **options).name != "triton"
    if not INTERPRETED:
        for call in (
            lambda: ops.int8_attention(q, k, v, backend="triton", **options),
            lambda: ops.int8_rows_attention(q, rows, backend="triton", **options),
        ):
            with pytest.raises(BackendUnavailable, match="it runs on CUDA and the tensors are on cpu"):
                call()
    with pytest.raises(BackendUnavailable, match="blocks of at most 128 keys"):
        ops.int8_attention(q, k, v, block_size=300, backend="triton", **options)
    wide = torch.zeros(6, 2, 130)
    with pytest.raises(BackendUnavailable, match="more than 128 channels need blocks of at most 64 keys"):
        ops.int8_attention(q, k, wide, pv="float", block_size=128, backend="triton", **options)
    with pytest.raises(BackendUnavailable, match=r"got torch\.float64"):
        ops.int8_rows_attention(q.double(), rows, backend="triton", **options)
    with pytest.raises(BackendUnavailable, match="unknown int8_rows_attention"):
        ops.int8_rows_attention(q, rows, backend="cutlass", **options)
