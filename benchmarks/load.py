"""Time to load a model directory against reading its tensors alone: `sateen bench load DIR`.

Both sides end when every parameter byte has been read once; they run in turn, in one process.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from _results import publish, quartiles
from safetensors.torch import load_file
from torch import Tensor

from sateen.checkpoint.load import load
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
        **{f"{name}_s": quartiles(values, method="inclusive") for name, values in seconds.items()},
        "ratio": quartiles([ours / theirs for ours, theirs in pairs], method="inclusive"),
        "hardware": hardware(),
        "versions": versions(),
    }
    publish(result, flags.out, indent=1)


def touch(tensors: Iterable[Tensor]) -> int:
    """A sum over all bytes, so that none stays unread."""
    return sum(int(tensor.detach().view(-1).view(torch.uint8).sum()) for tensor in tensors)


if __name__ == "__main__":
    main()
