"""Time to load a model directory against reading its tensors alone: `sateen bench load DIR`.

Both sides end when every parameter byte has been read once; they run in turn, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sateen.checkpoint.hf import load
from sateen.receipt import hardware, versions


def main() -> None:
    """Prints one JSON object: seconds of both sides and their ratio, medians and quartiles over the pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a Hugging Face directory with safetensors")
    parser.add_argument("--pairs", type=int, default=15, help="interleaved pairs (default: 15)")
    parser.add_argument("--out", type=Path, help="also write the result here")
    flags = parser.parse_args()
    files = sorted(flags.folder.glob("*.safetensors"))
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: touch(load(flags.folder).parameters()),
        "safetensors": lambda: [touch(load_file(file).values()) for file in files],
    }
    for side in sides.values():
        side()  # the files come from memory from here on
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.pairs):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    pairs = zip(seconds["ours"], seconds["safetensors"], strict=True)
    result: dict[str, Any] = {
        "bytes": sum(file.stat().st_size for file in files),
        "pairs": flags.pairs,
        **{f"{name}_s": quartiles(values) for name, values in seconds.items()},
        "ratio": quartiles([ours / theirs for ours, theirs in pairs]),
        "hardware": hardware(),
        "versions": versions(),
    }
    words = json.dumps(result, indent=1)
    print(words)
    if flags.out:
        flags.out.write_text(words + "\n")


def touch(tensors: Iterable[Tensor]) -> int:
    """A sum over all bytes, so that none stays unread."""
    return sum(int(tensor.detach().view(-1).view(torch.uint8).sum()) for tensor in tensors)


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high}


if __name__ == "__main__":
    main()
