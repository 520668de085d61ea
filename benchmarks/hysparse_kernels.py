"""Speed of HySparse's kernels on the CPU: prefill, decoding and training with listed blocks.

    sateen bench hysparse-kernels --pairs 9 --threads 1

The kernels' correctness tests run first (not with `--skip-tests`). Sides run in interleaved pairs of one
process; seconds are those of the processor, over all threads, because others may use the machine. Prefill:
16,384 tokens, 16 of up to 256 blocks of 64 keys per query, 8 query heads on 1 key/value head of 64 channels,
against torch's `scaled_dot_product_attention` over all keys with its heads repeated; once with lists given,
once with full attention that makes them. Lists are random, or clustered: 64 neighbours mostly share theirs.
Decode: a new token after 32,768, attention of an oracle and 7 sparse layers against 8 full layers. Training:
forward and backward of one packed sequence of 1,024, blocks of 16, 8 listed, and of an oracle and 7 readers.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _pairs import interleave, line, row
from _results import ROOT, is_dirty, publish, result_file, revision
from torch import Tensor
from torch.nn import functional as F

from sateen import ops
from sateen.ops.native import native
from sateen.receipt.machine import hardware, versions

TESTS = [ROOT / "tests" / "ops" / name for name in ("test_sparse_native.py", "test_attention_and_blocks.py")]
Side = Callable[[], object]
PREFILL_BAR, DECODE_BAR = 4.0, 4.0


def random_lists(T: int, K: int, block_size: int, n: int, *, clustered: bool) -> Tensor:
    """int32 [K, T, n]: n visible blocks per query; clustered: by scores that 64 neighbours mostly share."""
    generator, blocks = torch.Generator().manual_seed(0), -(-T // block_size)
    scores = torch.rand(K, T, blocks, generator=generator)
    if clustered:
        shared = torch.rand(K, -(-T // 64), blocks, generator=generator).repeat_interleave(64, 1)[:, :T]
        scores = shared + 0.15 * scores
    ahead = torch.arange(blocks) > (torch.arange(T) // block_size)[:, None]
    values, order = scores.masked_fill(ahead, -torch.inf).topk(n, -1)
    return order.masked_fill(values.isneginf(), -1).sort(-1).values.to(torch.int32)


def rows_of(T: int, N: int, K: int, H: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(T, heads, H, generator=generator).to(dtype) for heads in (N, K, K))
    return q, k, v


def prefill(dtype: torch.dtype, T: int) -> dict[str, Side]:
    """The peer is `full attention`."""
    N, K, H, block_size, n = 8, 1, 64, 64, 16
    q, k, v = rows_of(T, N, K, H, dtype)
    cu = torch.tensor([0, T], dtype=torch.int32)
    peer = [x[None].transpose(1, 2).repeat_interleave(N // x.shape[1], 1).contiguous() for x in (q, k, v)]
    lists = {
        kind: random_lists(T, K, block_size, n, clustered=kind == "clustered")
        for kind in ("random", "clustered")
    }

    def listed(kind: str) -> Side:
        return lambda: ops.block_sparse_attention(
            q, k, v, lists[kind], block_size=block_size, cu_seqlens_q=cu, backend="native"
        )

    return {
        "full attention": lambda: F.scaled_dot_product_attention(*peer, is_causal=True),
        "random lists": listed("random"),
        "clustered lists": listed("clustered"),
        "the layer that makes lists": lambda: ops.attention_and_blocks(
            q, k, v, block_size=block_size, num_blocks=n, cu_seqlens_q=cu, backend="native"
        ),
    }  # fmt: skip


def decode(dtype: torch.dtype, S: int, batch: int = 1) -> dict[str, Side]:
    """Attention of 8 layers for a token of a small model: 8 query heads, 2 key/value heads of 32 channels."""
    N, K, H, block_size, n, layers = 8, 2, 32, 64, 16, 8
    cu_q, cu_k = torch.arange(batch + 1, dtype=torch.int32), S * torch.arange(batch + 1, dtype=torch.int32)
    queries = rows_of(layers * batch, N, K, H, dtype)[0].split(batch)
    caches = [rows_of(S * batch, N, K, H, dtype)[1:] for _ in range(layers)]
    call = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}

    def full() -> None:
        for q, (k, v) in zip(queries, caches, strict=True):
            ops.attention(q, k, v, **call)

    def sparse() -> None:
        k, v = caches[0]
        _, lists = ops.attention_and_blocks(queries[0], k, v, block_size=block_size, num_blocks=n, **call)
        for q in queries[1:]:
            ops.block_sparse_attention(q, k, v, lists, block_size=block_size, **call)

    return {"full layers": full, "an oracle and 7 readers": sparse}


def training() -> dict[str, dict[str, Side]]:
    """Forward and backward of float32 attention at a small model's training shape."""
    T, N, K, H, block_size, n = 1024, 8, 2, 32, 16, 8
    leaves = [x.requires_grad_() for x in rows_of(T, N, K, H, torch.float32)]
    cu, d_out = torch.tensor([0, T], dtype=torch.int32), torch.randn(T, N, H)
    lists = random_lists(T, K, block_size, n, clustered=True)

    def both_ways(forward: Callable[[], Any]) -> Side:
        return lambda: torch.autograd.grad(forward(), leaves, d_out)

    def listed(backend: str) -> Any:
        return ops.block_sparse_attention(
            *leaves, lists, block_size=block_size, cu_seqlens_q=cu, backend=backend
        )

    def chosen(backend: str) -> Any:
        found = ops.attention_and_blocks(
            *leaves, block_size=block_size, num_blocks=n, cu_seqlens_q=cu, backend=backend
        )
        return found[0]

    return {
        "listed blocks": {
            "native": both_ways(lambda: listed("native")),
            "torch": both_ways(lambda: listed("torch")),
            "full attention": both_ways(lambda: ops.attention(*leaves, cu_seqlens_q=cu)),
        },
        "making lists": {
            "native": both_ways(lambda: chosen("native")),
            "torch": both_ways(lambda: chosen("torch")),
            "full attention": both_ways(lambda: ops.attention(*leaves, cu_seqlens_q=cu)),
        },
    }


def compare(
    what: str,
    sides: dict[str, Side],
    pairs: int,
    peer: str,
    bar: float | None,
    without_bar: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """Every side against `peer`: CPU milliseconds, and how many times faster it is."""

    def timed(run: Side) -> Callable[[int], float]:
        def once(_: int) -> float:
            began = time.process_time()
            run()
            return (time.process_time() - began) * 1e3

        return once

    found = interleave({name: timed(run) for name, run in sides.items()}, pairs)
    rows = []
    for name in sides:
        if name == peer:
            continue
        times = [b / a for a, b in zip(found[name], found[peer], strict=True)]
        limit = None if name in without_bar else bar
        rows.append(
            row(what, (name, found[name]), (peer, found[peer]), unit="CPU ms", bar=limit, ratio=times,
                least_ms=[round(min(found[name]), 3), round(min(found[peer]), 3)])
        )  # fmt: skip
        print(line(rows[-1]), file=sys.stderr)
    if "the layer that makes lists" in sides:
        together = [
            a + b for a, b in zip(found["clustered lists"], found["the layer that makes lists"], strict=True)
        ]
        times = [2 * b / a for a, b in zip(together, found[peer], strict=True)]
        rows.append(
            row(f"{what}, one layer that makes lists and one that reads them", ("ours", together),
                (f"{peer} twice", [2 * x for x in found[peer]]), unit="CPU ms", ratio=times)
        )  # fmt: skip
        print(line(rows[-1]), file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9, help="at least 3 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt (default: %(default)s)")
    parser.add_argument("--context", type=int, default=32768, help="of decoding (default: %(default)s)")
    parser.add_argument("--skip-tests", action="store_true", help="measure without the correctness tests")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/hysparse-kernels-CPU.json")
    options = parser.parse_args()
    if not options.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", *TESTS]
        if subprocess.run(command, capture_output=True, cwd=ROOT, check=False).returncode:
            print(
                "benchmarks/hysparse_kernels.py: the kernels' tests fail, so speed means nothing",
                file=sys.stderr,
            )
            return 1
    torch.set_num_threads(options.threads)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        with torch.no_grad():
            results += compare(
                f"prefill {options.tokens} {name}", prefill(dtype, options.tokens), options.pairs,
                "full attention", PREFILL_BAR, ("the layer that makes lists",),
            )  # fmt: skip
            results += compare(
                f"decode {options.context} {name}", decode(dtype, options.context), options.pairs,
                "full layers", DECODE_BAR,
            )  # fmt: skip
    for what, sides in training().items():
        for peer in ("torch", "full attention"):
            pair = {"native": sides["native"], peer: sides[peer]}
            results += compare(f"training step, {what}", pair, options.pairs, peer, None)
    document = {
        "what": "HySparse kernels on the CPU; ratio = the peer's CPU time / ours",
        "command": f"sateen bench hysparse-kernels --pairs {options.pairs} --threads {options.threads}",
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "isa": native().current_isa()},
        "versions": versions(),
        "revision": revision(),
        "is_dirty": is_dirty("native", "src/sateen/ops", "benchmarks/hysparse_kernels.py"),
        "pairs": options.pairs,
        "results": results,
    }
    publish(document, options.out or result_file("hysparse-kernels"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
