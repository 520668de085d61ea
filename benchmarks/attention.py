"""Speed of `ops.attention` against torch's `scaled_dot_product_attention`, forward and backward, on the CPU.

    python benchmarks/attention.py --pairs 11
    python benchmarks/attention.py --gpu

The second form times the Triton backend on CUDA instead: see `_attention_gpu.py`, which takes what follows.

The kernel's correctness tests run first; nothing is printed or written unless they pass. Both sides then run
in interleaved pairs in one process. The peer gets its own layout [1, N, T, H] with key/value heads already
repeated; with a window it is timed twice: with the banded mask, which is the same work, and as plain causal
attention, which is the faster call a user could fall back to.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _attention_gpu
import torch
from _results import ROOT, is_dirty, publish, quartiles, result_file, revision, tests_pass
from torch import Tensor
from torch.nn import functional as F

from sateen import ops
from sateen.ops.native import native
from sateen.receipt.machine import hardware, versions

TESTS = ROOT / "tests" / "ops" / "test_attention_native.py"
N, H = 8, 64
WARMUP = 2
# (T, K, window)
CASES = [(T, K, None) for T in (512, 1024, 2048, 4096) for K in (8, 2)] + [(4096, 8, 128), (4096, 2, 128)]

Side = Callable[[], object]


def sides(T: int, K: int, window: int | None, peer: str) -> dict[str, tuple[Side, Side]]:
    """Direction -> (ours, theirs) on the same numbers; both must agree on the output."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(T, heads, H, generator=generator) for heads in (N, K, K, N))
    cu = torch.tensor([0, T], dtype=torch.int32)
    mask = None
    if peer == "banded":
        mask = torch.ones(T, T, dtype=torch.bool).tril().triu(1 - (window or T))

    def batched(x: Tensor) -> Tensor:
        return x[None].transpose(1, 2).repeat_interleave(N // x.shape[1], dim=1).contiguous()

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ops.attention(q, k, v, cu_seqlens_q=cu, window=window, backend="native")
        assert isinstance(out, Tensor)
        return out

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

    plain, plain_peer = (q, k, v), (batched(q), batched(k), batched(v))
    leaves, leaves_peer = (tuple(x.clone().requires_grad_() for x in xs) for xs in (plain, plain_peer))
    out, out_peer = ours(*leaves), theirs(*leaves_peer)
    if mask is not None or window is None:
        assert torch.allclose(out, out_peer[0].transpose(0, 1), atol=1e-5), "the two sides disagree"
    d_peer = batched(d_out)
    return {
        "forward": (lambda: ours(*plain), lambda: theirs(*plain_peer)),
        "backward": (
            lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True),
            lambda: torch.autograd.grad(out_peer, leaves_peer, d_peer, retain_graph=True),
        ),
        "forward and backward": (
            lambda: torch.autograd.grad(ours(*leaves), leaves, d_out),
            lambda: torch.autograd.grad(theirs(*leaves_peer), leaves_peer, d_peer),
        ),
    }


def measure(both: tuple[Side, Side], pairs: int) -> dict[str, Any]:
    """Milliseconds of both sides and the quartiles of theirs / ours over interleaved pairs."""
    for side in both:
        for _ in range(WARMUP):
            side()
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        # The order alternates, so that neither side always runs on the other's warm cache.
        for i in (0, 1) if pair % 2 == 0 else (1, 0):
            began = time.perf_counter()
            both[i]()
            times[i].append((time.perf_counter() - began) * 1e3)
    result: dict[str, Any] = {}
    rows = {"ours_ms": times[0], "peer_ms": times[1], "ratio": [b / a for a, b in zip(*times, strict=True)]}
    for name, values in rows.items():
        found = quartiles(values)
        result |= {f"{name}_{key}": round(found[key], 3) for key in ("p25", "median", "p75")}
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9, help="at least 3 (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention-CPU.json")
    parser.add_argument(
        "--gpu", action="store_true", help="the Triton backend on CUDA, with the flags of _attention_gpu.py"
    )
    options, rest = parser.parse_known_args()
    if options.gpu:
        return _attention_gpu.main(rest if options.out is None else [*rest, "--out", str(options.out)])
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if not tests_pass("attention.py", TESTS):
        return 1
    results = []
    for T, K, window in CASES:
        for peer in ["causal"] if window is None else ["banded", "causal"]:
            for direction, both in sides(T, K, window, peer).items():
                shape = {"T": T, "N": N, "K": K, "H": H, "V": H, "window": window}
                row = {**shape, "direction": direction, "peer": peer, **measure(both, options.pairs)}
                print(json.dumps(row), file=sys.stderr)
                results.append(row)
    document = {
        "what": "attention on the CPU, float32; ratio = torch SDPA's time / ours",
        "command": f"python benchmarks/attention.py --pairs {options.pairs}",
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "isa": native().current_isa()},
        "versions": versions(),
        "revision": revision(),
        "is_dirty": is_dirty("native", "src/sateen/ops", "benchmarks/attention.py"),
        "dtype": "float32",
        "warmup": WARMUP,
        "pairs": options.pairs,
        "results": results,
    }
    publish(document, options.out or result_file("attention"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
