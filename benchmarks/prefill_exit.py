"""CPU seconds of reading a prompt with and without HySparse2's early exit: `sateen bench prefill-exit`.

Random weights, hysparse2-tiny and a deeper model of the paper's shape (half of the layers behind the cut);
runs with and without alternate in one process. The first token must be the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _results import ROOT, publish, revision, tests_pass

from sateen import LLM, SamplingParams
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.early_exit import EarlyExit
from sateen.models.registry import preset
from sateen.receipt import hardware

FULL, SLIDING, SPARSE = "full_attention", "sliding_attention", "sparse_attention"
MODELS: dict[str, dict[str, Any]] = {
    "hysparse2-tiny": {},
    "25 layers, blocks of 64": {
        "num_hidden_layers": 25,
        "layer_types": [*[SLIDING] * 6, FULL, *[SLIDING] * 6, *[FULL, *[SPARSE] * 5] * 2],
        "sparse_bridge_source": 6,
        "sparse_select": "block",
        "sparse_block_size": 64,
        "sparse_topk_tokens": 1024,
        "sliding_window": 64,
        "hidden_size": 128,
    },
}
CHUNK = 1024


def measure(changes: dict[str, Any], tokens: int, repeats: int) -> dict[str, Any]:
    """Medians of CPU seconds, and the rows that each layer computes for the last chunk."""
    raw = (
        preset("hysparse2-tiny") | {"initializer_range": 0.1, "max_position_embeddings": 2 * tokens} | changes
    )
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0).eval()
    prompt = torch.randint(512, (tokens,), generator=torch.Generator().manual_seed(3)).tolist()
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    spent: dict[bool, list[float]] = {True: [], False: []}
    first = set()
    for _ in range(repeats):
        for is_on, found in spent.items():
            llm = LLM(
                model, prefill_exit=is_on, prefix_cache=False, max_num_seqs=1, max_num_batched_tokens=CHUNK,
                max_model_len=tokens + 64,
            )  # fmt: skip
            begin = time.process_time()
            first.add(llm.generate([prompt], params)[0].outputs[0].token_ids[0])
            found.append(time.process_time() - begin)
    assert len(first) == 1, "the exit changed the first token"
    exit = EarlyExit.of(model.config)
    assert exit is not None
    on, off = (statistics.median(spent[is_on]) for is_on in (True, False))
    rows = [exit.rows(layer, CHUNK, 1) for layer in range(model.config.num_hidden_layers)]
    return {"cpu_s": on, "cpu_s_without": off, "ratio": off / on, "runs": spent, "rows_of_1024": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="length of the prompt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the result here")
    flags = parser.parse_args()
    if not tests_pass("prefill_exit.py", ROOT / "tests" / "models" / "test_early_exit.py"):
        raise SystemExit(1)
    models = {name: measure(changes, flags.tokens, flags.repeats) for name, changes in MODELS.items()}
    header = {"hardware": hardware(), "revision": revision(), "torch": torch.__version__}
    publish(
        header | {"threads": torch.get_num_threads(), "tokens": flags.tokens, "models": models}, flags.out
    )


if __name__ == "__main__":
    main()
