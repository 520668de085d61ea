"""Speed of the Triton backend of `ops.attention` on CUDA, against torch's SDPA (flash) and FlexAttention.

    sateen bench attention --gpu
    PYTHONPATH=src python benchmarks/_attention_gpu.py --tokens 8192 32768 --sweep

The second form runs with torch, triton and numpy alone. First the kernels are held against the reference in
float64 on the device; nothing is timed unless they agree. Then the sides take turns. SDPA has no window, so
there it computes plain causal attention, which is more work; FlexAttention computes the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.ops.attention import attention, attention_reference
from sateen.ops.attention.triton_tiles import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
TOKENS = (8192, 16384, 32768, 65536, 131072)
WINDOWS = (None, 128)
PEERS = ("sdpa", "flex")  # compiling flex takes most of the time
# Query heads, key/value heads, channels of keys and of values: a dense layer, and one of MiMo-V2-Flash's.
SHAPES = ((32, 8, 128, 128), (64, 4, 192, 128))
CASES = tuple(product(SHAPES, WINDOWS))
TIMED_MS = 60  # of a side in each turn, or three calls
TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}  # relative RMS error
# lengths of queries, of keys, (N, K, H, V), window, has a sink, parts
CHECKS = (
    ([1000, 1, 0, 131], [1000, 1, 0, 131], (8, 2, 128, 128), None, True, 1),
    ([700, 257], [900, 300], (8, 1, 192, 128), 128, True, 1),
    ([333], [333], (4, 4, 80, 64), 77, False, 1),
    ([65, 513], [65, 513], (6, 2, 64, 64), None, False, 1),
    ([5, 3], [2, 3], (4, 2, 40, 40), None, True, 1),
    ([1, 3, 1, 0], [900, 3, 5000, 7], (32, 4, 128, 128), None, True, 9),
    ([1, 1], [3000, 200], (64, 4, 192, 128), 128, True, 3),
)
# Each candidate is a compilation of some seconds.
SWEEP = {
    "forward": list(product((64, 128), (32, 64, 128), (4, 8), (2, 3))),
    "query_gradient": list(product((64, 128), (32, 64, 128), (4, 8), (2,))),
    "key_gradient": list(product((32, 64, 128), (64, 128), (4, 8), (2,))),
}

Call = Callable[[], Any]


@contextmanager
def tiles(text: str) -> Iterator[None]:
    """Sets the kernels' tile sizes; an empty text leaves what the environment says."""
    before = os.environ.get(VARIABLE)
    if text:
        os.environ[VARIABLE] = text
    yield
    os.environ.pop(VARIABLE, None)
    if before is not None:
        os.environ[VARIABLE] = before


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def random(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, device="cuda").to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    finite = want.isfinite()
    if not got.isfinite().equal(finite):
        return float("inf")
    gap = (got.double() - want.double())[finite].square().mean().sqrt()
    return float(gap / want.double()[finite].square().mean().sqrt().clamp_min(1e-30))


def check() -> list[dict[str, Any]]:
    """The relative RMS errors of every case and dtype against the reference in float64."""
    rows = []
    for case, dtype in product(CHECKS, TOLERANCES):
        lengths_q, lengths_k, (N, K, H, V), window, has_sink, parts = case
        torch.manual_seed(0)
        sizes = ((sum(lengths_q), N, H), (sum(lengths_k), K, H), (sum(lengths_k), K, V))
        inputs = [random(*size, dtype=dtype) for size in sizes]
        inputs += [random(N, dtype=torch.float32)] if has_sink else []
        d_out = random(sum(lengths_q), N, V, dtype=dtype)
        options: dict[str, Any] = {"window": window, "return_lse": True, "block_max": 64}
        options |= {"cu_seqlens_q": offsets(lengths_q), "cu_seqlens_k": offsets(lengths_k)}
        leaves = [x.clone().requires_grad_() for x in inputs]
        exact = [x.double().requires_grad_() for x in inputs]
        with tiles(f"parts={parts}"):
            if parts == 1:
                got = attention(
                    *leaves[:3], sink_N=leaves[3] if has_sink else None, backend="triton", **options
                )
            else:  # a call that asks for maxima is not cut into parts
                kept = options | {"block_max": None}
                got = attention(*leaves[:3], sink_N=leaves[3] if has_sink else None, backend="triton", **kept)
        want = attention_reference(
            *exact[:3], sink_N=exact[3] if has_sink else None, scale=H**-0.5, **options
        )
        got[0].backward(d_out)
        want[0].backward(d_out.double())
        names = ("out", "lse", "block_max")
        errors = {name: relative_error(x, y) for name, x, y in zip(names, got, want, strict=False)}
        gradients = zip(("d_q", "d_k", "d_v", "d_sink"), leaves, exact, strict=False)
        errors |= {name: relative_error(x.grad, y.grad) for name, x, y in gradients}
        worst = max(errors.values())
        shape = {"q": lengths_q, "k": lengths_k, "NKHV": [N, K, H, V], "window": window, "parts": parts}
        rows.append({**shape, "dtype": str(dtype)[6:], "errors": errors, "ok": worst <= TOLERANCES[dtype]})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def flex_attention(window: int | None, T: int) -> Call:
    """FlexAttention, compiled, for one mask; [1, heads, T, channels]."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def visible(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = q >= k
        return seen if window is None else seen & (q - k < window)

    # A cache entry per length and mask would pass the compiler's limit, and then it would not compile at all.
    torch.compiler.reset()
    mask = torch.compile(create_block_mask)(visible, None, None, T, T, device="cuda")
    compiled = torch.compile(flex, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)  # type: ignore[misc]


def flash(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = True) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)


def directions(function: Call, leaves: list[Tensor], d_out: Tensor) -> dict[str, Call]:
    """What is timed of a side: the forward pass, and the backward pass of a kept graph."""
    plain = [x.detach() for x in leaves]
    out = function(*leaves)
    return {
        "forward": lambda: function(*plain),
        "backward": lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True),
    }


def time_ms(call: Call) -> float:
    """The median time of a call on the device, whose caches are emptied before each."""
    filler = torch.empty(1 << 28, dtype=torch.int8, device="cuda")

    def once() -> float:
        filler.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    once()
    first = once()
    return statistics.median([first, *(once() for _ in range(min(50, int(TIMED_MS / first))))])


def time_replayed_ms(call: Call) -> float:
    """The mean time of a call in a CUDA graph, without what Python takes to launch it."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=TIMED_MS))


def take_turns(
    calls: dict[str, Call], rounds: int, timer: Callable[[Call], float] = time_ms
) -> dict[str, dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        names = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in names:
            times[name].append(timer(calls[name]))
    return {name: {"ms": statistics.median(ms), "min_ms": min(ms)} for name, ms in times.items()}


def training(
    T: int, shape: tuple[int, int, int, int], window: int | None, rounds: int, peers: Sequence[str]
) -> list[dict[str, Any]]:
    """One sequence of T tokens, forward and backward."""
    N, K, H, V = shape
    torch.manual_seed(0)
    q, k, v, d_out = (random(T, *size, dtype=torch.bfloat16) for size in ((N, H), (K, H), (K, V), (N, V)))
    cu = offsets([T])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attention(q, k, v, cu_seqlens_q=cu, window=window, backend="triton")

    def leaves(xs: tuple[Tensor, ...], is_batched: bool) -> list[Tensor]:
        shaped = [x[None].transpose(1, 2).contiguous() if is_batched else x for x in xs]
        return [x.clone().requires_grad_() for x in shaped]

    batched = d_out[None].transpose(1, 2).contiguous()
    sides = {"triton": directions(ours, leaves((q, k, v), False), d_out)}
    absent = {}
    makers: dict[str, Call] = {"sdpa": lambda: flash, "flex": lambda: flex_attention(window, T)}
    for name in peers:
        try:
            sides[name] = directions(makers[name](), leaves((q, k, v), True), batched)
            for call in sides[name].values():
                call()
        except Exception as error:  # a peer that this torch or this device does not have
            sides.pop(name, None)
            absent[name] = str(error).splitlines()[0][:200]
    pairs = T * (T + 1) // 2 if window is None else sum(min(t + 1, window) for t in range(T))
    rows = []
    for direction, factor in (("forward", 2), ("backward", 5)):
        found = take_turns({name: calls[direction] for name, calls in sides.items()}, rounds)
        work = factor * pairs * N * (H + V)
        for name, times in found.items():
            has_less = name == "sdpa" and window is not None
            times["tflops"] = round(
                (factor * T * (T + 1) // 2 * N * (H + V) if has_less else work) / times["ms"] / 1e9, 1
            )
        row = {"T": T, "N": N, "K": K, "H": H, "V": V, "window": window, "direction": direction, **found}
        rows.append(row | ({"absent": absent} if absent else {}))
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def decoding(B: int, S: int, shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """One query in each of B sequences of S keys, replayed as a CUDA graph."""
    N, K, H, V = shape
    torch.manual_seed(0)
    q = random(B, N, H, dtype=torch.bfloat16)
    k, v = random(B * S, K, H, dtype=torch.bfloat16), random(B * S, K, V, dtype=torch.bfloat16)
    options = {"cu_seqlens_q": offsets([1] * B), "cu_seqlens_k": offsets([S] * B), "backend": "triton"}
    calls: dict[str, Call] = {"triton": lambda: attention(q, k, v, **options)}
    if H == V:
        rows = [x.view(B, -1, *x.shape[1:]).transpose(1, 2).contiguous() for x in (q, k, v)]
        calls["sdpa"] = lambda: flash(*rows, is_causal=False)
    found = take_turns(calls, rounds, time_replayed_ms)
    for times in found.values():
        times["gb_per_s"] = round((k.nbytes + v.nbytes) / times["ms"] / 1e6, 1)
    row = {"B": B, "S": S, "N": N, "K": K, "H": H, "V": V, "direction": "decode", **found}
    print(json.dumps(row), file=sys.stderr)
    return row


def sweep(T: int, shape: tuple[int, int, int, int], window: int | None) -> list[dict[str, Any]]:
    """Each kernel's tiles by time, best first; tiles that do not fit the device are left out."""
    N, K, H, V = shape
    q, k, v, d_out = (random(T, *size, dtype=torch.bfloat16) for size in ((N, H), (K, H), (K, V), (N, V)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    cu = offsets([T])

    def forward() -> Any:
        return attention(*inputs, cu_seqlens_q=cu, window=window, backend="triton")

    out = forward()

    def backward() -> Any:
        return torch.autograd.grad(out, inputs, d_out, retain_graph=True)

    rows = []
    for kernel, candidates in SWEEP.items():
        times: dict[str, float] = {}
        for numbers in candidates:
            text = f"{kernel}={','.join(map(str, numbers))}"
            with tiles(text):
                try:
                    times[text] = round(time_ms(forward if kernel == "forward" else backward), 4)
                except Exception:  # too much shared memory, or a shape that the compiler refuses
                    continue
        best = dict(sorted(times.items(), key=lambda item: item[1])[:5])
        rows.append(
            {"T": T, "N": N, "K": K, "H": H, "V": V, "window": window, "kernel": kernel, "best_ms": best}
        )
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def revision() -> str | None:
    try:
        found = subprocess.run(
            ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="default: 8k to 128k")
    parser.add_argument(
        "--cases", type=int, nargs="+", default=list(range(len(CASES))), help="of the shapes and windows"
    )
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="time tile sizes instead, at the first --tokens")
    parser.add_argument("--check", action="store_true", help="only hold the kernels against the reference")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/attention-GPU.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks/_attention_gpu.py: there is no CUDA device here; nothing was measured",
            file=sys.stderr,
        )
        return 1
    import triton

    torch.backends.cuda.matmul.allow_tf32 = False
    checks = check()
    if not all(row["ok"] for row in checks):
        print(
            "benchmarks/_attention_gpu.py: the kernels are wrong here, so their speed means nothing",
            file=sys.stderr,
        )
        return 1
    results: list[dict[str, Any]] = []
    cases = [CASES[i] for i in options.cases]
    if options.sweep:
        for shape, window in cases:
            results += sweep(options.tokens[0], shape, window)
    elif not options.check:
        for (shape, window), T in product(cases, options.tokens):
            results += training(T, shape, window, options.rounds, options.peers)
        for shape, B, S in product(SHAPES, (1, 8, 32), (4096, 32768)):
            results.append(decoding(B, S, shape, options.rounds))
    gpu = torch.cuda.get_device_name()
    document = {
        "what": "attention on CUDA, bfloat16; sdpa has no window and computes plain causal attention there",
        "command": "benchmarks/_attention_gpu.py "
        + " ".join(sys.argv[1:] if arguments is None else arguments),
        "hardware": {"gpu": gpu, "capability": list(torch.cuda.get_device_capability())},
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
        },
        "revision": revision(),
        "tiles": os.environ.get(VARIABLE, ""),
        "checks": checks,
        "results": results,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = options.out or ROOT / "benchmarks" / "results" / f"attention-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2) + "\n"
    path.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
