"""The attention oracle: float64, one query at a time, no torch, no code shared with any backend.

Also what tests of compiled kernels share: code in a process at another instruction set.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.ops import native as loader

LEVELS = ("generic", "avx2", "avx512", "avx512_bf16")


class Truth(NamedTuple):
    """Outputs and gradients in float64; `d_sink` is zero without sinks."""

    out: NDArray[np.float64]
    lse: NDArray[np.float64]
    block_max: NDArray[np.float64]
    d_q: NDArray[np.float64]
    d_k: NDArray[np.float64]
    d_v: NDArray[np.float64]
    d_sink: NDArray[np.float64]


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_q: list[int],
    cu_k: list[int],
    d_out: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
    block: int = 64,
) -> Truth:
    """Attention and its gradients, written out query by query."""
    qs, ks, vs = (x.detach().double().numpy() for x in (q, k, v))
    T, N, H = qs.shape
    group = N // ks.shape[1]
    scale = H**-0.5 if scale is None else scale
    grad = np.zeros((T, N, vs.shape[2])) if d_out is None else d_out.double().numpy()
    num_blocks = -(-max((b - a for a, b in pairwise(cu_k)), default=0) // block)
    out, lse = np.zeros((T, N, vs.shape[2])), np.full((N, T), -np.inf)
    block_max = np.full((N, T, num_blocks), -np.inf)
    d_q, d_k, d_v, d_sink = np.zeros_like(qs), np.zeros_like(ks), np.zeros_like(vs), np.zeros(N)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        for t in range(q0, q1):
            place = t - q0 + (k1 - k0) - (q1 - q0)  # the key position of this query
            first = 0 if window is None else max(0, place - window + 1)
            if place < 0:
                continue
            rows = slice(k0 + first, k0 + place + 1)
            for n in range(N):
                keys, values = ks[rows, n // group], vs[rows, n // group]
                scores = np.array([scale * float(key @ qs[t, n]) for key in keys])
                for j, score in enumerate(scores):
                    tile = (first + j) // block
                    block_max[n, t, tile] = max(block_max[n, t, tile], score)
                top = scores.max()
                lse[n, t] = top + np.log(np.exp(scores - top).sum())
                sink_logit = -np.inf if sink is None else float(sink.detach()[n])
                norm = np.logaddexp(lse[n, t], sink_logit)
                probs = np.exp(scores - norm)
                out[t, n] = probs @ values
                # d softmax: every logit, the sink included, moves against the probability-weighted mean.
                d_probs = values @ grad[t, n]
                mean = float(probs @ d_probs)
                d_scores = probs * (d_probs - mean)
                d_q[t, n] += scale * d_scores @ keys
                d_k[rows, n // group] += scale * np.outer(d_scores, qs[t, n])
                d_v[rows, n // group] += np.outer(probs, grad[t, n])
                d_sink[n] -= np.exp(sink_logit - norm) * mean
    return Truth(out, lse, block_max, d_q, d_k, d_v, d_sink)


@pytest.fixture
def attention_truth() -> Callable[..., Truth]:
    """`truth` of this file, for the tests of every attention backend."""
    return truth


def errors(got: Tensor, want: NDArray[np.float64]) -> tuple[float, float]:
    """Relative root-mean-square error and largest absolute error; infinities must match exactly."""
    values = got.detach().double().numpy()
    finite = np.isfinite(want)
    assert np.array_equal(np.isfinite(values), finite), "non-finite values differ"
    assert np.array_equal(values[~finite], want[~finite])
    gap = values[finite] - want[finite]
    size = np.sqrt((want[finite] ** 2).mean()) if finite.any() else 0.0
    rms = np.sqrt((gap**2).mean()) if finite.any() else 0.0
    return float(rms / size) if size else float(rms), float(np.abs(gap).max(initial=0.0))


@pytest.fixture
def measure() -> Callable[[Tensor, NDArray[np.float64]], tuple[float, float]]:
    """`errors` of this file."""
    return errors


def packed(
    lengths_q: list[int],
    lengths_k: list[int],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Tensor]:
    """Random q, k, v, an output gradient and sinks for heads (N, K, H, V)."""
    generator = torch.Generator().manual_seed(seed)
    N, K, H, V = shape
    T, S = sum(lengths_q), sum(lengths_k)
    sizes = {"q": (T, N, H), "k": (S, K, H), "v": (S, K, V), "d_out": (T, N, V), "sink": (N,)}
    return {
        name: torch.randn(*size, generator=generator).to(torch.float32 if name == "sink" else dtype)
        for name, size in sizes.items()
    }


@pytest.fixture
def make_packed() -> Callable[..., dict[str, Tensor]]:
    """`packed` of this file."""
    return packed


def in_process(level: str, code: str) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own whose kernels run at an instruction set."""
    environment = {**os.environ, "SATEEN_CPU_ISA": level, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def run_at_level() -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """`in_process` of this file."""
    return in_process


@pytest.fixture(params=LEVELS)
def other_level(request: pytest.FixtureRequest) -> str:
    """Each instruction set of this machine but the one that this run is at."""
    level: str = request.param
    if loader.native().current_isa() == level:
        pytest.skip("needs no process of its own: this run is at this level")
    try:
        loader.native().select_isa(level)
    except ValueError:
        pytest.skip(f"needs a processor with {level}")
    finally:
        loader.native().select_isa(os.environ.get("SATEEN_CPU_ISA", ""))
    return level


@pytest.fixture
def passes_at(other_level: str) -> Callable[[str, str], None]:
    """Runs the tests of a file that `-k` selects at `other_level`; all of them must run and pass."""

    def run(file: str, selected: str) -> None:
        tests = [file, "-q", "-p", "no:cacheprovider", "-k", selected]
        ran = in_process(other_level, f"import sys, pytest; sys.exit(pytest.main({tests!r}))")
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
        assert " passed" in ran.stdout
        assert "skipped" not in ran.stdout

    return run
