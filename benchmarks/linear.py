"""Speed of decoding's products, `x @ W.T` for 1, 16 and 64 tokens, against torch's `linear`, on the CPU.

    python benchmarks/linear.py --repeats 9

The kernels' correctness tests run first; nothing is printed or written unless they pass. Every shape has as
many copies of its weight as fill `--megabytes`, so that each product reads its weight from memory, as in a
model. One repeat runs each side once over all copies, one after the other, beside a plain sum over as many
bytes: what memory gives at that moment. torch computes in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _results import ROOT, is_dirty, publish, quartiles, result_file, revision, tests_pass
from torch.nn import functional as F

from sateen import ops
from sateen.ops.lowbit_matmul.native import FORMATS, INT4, INT8
from sateen.ops.native import native
from sateen.receipt.machine import hardware, versions

TESTS = ROOT / "tests" / "ops" / "test_lowbit_matmul.py"
# SmolLM2-135M's query and output, key and value, gate and up, down and output matrix; and a large one.
SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (8192, 4096)]
TOKENS = (1, 16, 64)
WARMUP = 1

Product = Callable[[], object]
Side = tuple[int, list[Product]]  # bytes that are read, and the products of all copies


def product(
    kind: int, packed: tuple[torch.Tensor, torch.Tensor | None], x: torch.Tensor, rows: int
) -> Product:
    """A call of the kernel with a region of threads of its own, without the checks of the operator."""
    weight, scales = (None if t is None else t.view(torch.uint8).view(-1).numpy() for t in packed)
    out = torch.empty(len(x), rows).numpy()
    arguments = (kind, rows, x.shape[1], weight, scales, None, x.numpy(), torch.get_num_threads(), out)
    return lambda: native().linear_forward(*arguments)


def sides(rows: int, columns: int, tokens: int, megabytes: int) -> tuple[int, dict[str, Side]]:
    """The number of copies, and name -> side."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    x = torch.randn(tokens, columns, generator=generator)
    x_bf16, w_bf16 = x.bfloat16(), weight.bfloat16()
    copies = max(1, megabytes * 2**20 // w_bf16.nbytes)
    packed = {"int8": (INT8, ops.pack_int8(weight)), "int4": (INT4, ops.pack_int4(weight))}
    forms = {"bf16": (FORMATS[torch.bfloat16], (w_bf16, None))}
    forms |= {name: (kind, (p.codes, p.scales)) for name, (kind, p) in packed.items()}
    found: dict[str, Side] = {}
    for name, (kind, tensors) in forms.items():
        size = sum(t.nbytes for t in tensors if t is not None)
        copied = [tuple(None if t is None else t.clone() for t in tensors) for _ in range(copies)]
        found[name] = size * copies, [product(kind, tensors, x, rows) for tensors in copied]
    floats = [w_bf16.clone() for _ in range(copies)]
    found["torch bf16"] = w_bf16.nbytes * copies, [partial(F.linear, x_bf16, w) for w in floats]
    numbers = torch.ones(megabytes * 2**20 // 8, dtype=torch.int64)
    found["read"] = numbers.nbytes, [numbers.sum]
    return copies, found


def measure(rows: int, columns: int, tokens: int, repeats: int, megabytes: int) -> dict[str, Any]:
    """GB/s and Gop/s of every side, from the medians of interleaved repeats."""
    copies, found = sides(rows, columns, tokens, megabytes)
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(WARMUP + repeats):
        # The order alternates, so that no side always runs behind the same other one.
        for name in found if repeat % 2 else reversed(found):
            began = time.perf_counter()
            for run in found[name][1]:
                run()
            if repeat >= WARMUP:
                times[name].append(time.perf_counter() - began)
    result: dict[str, Any] = {"rows": rows, "columns": columns, "tokens": tokens, "copies": copies}
    operations = 2 * rows * columns * tokens * copies
    for name, (size, _) in found.items():
        rates = quartiles([size / seconds / 1e9 for seconds in times[name]])
        result[name] = {f"gb_per_s_{key}": round(rates[key], 2) for key in ("p25", "median", "p75")}
        if name != "read":
            result[name]["gop_per_s"] = round(rates["median"] * operations / size, 1)
    for name in ("bf16", "int8", "int4", "torch bf16"):
        pairs = zip(times["read"], times[name], strict=True)
        share = quartiles([found[name][0] / b / (found["read"][0] / a) for a, b in pairs])
        result[name]["share_of_read"] = round(share["median"], 3)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9, help="at least 3 (default: %(default)s)")
    parser.add_argument(
        "--megabytes", type=int, default=128, help="of bfloat16 weights (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/linear-CPU.json")
    options = parser.parse_args()
    if not tests_pass("linear.py", TESTS):
        return 1
    results = []
    for rows, columns in SHAPES:
        for tokens in TOKENS:
            results.append(measure(rows, columns, tokens, options.repeats, options.megabytes))
            print(json.dumps(results[-1]), file=sys.stderr)
    document = {
        "what": "products with weights read from memory: weight bytes and operations per second",
        "command": f"python benchmarks/linear.py --repeats {options.repeats} --megabytes {options.megabytes}",
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "isa": native().current_isa()},
        "versions": versions(),
        "revision": revision(),
        "is_dirty": is_dirty("native", "src/sateen/ops", "benchmarks/linear.py"),
        "warmup": WARMUP,
        "repeats": options.repeats,
        "results": results,
    }
    publish(document, options.out or result_file("linear"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
