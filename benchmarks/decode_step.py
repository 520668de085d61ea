"""Milliseconds of a decode step: the native call against torch layer by layer, full against sliding layers.

    python benchmarks/decode_step.py MODEL --batch 1 4 16 --context 32 1024 16384

MODEL is a directory or preset of the Llama families. A step is the trunk and the logits of one new token for
each sequence; the cached rows before it are random. The hybrid twin has the same weights, five layers of six
with a window of 128. Sides run one after another in every repeat. CPU milliseconds count all threads and say
more than the clock where others use the machine. The step's correctness tests run first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import ROOT, is_dirty, publish, quartiles, result_file, revision, tests_pass

from sateen.checkpoint.hf import load_model
from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.native.step import NativeStep
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.nn.attention import LayerLinks, Sequences
from sateen.ops.native import native
from sateen.receipt.machine import hardware, versions

TESTS = ROOT / "tests" / "engine" / "native" / "test_step.py"
WARMUP = 2
WINDOW, FULL_EVERY = 128, 6
# Torch reads all rows of a long context into new tensors; a few repeats say enough.
TORCH_REPEATS = 5


def hybrid_twin(model: Decoder) -> Decoder:
    """The same tensors, with a window in all layers but every sixth."""
    kinds = ["full_attention" if i % FULL_EVERY == FULL_EVERY - 1 else "sliding_attention"
             for i in range(model.config.num_hidden_layers)]  # fmt: skip
    raw = dict(model.config.raw) | {"layer_types": kinds, "sliding_window": WINDOW, "model_type": "mistral"}
    with torch.device("meta"):
        twin = Decoder(ModelConfig.from_hf(raw))
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()


def side(model: Decoder, batch: int, context: int, *, is_native: bool) -> Callable[[], object]:
    """One step at this context, again and again."""
    layouts = model.config.kv_layouts()[: model.config.num_hidden_layers]
    cache = KVCache(
        layouts, num_trunk_layers=len(layouts), num_slots=batch, max_model_len=context + 1,
        num_pages=batch * (context // 64 + 1), dtype=model.model.embed_tokens.weight.dtype,
    )  # fmt: skip
    for pool in cache.pools.values():
        pool.k_RKH.normal_()
        pool.v_RKV.normal_()
    entries = [cache.open() for _ in range(batch)]
    for entry in entries:
        assert cache.reserve(entry, context + 1)
    ids = [7 * i % model.config.vocab_size for i in range(batch)]
    step = NativeStep(model, cache)
    offsets = torch.arange(batch + 1, dtype=torch.int32)

    def run() -> object:
        for entry in entries:
            entry.length = context
        view = cache.forward(entries, [1] * batch)
        if is_native:
            return step.logits(step.trunk(ids, view, LayerLinks()))
        seq = Sequences(offsets, torch.tensor(view.starts))
        return model.logits(model.head_input(model.trunk(torch.tensor(ids), seq, view)))

    return run


@torch.inference_mode()
def measure(models: dict[str, Decoder], batch: int, context: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of every side, and what full costs beside hybrid and torch beside native."""
    sides = {
        f"{name} {kind}": side(model, batch, context, is_native=kind == "native")
        for name, model in models.items()
        for kind in ("native", "torch")
    }
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(WARMUP + repeats):
        for name, run in sides.items():
            if name.endswith("torch") and repeat >= WARMUP + TORCH_REPEATS:
                continue
            began, used = time.perf_counter(), time.process_time()
            run()
            if repeat >= WARMUP:
                wall[name].append((time.perf_counter() - began) * 1e3)
                cpu[name].append((time.process_time() - used) * 1e3)
    result: dict[str, Any] = {"batch": batch, "context": context}
    for name in sides:
        rates = {"ms": quartiles(wall[name]), "cpu_ms": quartiles(cpu[name])}
        result[name] = {
            f"{what}_{key}": round(value, 2) for what, found in rates.items() for key, value in found.items()
        }
    middle = {what: {name: result[name][f"{what}_median"] for name in sides} for what in ("ms", "cpu_ms")}
    for what, found in middle.items():
        result[f"torch over native, {what}"] = round(found["full torch"] / found["full native"], 2)
        if "hybrid native" in found:
            result[f"full over hybrid, {what}"] = round(found["full native"] / found["hybrid native"], 2)
    size = sum(p.nbytes for p in models["full"].parameters())
    result["weight_gb_per_s"] = round(size / middle["ms"]["full native"] / 1e6, 1)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a directory or preset")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], metavar="B")
    parser.add_argument("--context", type=int, nargs="+", default=[32, 1024, 16384], metavar="T")
    parser.add_argument("--repeats", type=int, default=15, help="at least 3 (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/decode-step-CPU.json")
    options = parser.parse_args()
    if not tests_pass("decode_step.py", TESTS):
        return 1
    if options.threads:
        torch.set_num_threads(options.threads)
    full = load_model(options.model).eval()
    models = {"full": full, "hybrid": hybrid_twin(full)}
    results = []
    for context in options.context:
        for batch in options.batch:
            results.append(measure(models, batch, context, options.repeats))
            print(json.dumps(results[-1]), file=sys.stderr)
    document = {
        "what": "milliseconds of a decode step: trunk and logits of one token per sequence",
        "command": f"python benchmarks/decode_step.py MODEL --repeats {options.repeats}",
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "isa": native().current_isa()},
        "versions": versions(),
        "revision": revision(),
        "is_dirty": is_dirty("native", "src/sateen/engine", "benchmarks/decode_step.py"),
        "parameters": sum(p.numel() for p in full.parameters()),
        "dtype": str(full.model.embed_tokens.weight.dtype),
        "warmup": WARMUP,
        "repeats": {"native": options.repeats, "torch": min(options.repeats, TORCH_REPEATS)},
        "results": results,
    }
    publish(document, options.out or result_file("decode-step"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
