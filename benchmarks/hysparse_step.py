"""A decode step of HySparse, native and in torch, beside full attention: `sateen bench hysparse-step`.

Three steps of models of one size with random weights, for one token after a filled cache: HySparse's in one
native call, the same model layer by layer in torch, and a full-attention twin's native step. They take turns
in one process, on one thread. Caches hold random rows, so the lists are those of random scores.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import ROOT, publish, revision, tests_pass

from sateen.engine.cache.sizing import sized_cache
from sateen.engine.native.step import NativeStep
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences
from sateen.receipt import hardware

FULL, SPARSE = "full_attention", "sparse_attention"
SIZE: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 65536,
    "num_nextn_predict_layers": 0,
}  # fmt: skip
HYSPARSE = {"v_head_dim": 64, "layer_types": [FULL, *[SPARSE] * 3, FULL, *[SPARSE] * 2, FULL]}
# Name of a step -> preset, changes, and whether it is native.
STEPS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "hysparse, native": ("hysparse-7b", HYSPARSE, True),
    "hysparse, torch": ("hysparse-7b", HYSPARSE, False),
    "full attention, native": ("mimo-7b", {}, True),
}


def make_step(name: str, dtype: torch.dtype, longest: int) -> Callable[[int], torch.Tensor]:
    """A function that computes one token's hidden state behind `n` cached ones."""
    base, changes, is_native = STEPS[name]
    model = Decoder.build(ModelConfig.from_hf(preset(base) | SIZE | changes)).init_weights(0).to(dtype).eval()
    cache = sized_cache(
        model, kv_cache_dtype="auto", max_num_seqs=1, max_model_len=longest + 64, kv_memory_bytes=None
    )
    for pool in cache.pools.values():
        pool.k_RKH.normal_()
        pool.v_RKV.normal_()
    entry = cache.open()
    assert cache.reserve(entry, longest + 1)
    native = NativeStep(model, cache) if is_native else None

    @torch.inference_mode()
    def step(n: int) -> torch.Tensor:
        entry.length = n
        view = cache.forward([entry], [1])
        if native is not None:
            return native.trunk([7], view, LayerLinks())
        seq = Sequences(torch.tensor([0, 1], dtype=torch.int32), torch.tensor([n]))
        return model.trunk(torch.tensor([7]), seq, view)

    return step


def measure(dtype: torch.dtype, contexts: list[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of CPU, the least and the median, of each step after each context."""
    steps = {name: make_step(name, dtype, max(contexts)) for name in STEPS}
    found: dict[str, Any] = {}
    for context in contexts:
        spent: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                begin = time.process_time()
                step(context)
                spent[name].append(1e3 * (time.process_time() - begin))
        found[str(context)] = {
            name: {"least_ms": min(runs), "median_ms": statistics.median(runs)}
            for name, runs in spent.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="also write the result here")
    flags = parser.parse_args()
    if not tests_pass("hysparse_step.py", ROOT / "tests" / "engine" / "native" / "test_step.py"):
        raise SystemExit(1)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {
        str(dtype).removeprefix("torch."): measure(dtype, flags.contexts, flags.rounds)
        for dtype in (torch.float32, torch.bfloat16)
    }
    header = {"hardware": hardware(), "revision": revision(), "torch": torch.__version__}
    publish(header | {"threads": 1, "model": SIZE | HYSPARSE, "steps": results}, flags.out)


if __name__ == "__main__":
    main()
