"""The Triton backend of `ops.block_sparse_attention`, on CUDA or under Triton's interpreter.

The truth is the reference in float64, which test_block_sparse_attention.py holds against loops. The
interpreter is chosen by a variable that Triton reads when it is imported, so without CUDA the first test
starts pytest on this file again in a process with that variable, and the others are skipped here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import accumulate

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable
from sateen.ops.block_sparse_attention import OP
from sateen.ops.block_sparse_attention.triton_backend import sparse_forward
from sateen.ops.spans import cut, stand
from sateen.ops.triton import INTERPRETED, PRIORITY

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_here = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="runs under the interpreter")

# dtype -> relative RMS error of the output, of the gradients. P is rounded to bfloat16 and float16 as well,
# and the interpreter cuts bfloat16 numbers off where a GPU rounds them, which doubles their errors.
TOLERANCES = {torch.float32: (1e-6, 2e-6), torch.float16: (1e-3, 2e-3), torch.bfloat16: (6e-3, 1e-2)}
# lengths of queries, of keys (None: the same), (N, K, H, V), block size, blocks per query, has a sink
GRID = {
    "one token": ([1], None, (2, 1, 8, 8), 64, 1, True),
    "part of a block": ([9], None, (2, 1, 40, 24), 64, 1, False),
    "odd blocks": ([6, 3, 0, 5], None, (4, 2, 80, 40), 3, 2, True),
    "single tokens": ([8, 4], None, (4, 1, 8, 4), 1, 4, True),
    "single tokens past a tile": ([2], [40], (1, 1, 8, 8), 1, 36, False),
    "group of eight": ([11], None, (8, 1, 16, 16), 4, 2, True),
    "group of three": ([10], None, (6, 2, 24, 64), 4, 2, False),
    "group past sixteen": ([6], None, (20, 1, 8, 8), 4, 2, True),
    "no groups, long lists": ([5], [50], (1, 1, 8, 8), 16, 3, True),
    "blocks longer than a tile": ([2], [130], (2, 2, 8, 8), 100, 2, True),
    "decode": ([1, 3, 1, 0], [9, 3, 100, 4], (4, 2, 8, 4), 16, 4, True),
    "chunked prefill": ([4, 2], [70, 40], (2, 1, 64, 64), 32, 2, False),
    "queries without keys": ([4, 3, 2], [2, 0, 5], (2, 1, 8, 8), 2, 1, True),
    "queries without keys or sinks": ([4, 3, 2], [2, 0, 5], (2, 1, 8, 8), 2, 1, False),
    "nothing": ([0, 0], None, (2, 1, 8, 8), 4, 1, True),
}
SHORT = ["group of eight", "decode"]


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
    assert int(passed[1]) > len(GRID) + len(SHORT)


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def random_lists(lengths_q, lengths_k, K, block_size, n, seed=0):
    """Distinct blocks per row in any order, padding among them, some of them ahead of the query."""
    rng = np.random.default_rng(seed)
    rows = np.full((K, sum(lengths_q), n), -1, dtype=np.int32)
    at = 0
    for length_q, length_k in zip(lengths_q, lengths_k, strict=True):
        for t in range(at, at + length_q):
            for head in range(K):
                order = rng.permutation(max(1, -(-length_k // block_size)))[: rng.integers(0, n + 1)]
                rows[head, t, rng.permutation(n)[: len(order)]] = order
        at += length_q
    return torch.from_numpy(rows).to(DEVICE)


def prepare(case, dtype, make_packed):
    """Leaves, the output's gradient, the lists and the settings of a case."""
    lengths_q, lengths_k, shape, block_size, n, has_sink = GRID[case]
    lengths_k = lengths_k or lengths_q
    data = {name: x.to(DEVICE) for name, x in make_packed(lengths_q, lengths_k, shape, dtype, seed=1).items()}
    d_out, sink = data.pop("d_out"), data.pop("sink")
    leaves = data | ({"sink": sink} if has_sink else {})
    settings = {
        "block_size": block_size,
        "cu_seqlens_q": offsets(lengths_q),
        "cu_seqlens_k": offsets(lengths_k),
    }
    return leaves, d_out, random_lists(lengths_q, lengths_k, shape[1], block_size, n), settings


def run(leaves, d_out, idx, settings, backend, dtype=None):
    """Output, log-sum-exp and gradients."""
    inputs = {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in leaves.items()}
    out, lse = ops.block_sparse_attention(
        inputs["q"], inputs["k"], inputs["v"], idx, sink_N=inputs.get("sink"), return_lse=True,
        backend=backend, **settings,
    )  # fmt: skip
    out.backward(d_out.to(out.dtype))
    return {"out": out, "lse": lse} | {f"d_{name}": x.grad for name, x in inputs.items()}


@runs_here
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for dtype in TOLERANCES for case in (GRID if dtype == torch.float32 else SHORT)],
    ids=str,
)
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_gradients_match_the_reference_in_float64(case, dtype, measure, make_packed):
    given = prepare(case, dtype, make_packed)
    got = run(*given, backend="triton")
    want = run(*given, backend="reference", dtype=torch.float64)
    assert got["out"].dtype == dtype
    assert not got["lse"].requires_grad
    for name, x in got.items():
        rms, _ = measure(x.cpu(), want[name].detach().double().cpu().numpy())
        allowed = 1e-6 if name == "lse" else TOLERANCES[dtype][name != "out"]
        assert rms <= allowed, f"{name}: relative RMS error {rms:.2e}"


@runs_here
@pytest.mark.parametrize("parts", [3, 5])
@pytest.mark.parametrize("case", ["decode", "blocks longer than a tile", "queries without keys"])
@pytest.mark.usefixtures("poisoned_memory")
def test_lists_in_parts_match(case, parts, measure, make_packed):
    from sateen.ops.block_sparse_attention.triton_forward import Tiles, forward

    leaves, _, idx, settings = prepare(case, torch.float32, make_packed)
    q, k, v = (leaves[name] for name in "qkv")
    where = stand(settings["cu_seqlens_q"], settings["cu_seqlens_k"], len(q))
    scale = q.shape[2] ** -0.5
    tiles = Tiles(keys=16, rows=16, parts=parts)
    got = forward(q, k, v, idx, leaves["sink"], where, settings["block_size"], scale, tiles)
    sink = leaves["sink"].double()
    want = ops.block_sparse_attention(
        q.double(), k.double(), v.double(), idx, sink_N=sink, return_lse=True, backend="reference", **settings
    )
    for x, y in zip(got, want, strict=True):
        assert measure(x.cpu(), y.double().cpu().numpy())[0] <= 1e-6


@runs_here
def test_views_and_wide_lists_are_read_as_they_lie(make_packed, measure):
    leaves, d_out, idx, settings = prepare("group of three", torch.float32, make_packed)
    want = run(leaves, d_out, idx, settings, "reference", torch.float64)["out"]
    _, N, H = leaves["q"].shape
    K, V = leaves["k"].shape[1], leaves["v"].shape[2]
    # As a projection leaves them: queries, keys and values side by side in one row.
    row = torch.cat([leaves[name].flatten(1) for name in "qkv"], 1)
    q, k, v = row.split([N * H, K * H, K * V], 1)
    views = q.unflatten(1, (N, H)), k.unflatten(1, (K, H)), v.unflatten(1, (K, V))
    spread = torch.stack([idx, idx], -1).long()[..., 0]
    got = ops.block_sparse_attention(*views, spread, backend="triton", **settings)
    assert measure(got.cpu(), want.detach().cpu().numpy())[0] <= 1e-6
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in views]
    got = ops.block_sparse_attention(*turned, idx, backend="triton", **settings)
    assert measure(got.cpu(), want.detach().cpu().numpy())[0] <= 1e-6


@runs_here
def test_lists_of_all_blocks_equal_dense_attention(make_packed, measure):
    data = {
        name: x.to(DEVICE) for name, x in make_packed([5, 9], [5, 9], (4, 2, 8, 6), torch.float32, 4).items()
    }
    every = torch.arange(3, device=DEVICE, dtype=torch.int32).expand(2, 14, 3)
    cu, sink = offsets([5, 9]), data["sink"]
    got = ops.block_sparse_attention(
        data["q"], data["k"], data["v"], every, block_size=4, cu_seqlens_q=cu, sink_N=sink, backend="triton"
    )
    q, k, v = (data[name].double() for name in "qkv")
    want = ops.attention(q, k, v, cu_seqlens_q=cu, sink_N=sink.double(), backend="reference")
    assert measure(got.cpu(), want.cpu().numpy())[0] <= 1e-6


@runs_here
def test_each_block_knows_the_queries_that_list_it():
    from sateen.ops.block_sparse_attention.triton_backward import invert

    lengths_q, lengths_k, K, size, n = [6, 0, 3], [9, 2, 3], 2, 2, 3
    idx = random_lists(lengths_q, lengths_k, K, size, n, seed=3)
    cu_q, cu_k = offsets(lengths_q), offsets(lengths_k)
    blocks = cut(cu_k, sum(lengths_k), size)
    listing = invert(idx, stand(cu_q, cu_k, 9), blocks, size)
    M = blocks.row_M.numel()
    first = blocks.first_B.tolist()
    for head in range(K):
        for m in range(M):
            b = max(i for i in range(3) if first[i] <= m) if m < first[-1] else None
            want = []
            for t in range(9) if b is not None else []:
                place = t + 3 if t < 6 else t - 6
                number = m - first[b]
                if (0 if t < 6 else 2) == b and number in idx[head, t].tolist() and number * size <= place:
                    want.append(t)
            start, stop = listing.start_KM[head * M + m : head * M + m + 2].tolist()
            assert listing.query_E[start:stop].tolist() == want


@runs_here
def test_the_custom_op_keeps_torchs_rules(make_packed):
    leaves, _, idx, settings = prepare("queries without keys", torch.float32, make_packed)
    q, k, v, sink = (leaves[name].requires_grad_() for name in ("q", "k", "v", "sink"))
    args = (q, k, v, sink, idx, settings["cu_seqlens_q"], settings["cu_seqlens_k"], 2, 0.5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(sparse_forward, args, test_utils=checks).values()) == {"SUCCESS"}


def test_auto_takes_the_kernels_on_cuda_only_and_refusals_say_why():
    q, k, v = (torch.zeros(4, heads, 8) for heads in (4, 2, 2))
    idx, cu = torch.zeros(2, 4, 1, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)

    def call(q=q, k=k, v=v, backend="triton"):
        return ops.block_sparse_attention(q, k, v, idx, block_size=2, cu_seqlens_q=cu, backend=backend)

    options = {"block_size": 2, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "scale": 1.0}
    assert OP.choose("auto", q, k, v, idx, **options).name != "triton"
    assert (PRIORITY < 0) == INTERPRETED
    if not INTERPRETED:
        with pytest.raises(BackendUnavailable, match="it runs on CUDA and the tensors are on cpu"):
            call()
    with pytest.raises(BackendUnavailable, match=r"one dtype of .*; got torch.float32, torch.float16"):
        call(k=k.half())
    with pytest.raises(BackendUnavailable, match="one dtype of"):
        call(q.double(), k.double(), v.double())
    with pytest.raises(BackendUnavailable, match="heads of at most 256 channels"):
        call(*(torch.zeros(4, heads, 300) for heads in (4, 2, 2)))
