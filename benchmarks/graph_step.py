"""Decode steps replayed as CUDA graphs against the ordinary forward over the same caches.

    sateen bench graph_step
    PYTHONPATH=src python benchmarks/graph_step.py

The second form runs with torch, triton and numpy alone. Weights and cached rows are random. Both sides first
decode the same tokens in float32, and nothing is timed unless hidden states and cached rows agree; then the
times of one step are taken in bfloat16, on the clock, because what a graph saves is the time between kernels.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sateen.engine.cache.kv_cache import CacheEntry, KVCache
from sateen.engine.graph_step import GraphStep, why_not
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda"
SMALL = {
    "model_type": "mistral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512,
    "max_position_embeddings": 4096, "initializer_range": 0.1,
}  # fmt: skip
CHECKED = {"full attention": {"model_type": "llama"}, "windows": {"sliding_window": 100}}
LARGE = SMALL | {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000,
    "max_position_embeddings": 65536, "initializer_range": 0.02,
}  # fmt: skip
TOLERANCE = 1e-4  # of hidden states and rows, relative to the largest
LENGTHS = (127, 1000, 60, 300, 5)  # one is about to pass the border of a page


class Side:
    """A model, a cache of its own with random rows, and sequences in it."""

    def __init__(self, model: Decoder, lengths: Sequence[int], room: int):
        self.model = model
        longest = max(lengths) + room
        self.cache = KVCache(
            model.config.kv_layouts(), num_trunk_layers=model.config.num_hidden_layers,
            num_pages=sum((n + room) // 64 + 1 for n in lengths), num_slots=len(lengths),
            max_model_len=longest, dtype=model.model.embed_tokens.weight.dtype, device=DEVICE,
        )  # fmt: skip
        torch.manual_seed(1)
        for pool in self.cache.pools.values():
            pool.k_RKH.normal_()
            pool.v_RKV.normal_()
        self.entries = [self.cache.open() for _ in lengths]
        for entry, length in zip(self.entries, lengths, strict=True):
            assert self.cache.reserve(entry, length + room)
            entry.length = length
        self.graphs = GraphStep(model, self.cache)

    def view(self, entries: list[CacheEntry]) -> tuple[Any, list[int]]:
        starts = [entry.length for entry in entries]
        return self.cache.forward(entries, [1] * len(entries)), starts

    @torch.inference_mode()
    def ordinary(self, ids: list[int], count: int) -> Tensor:
        view, starts = self.view(self.entries[:count])
        offsets = torch.arange(count + 1, dtype=torch.int32, device=DEVICE)
        seq = Sequences(offsets, torch.tensor(starts, device=DEVICE))
        return self.model.trunk(torch.tensor(ids, device=DEVICE), seq, view)

    def replayed(self, ids: list[int], count: int) -> Tensor:
        view, _ = self.view(self.entries[:count])
        return self.graphs.trunk(ids, view)


def build(raw: dict[str, Any], dtype: torch.dtype) -> Decoder:
    return Decoder(ModelConfig.from_hf(raw)).init_weights(0).eval().to(DEVICE, dtype)


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().max() / want.float().abs().max())


def check(name: str, steps: int = 80) -> dict[str, Any]:
    """The largest gaps of hidden states over steps of changing batches, and of cached rows after them."""
    model = build(SMALL | CHECKED[name], torch.float32)
    one, other = Side(model, LENGTHS, steps), Side(model, LENGTHS, steps)
    worst = 0.0
    for step in range(steps):
        count = 1 + step % len(LENGTHS)
        ids = [(7 * step + 3 * i) % SMALL["vocab_size"] for i in range(count)]
        worst = max(worst, gap(other.replayed(ids, count), one.ordinary(ids, count)))
    rows = max(
        max(gap(y.k_RKH, x.k_RKH), gap(y.v_RKV, x.v_RKV))
        for x, y in zip(one.cache.pools.values(), other.cache.pools.values(), strict=True)
    )
    ok = worst <= TOLERANCE and rows <= TOLERANCE
    return {"model": name, "steps": steps, "hidden": worst, "rows": rows, "ok": ok}


def time_ms(step: Callable[[], Tensor], repeats: int) -> dict[str, float]:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return {"ms": round(statistics.median(times), 4), "min_ms": round(min(times), 4)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1000, 8000])
    parser.add_argument("--repeats", type=int, default=20, help="steps of each side (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/graph-step-GPU.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks/graph_step.py: there is no CUDA device here; nothing was measured", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = [check(name) for name in CHECKED]
    print(json.dumps(checks), file=sys.stderr)
    if not all(row["ok"] for row in checks):
        print("benchmarks/graph_step.py: the sides disagree, so their times mean nothing", file=sys.stderr)
        return 1
    model = build(LARGE, torch.bfloat16)
    results = []
    for batch, context in product(options.batches, options.contexts):
        side = Side(model, [context] * batch, 3 * options.repeats + 10)
        assert why_not(model, side.cache) is None
        ids = list(range(batch))
        sides = {
            "ordinary": lambda side=side, ids=ids: side.ordinary(ids, len(ids)),
            "replayed": lambda side=side, ids=ids: side.replayed(ids, len(ids)),
        }
        row: dict[str, Any] = {"batch": batch, "context": context}
        for name, step in sides.items():
            for _ in range(3):
                step()
            row[name] = time_ms(step, options.repeats)
        results.append(row)
        print(json.dumps(row), file=sys.stderr)
    gpu = torch.cuda.get_device_name()
    document = {
        "what": "one decode step of the trunk, bfloat16, ordinary forward and replayed CUDA graph",
        "command": "benchmarks/graph_step.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "hardware": {"gpu": gpu},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "model": LARGE,
        "checks": checks,
        "results": results,
    }
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = options.out or ROOT / "benchmarks" / "results" / f"graph-step-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=2) + "\n"
    path.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
