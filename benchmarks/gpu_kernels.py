"""Triton kernels on a GPU: int8 and block-sparse attention beside torch's own attention.

    PYTHONPATH=src python benchmarks/gpu_kernels.py --sections int8 sparse decode rows --out gpu-kernels.json

Needs torch with CUDA and Triton, and nothing else but this checkout. Results are checked first, and a section
whose kernels are wrong is not measured. Candidates take turns, with the L2 cache overwritten between calls;
int8 times include the quantisation of q, k and v. `--tiny` tries the script itself where there is no GPU,
under TRITON_INTERPRET=1; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _gpu_check as check
import torch
from _gpu_tune import tune
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sateen import ops

Calls = dict[str, Callable[[], Any]]
Row = dict[str, Any]


class Clock:
    """Milliseconds of calls that take turns: on CUDA by its events, elsewhere by the wall."""

    def __init__(self, device: str, rounds: int):
        self.device, self.rounds = device, rounds
        size = 256 * 2**20 if device == "cuda" else 1  # bytes, more than an L2 cache holds
        self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def once(self, call: Callable[[], Any]) -> float:
        self.flushed.zero_()
        if self.device != "cuda":
            began = time.perf_counter()
            call()
            return (time.perf_counter() - began) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))

    def compare(self, calls: Calls) -> dict[str, Any]:
        """Median, quartiles and minimum by name; the error's words for a call that this machine refuses."""
        found: dict[str, Any] = {}
        for name, call in calls.items():
            try:
                for _ in range(2):  # compiles, then warms up
                    call()
                found[name] = []
            except Exception as error:  # a peer that cannot run is reported, not hidden
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        for _ in range(self.rounds):
            for name, times in found.items():
                if isinstance(times, list):
                    times.append(self.once(calls[name]))
        return {name: _summary(x) if isinstance(x, list) else {"error": x} for name, x in found.items()}


def _summary(times: list[float]) -> Row:
    low, middle, high = statistics.quantiles(times, n=4)
    numbers = {"median_ms": middle, "p25_ms": low, "p75_ms": high, "min_ms": min(times)}
    return {name: round(x, 4) for name, x in numbers.items()}


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Callable[[], Tensor]:
    """Torch's attention of packed tensors [B * T, N, H], B of them as one batch; grouped heads allowed."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=is_causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call


def _randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def int8(clock: Clock, is_tiny: bool) -> Iterator[Row]:
    """Sizes of INT-FlashAttention (arXiv 2409.16997), whose own times leave quantisation out."""
    B, N = (1, 2) if is_tiny else (4, 32)
    for H in (64, 128):
        for causal in (False, True):
            for T in (32,) if is_tiny else (1024, 2048, 4096, 8192, 16384):
                halves = [_randn(clock.device, torch.float16, B, T, N, H) for _ in range(3)]
                packed = [x.flatten(0, 1) for x in halves]
                brains = [x.bfloat16() for x in halves]
                options = {"cu_seqlens_q": check.offsets([T] * B, clock.device), "causal": causal}

                def ours(packed: Any = packed, options: Any = options, **more: Any) -> Callable[[], Any]:
                    return lambda: ops.int8_attention(*packed, backend="triton", **options, **more)

                calls: Calls = {
                    "int8": ours(),
                    "int8, blocks of 128": ours(block_size=128),
                    "int8, s8 codes": ours(p_bits="s8"),
                    "half int8": ours(pv="float"),
                    "sdpa flash float16": _sdpa(SDPBackend.FLASH_ATTENTION, *halves, is_causal=causal),
                    "sdpa flash bfloat16": _sdpa(SDPBackend.FLASH_ATTENTION, *brains, is_causal=causal),
                    "sdpa cudnn bfloat16": _sdpa(SDPBackend.CUDNN_ATTENTION, *brains, is_causal=causal),
                }
                flop = 4 * B * N * T * T * H // (2 if causal else 1)
                size = {"tokens": T, "batch": B, "heads": N, "head_dim": H, "causal": causal, "flop": flop}
                yield size | {"times": clock.compare(calls)}


def _flex(q: Tensor, k: Tensor, v: Tensor, idx: Tensor, block_size: int) -> Callable[[], Any]:
    """FlexAttention under the same lists, right-aligned; its block mask is made beforehand, not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (T, N, _), (S, K, _) = q.shape, k.shape
    seen = torch.zeros(K, T, -(-S // block_size) + 1, dtype=torch.bool, device=q.device)
    seen.scatter_(2, torch.where(idx < 0, seen.shape[2] - 1, idx).long(), True)

    def visible(_: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return seen[head // (N // K), query, key // block_size] & (key <= query + S - T)

    mask = create_block_mask(visible, 1, N, T, S, device=q.device.type, _compile=q.is_cuda)
    run = torch.compile(flex_attention) if q.is_cuda else flex_attention
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    return lambda: run(*batch, block_mask=mask, enable_gqa=N != K)


def _late(make: Callable[..., Callable[[], Any]], *args: Any) -> Callable[[], Any]:
    """A call that is made when it is first called, so that what it refuses is its own error."""
    made: list[Callable[[], Any]] = []

    def call() -> Any:
        if not made:
            made.append(make(*args))
        return made[0]()

    return call


def sparse(clock: Clock, is_tiny: bool) -> Iterator[Row]:
    """Prefill of one sequence: HySparse's 16 blocks of 64 keys, and single tokens as in HySparse2."""
    for N, K, H, size, n in ((32, 8, 128, 64, 16), (64, 4, 128, 64, 16), (64, 1, 256, 1, 1024)):
        if is_tiny:
            N, K, H, n = N // 8, max(K // 8, 1), 16, min(n, 8)
        for T in (8,) if is_tiny else (8192, 16384, 32768, 65536, 131072):
            for share in (1, 128):
                if size == 1 and (share > 1 or T > 32768):
                    continue
                q, k, v = (_randn(clock.device, torch.bfloat16, T, heads, H) for heads in (N, K, K))
                idx = check.random_lists(K, T, T, size, n, clock.device, share)
                options = {"block_size": size, "cu_seqlens_q": check.offsets([T], clock.device)}
                inputs = [x.detach().requires_grad_() for x in (q, k, v)]
                d_out = torch.ones_like(q)

                def forward(
                    q: Any = q, k: Any = k, v: Any = v, idx: Any = idx, options: Any = options
                ) -> Any:
                    return ops.block_sparse_attention(q, k, v, idx, backend="triton", **options)

                def both(forward: Any = forward, inputs: Any = inputs, d_out: Any = d_out) -> Any:
                    return torch.autograd.grad(forward(*inputs), inputs, d_out)

                dense = _sdpa(SDPBackend.FLASH_ATTENTION, q[None], k[None], v[None], True)
                calls: Calls = {"sparse": forward, "sparse, forward and backward": both}
                calls["sdpa flash, all keys"] = dense
                if T <= 16384 and size > 1:
                    calls["flex_attention, the same lists"] = _late(_flex, q, k, v, idx, size)
                row = {"queries": T, "keys": T, "heads": N, "kv_heads": K, "head_dim": H, "block_size": size}
                yield row | {"blocks": n, "queries_that_agree": share, "times": clock.compare(calls)}


def decode(clock: Clock, is_tiny: bool) -> Iterator[Row]:
    """One query each of 1 or 8 sequences, 16 blocks of 64 keys of 8k to 128k."""
    N, K, H, size, n = (4, 1, 16, 8, 4) if is_tiny else (32, 8, 128, 64, 16)
    for S in (100,) if is_tiny else (8192, 32768, 131072):
        for B in (1, 8):
            q = _randn(clock.device, torch.bfloat16, B, N, H)
            k, v = (_randn(clock.device, torch.bfloat16, B, S, K, H) for _ in range(2))
            idx = torch.cat([check.random_lists(K, 1, S, size, n, clock.device) for _ in range(B)], 1)
            options = {
                "block_size": size,
                "cu_seqlens_q": check.offsets([1] * B, clock.device),
                "cu_seqlens_k": check.offsets([S] * B, clock.device),
            }
            packed = q, k.flatten(0, 1), v.flatten(0, 1)

            def ours(packed: Any = packed, idx: Any = idx, options: Any = options) -> Any:
                return ops.block_sparse_attention(*packed, idx, backend="triton", **options)

            calls: Calls = {"sparse": ours}
            calls["sdpa flash, all keys"] = _sdpa(SDPBackend.FLASH_ATTENTION, q[:, None], k, v, False)
            if B == 1:
                calls["flex_attention, the same lists"] = _late(_flex, q, k[0], v[0], idx, size)
            row = {"sequences": B, "keys": S, "heads": N, "kv_heads": K, "head_dim": H, "block_size": size}
            yield row | {"blocks": n, "times": clock.compare(calls)}


def rows(clock: Clock, is_tiny: bool) -> Iterator[Row]:
    """Decoding over a cache of int8 rows, beside bfloat16 keys and values."""
    N, K, H = (4, 1, 16) if is_tiny else (32, 8, 128)
    for S in (100,) if is_tiny else (8192, 32768, 131072):
        for B in (1, 8):
            q = _randn(clock.device, torch.bfloat16, B, N, H)
            k, v = (_randn(clock.device, torch.bfloat16, B, S, K, H) for _ in range(2))
            (k8, k_scale), (v8, v_scale) = (ops.quantize_int8(x.flatten(0, 1)) for x in (k, v))
            mean = torch.zeros(B, K, H, device=clock.device)
            cache = ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean)
            cu = {
                "cu_seqlens_q": check.offsets([1] * B, clock.device),
                "cu_seqlens_k": check.offsets([S] * B, clock.device),
            }

            def ours(q: Any = q, cache: Any = cache, cu: Any = cu) -> Any:
                return ops.int8_rows_attention(q, cache, backend="triton", **cu)

            calls: Calls = {"int8 rows": ours}
            calls["sdpa flash bfloat16"] = _sdpa(SDPBackend.FLASH_ATTENTION, q[:, None], k, v, False)
            row = {"sequences": B, "keys": S, "heads": N, "kv_heads": K, "head_dim": H}
            yield row | {"times": clock.compare(calls)}


# section -> what is checked before it, what it measures
SECTIONS: dict[str, tuple[Callable[..., list[check.Check]], Callable[[Clock, bool], Iterator[Row]]]] = {
    "int8": (check.int8, int8),
    "rows": (check.int8, rows),
    "decode": (check.block_sparse, decode),
    "sparse": (check.block_sparse, sparse),
    "tune": (check.block_sparse, tune),
}


def _machine(device: str) -> Row:
    import triton

    revision = ""
    if shutil.which("git"):
        ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        revision = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    found: Row = {"torch": torch.__version__, "triton": triton.__version__, "revision": revision or None}
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        found |= {"gpu": facts.name, "capability": f"{facts.major}.{facts.minor}"}
        found |= {"multiprocessors": facts.multi_processor_count, "memory_bytes": facts.total_memory}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names, usual = list(SECTIONS), [name for name in SECTIONS if name != "tune"]
    parser.add_argument("--sections", nargs="+", choices=names, default=usual, help="default: all but tune")
    parser.add_argument(
        "--rounds", type=int, default=15, help="calls of each candidate (default: %(default)s)"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter; no measurement")
    parser.add_argument("--out", type=Path, help="the JSON goes here too, after each row")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        print("gpu_kernels needs a CUDA device and torch sees none: nothing was measured")
        return 0
    torch.manual_seed(0)
    clock = Clock(device, options.rounds)
    document: Row = {
        "command": " ".join(["python", "benchmarks/gpu_kernels.py", *sys.argv[1:]]),
        "is_measurement": not options.tiny,
        "machine": _machine(device),
        "rounds": options.rounds,
        "checks": [],
        "sections": {},
    }
    done: dict[Any, list[check.Check]] = {}
    for name in options.sections:
        test, measure = SECTIONS[name]
        if test not in done:
            done[test] = test(device, 16 if options.tiny else 300)
            document["checks"] += done[test]
        if not all(x["is_right"] for x in done[test]):
            document["sections"][name] = "not measured: its kernels gave wrong results"
            continue
        found = document["sections"][name] = []
        for row in measure(clock, options.tiny):
            found.append(row)
            print(name, json.dumps(row), file=sys.stderr, flush=True)
            if options.out:
                options.out.write_text(json.dumps(document, indent=1) + "\n")
    text = json.dumps(document, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    print(text, end="")
    return 0 if all(x["is_right"] for x in document["checks"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
