"""Errors of INT8 attention beside FP8 simulations, bfloat16 and float32, against float64 attention.

    sateen bench int8-attention --tokens 1024 --seeds 3

Inputs are random queries, keys and values [1, 4, N, 64] without a mask, as in the INT-FlashAttention paper
(arXiv 2409.16997), and two that are closer to language models. The FP8 rows are simulations in torch: what
is cast rounds as FP8 does, sums are float32. The milliseconds are those of a plain reference on the CPU that
computes the integer products in float32; they say nothing about the speed of an int8 kernel.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _results import is_dirty, publish, result_file, revision
from torch import Tensor
from torch.nn import functional as F

from sateen import ops
from sateen.receipt.machine import hardware, versions

HEADS, CHANNELS = 4, 64
WARMUP, REPEATS = 1, 5

QKV = tuple[Tensor, Tensor, Tensor]


def normal(N: int, generator: torch.Generator) -> QKV:
    q, k, v = (torch.randn(1, HEADS, N, CHANNELS, generator=generator) for _ in range(3))
    return q, k, v


def uniform(N: int, generator: torch.Generator) -> QKV:
    q, k, v = (torch.rand(1, HEADS, N, CHANNELS, generator=generator) - 0.5 for _ in range(3))
    return q, k, v


def offset_keys(N: int, generator: torch.Generator) -> QKV:
    q, k, v = normal(N, generator)
    k = k + 5 * torch.randn(1, HEADS, 1, CHANNELS, generator=generator)
    return q, k, v * torch.where(torch.arange(CHANNELS) % 16 == 0, 20.0, 1.0)


def token_outliers(N: int, generator: torch.Generator) -> QKV:
    return tuple(
        x * torch.where(torch.arange(N) % 128 == 5, 10.0, 1.0)[:, None] for x in normal(N, generator)
    )  # type: ignore[return-value]


INPUTS: dict[str, tuple[str, Callable[[int, torch.Generator], QKV]]] = {
    "normal": ("N(0, 1)", normal),
    "uniform": ("U(-0.5, 0.5)", uniform),
    "offset": ("N(0, 1); keys plus 5 N(0, 1) per channel, every 16th value channel times 20", offset_keys),
    "outliers": ("N(0, 1); every 128th token times 10 in q, k and v", token_outliers),
}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def fp8_e5m2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The published FP8 baseline: unscaled casts of q, k, v and P; the row sum is of the uncast P."""
    q, k, v = (cast(x, torch.float8_e5m2) for x in (q, k, v))
    scores = q @ k.mT * CHANNELS**-0.5
    P = (scores - scores.amax(-1, keepdim=True)).exp()
    return cast(P, torch.float8_e5m2) @ v / P.sum(-1, keepdim=True)


def fp8_e4m3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A scale per head for q, k and v; P, at most 1, is cast times 256, away from the subnormal numbers."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = [x.abs().amax((-1, -2), keepdim=True) / largest for x in (q, k, v)]
    q, k, v = (cast(x / s, torch.float8_e4m3fn) * s for x, s in zip((q, k, v), scales, strict=True))
    scores = q @ k.mT * CHANNELS**-0.5
    P = (scores - scores.amax(-1, keepdim=True)).exp()
    return cast(P * 256, torch.float8_e4m3fn) / 256 @ v / P.sum(-1, keepdim=True)


def int8_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The form of the engine's cache: values with a scale per token."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    mean = k.mean(0)
    (k8, k_scale), (v8, v_scale) = ops.quantize_int8(k - mean), ops.quantize_int8(v)
    rows = ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean[None])
    # This form is causal; a lone query at the end sees all keys. Every 16th query is enough for an average.
    steps = [
        ops.int8_rows_attention(
            q[t : t + 1], rows, cu_seqlens_q=torch.tensor([0, 1]), cu_seqlens_k=torch.tensor([0, len(k)])
        )
        for t in range(0, len(q), 16)
    ]
    return torch.cat(steps).transpose(0, 1)[None]  # type: ignore[arg-type]


def int8(**options: object) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: ops.int8_sdpa(q, k, v, **options)  # type: ignore[arg-type, return-value]


def sdpa(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype)).float()


PAPER = {"smooth_k": False, "p_bits": "s8", "v_granularity": "head", "row_sum": "int8"}
VARIANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "float32": sdpa(torch.float32),
    "bfloat16": sdpa(torch.bfloat16),
    "FP8 e5m2, unscaled cast (simulated)": fp8_e5m2,
    "FP8 e4m3, a scale per head (simulated)": fp8_e4m3,
    "half INT8, paper": int8(smooth_k=False, pv="float"),
    "half INT8, ours": int8(pv="float"),
    "full INT8, paper": int8(**PAPER),
    "full INT8, paper with K smoothing": int8(**PAPER | {"smooth_k": True}),
    "full INT8, ours without K smoothing": int8(smooth_k=False),
    "full INT8, ours": int8(),
    "full INT8, cached rows": int8_rows,
}


def errors(got: Tensor, want: Tensor) -> dict[str, float]:
    """Percent, and the cosine; `got` may hold every n-th query only."""
    if got.shape != want.shape:
        want = want[:, :, :: want.shape[2] // got.shape[2]]
    got, gap = got.double(), (got.double() - want).abs()
    return {
        "mre_percent": 100 * float((gap / (want.abs() + 1e-5)).mean()),
        "relative_l1_percent": 100 * float(gap.sum() / want.abs().sum()),
        "relative_l2_percent": 100 * float(gap.norm() / want.norm()),
        "cosine": float(F.cosine_similarity(got.flatten(), want.flatten(), dim=0)),
    }


def truth(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT / math.sqrt(CHANNELS)).softmax(-1) @ v


def milliseconds(run: Callable[[], object]) -> float:
    """The median of `REPEATS` runs."""
    times = []
    for i in range(WARMUP + REPEATS):
        began = time.perf_counter()
        run()
        if i >= WARMUP:
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], metavar="N", help="default: 1024")
    parser.add_argument(
        "--seeds", type=int, default=3, help="inputs per row, averaged (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/int8-attention-CPU.json")
    options = parser.parse_args()
    results = []
    for N in options.tokens:
        for name, (_, make) in INPUTS.items():
            data = [make(N, torch.Generator().manual_seed(seed)) for seed in range(options.seeds)]
            wanted = [truth(*qkv) for qkv in data]
            for variant, function in VARIANTS.items():
                found = [errors(function(*qkv), want) for qkv, want in zip(data, wanted, strict=True)]
                mean = {key: float(f"{statistics.fmean(one[key] for one in found):.5g}") for key in found[0]}
                results.append({"tokens": N, "input": name, "variant": variant, **mean})
                print(f"{N:6d}  {name:9s} {variant:40s} {mean}", file=sys.stderr)
    qkv = normal(options.tokens[0], torch.Generator().manual_seed(0))
    speed = {
        "what": "milliseconds of one call on the CPU; the int8 rows are plain references, not int8 kernels",
        "tokens": options.tokens[0],
        **{
            name: round(milliseconds(lambda run=VARIANTS[name]: run(*qkv)), 2)
            for name in ("float32", "bfloat16", "half INT8, ours", "full INT8, ours")
        },
    }
    arguments = f"--tokens {' '.join(map(str, options.tokens))} --seeds {options.seeds}"
    document = {
        "what": "errors against float64 attention, no mask, mean over seeds; MRE = mean |o - o_ref| / "
        "(|o_ref| + 1e-5) over the whole output",
        "command": f"sateen bench int8-attention {arguments}",
        "hardware": {**hardware(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "revision": revision(),
        "is_dirty": is_dirty("src/sateen/ops", "benchmarks/int8_attention.py"),
        "heads": HEADS,
        "head_dim": CHANNELS,
        "inputs": {name: words for name, (words, _) in INPUTS.items()},
        "results": results,
        "speed": speed,
    }
    publish(document, options.out or result_file("int8-attention"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
