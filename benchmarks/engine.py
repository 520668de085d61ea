"""Our engine beside llama.cpp, transformers and vLLM: same weights, same prompts, same machine, in turn.

    sateen bench engine MODEL.gguf --llama-cpp PY --transformers PY --vllm PY

MODEL.gguf is a small Llama model in Q4_1. Its blocks are dequantised once; bfloat16 files, F16 and Q8_0 GGUF
files are made from these numbers, and int8 and int4 weights by our engine when it loads. Every engine is a
process of its own, in a Python of its own; seconds are taken inside it, around the work alone. Rounds go
through the engines in turn, forwards and backwards, and a bar holds when the median ratio of at least 9
rounds meets it and the lower quartile is not below 0.93 of it. An engine that is not given, not built or
does not load gets a row that says so.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _engine_bench import Bench, talk
from _engine_inputs import Prompts, prepare
from _engine_limits import hybrid, memory, quality, start
from _engine_speed import batch, decode, http, prefill
from _pairs import MIN_PAIRS
from _results import ROOT, is_dirty, publish, result_file, revision

from sateen.receipt import hardware, versions, write_atomically

SECTIONS: dict[str, Callable[[Bench], None]] = {
    "decode": decode, "batch": batch, "prefill": prefill, "start": start, "memory": memory,
    "hybrid": hybrid, "quality": quality, "http": http,
}  # fmt: skip
PEERS = {"llama.cpp": "LLAMA_CPP", "transformers": "TRANSFORMERS", "vLLM": "VLLM"}


def main() -> int:
    """Rows go to stderr as they come, the document to stdout and its file; 1 when a bar fails."""
    flags = parse()
    work = flags.work / "engine"
    (work / "logs").mkdir(parents=True, exist_ok=True)
    files = prepare(flags.model, work)
    bench = Bench(
        files=files, prompts=Prompts(files.folder / "tokenizer.json"), threads=flags.threads,
        pairs=flags.pairs or (3 if flags.quick else MIN_PAIRS), is_quick=flags.quick, logs=work / "logs",
        demo=flags.demo,
        pythons={
            "sateen": sys.executable, "sateen serve": sys.executable,
            **{kind: getattr(flags, word.lower()) for kind, word in PEERS.items()},
        },
    )  # fmt: skip
    path = flags.out or (work / "quick.json" if flags.quick else result_file("engine"))
    document = begin(path, files.sha256, flags)
    for name in flags.only:
        talk(f"{name}: {' '.join((SECTIONS[name].__doc__ or '').split())}")
        bench.rows, bench.versions = [], {}
        load, began = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
        SECTIONS[name](bench)
        document["sections"][name] = {
            "date": began.date().isoformat(),
            "seconds": round((datetime.datetime.now(datetime.UTC) - began).total_seconds()),
            "revision": revision(),
            "is_dirty": is_dirty("src/sateen", "native", "benchmarks"),
            "load_average_before": round(load, 2),
            "threads": flags.threads,
            "versions": versions() | bench.versions,
            "rows": bench.rows,
        }
        write_atomically(path, json.dumps(document, indent=2) + "\n")
    publish(document, path)
    found = [row for name in flags.only for row in document["sections"][name]["rows"]]
    return 1 if any(row["verdict"] in ("fails", "failed") for row in found) else 0


def begin(path: Path, sha256: str, flags: argparse.Namespace) -> dict[str, Any]:
    """The document to fill; sections of an earlier run on the same machine and model stay until measured."""
    words = " ".join(f"--{kind.lower().replace('.', '-')} PYTHON" for kind in PEERS)
    document: dict[str, Any] = {
        "what": "our engine beside others; ratio = ours / peer where nothing else is said, larger is better",
        "command": f"sateen bench engine MODEL.gguf {words}" + (" --demo MODEL" if flags.demo else ""),
        "model": {"file": flags.model.name, "sha256": sha256},
        "hardware": hardware(),
        "sections": {},
    }
    if path.is_file():
        earlier = json.loads(path.read_text())
        if all(earlier.get(key) == document[key] for key in ("hardware", "model")):
            document["sections"] = earlier["sections"]
    return document


def parse() -> argparse.Namespace:
    """The flags; paths of peers come from the environment where they are not given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    for kind, word in PEERS.items():
        parser.add_argument(
            f"--{kind.lower().replace('.', '-')}", dest=word.lower(), metavar="PYTHON",
            default=os.environ.get(f"SATEEN_BENCH_{word}"),
            help=f"a Python with {kind} (default: $SATEEN_BENCH_{word}; without one it is not measured)",
        )  # fmt: skip
    parser.add_argument("--demo", type=Path, metavar="MODEL", help="a second model for the perplexity")
    parser.add_argument("--only", metavar="A,B", help=f"sections of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument(
        "--pairs", type=int, help=f"rounds of each comparison (default: {MIN_PAIRS}; 3 with --quick)"
    )
    parser.add_argument("--threads", type=int, default=2, help="of every engine (default: %(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="less of everything, to see that it runs; kept in --work"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="where files are made (runs)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/engine-CPU.json")
    flags = parser.parse_args()
    flags.only = flags.only.split(",") if flags.only else list(SECTIONS)
    if unknown := [name for name in flags.only if name not in SECTIONS]:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(SECTIONS)}")
    if not flags.model.is_file():
        parser.error(f"{flags.model} is not there; it is a Llama model as GGUF, such as SmolLM2-135M in Q4_1")
    return flags


if __name__ == "__main__":
    sys.exit(main())
