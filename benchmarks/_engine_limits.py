"""What `engine.py` holds against limits: start, memory, hybrid caches, quality of packed weights."""

from __future__ import annotations

import ast
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from typing import Any

from _engine_bench import FORMS, HERE, Bench, Side, ours, state, talk
from _engine_inputs import held_out, hybrid_shapes, kv_formula
from _pairs import interleave, limit, missing, row, spread
from _worker import Worker, WorkerError

TORCH = "import torch; print(flush=True)"
FIRST_TOKEN = """
from sateen import LLM, SamplingParams
llm = LLM({model!r}, max_num_seqs=1)
for news in llm.generate_stream({prompt!r}, SamplingParams(temperature=0, max_tokens=1)):
    print(news.token_ids, flush=True)
"""


def start(bench: Bench) -> None:
    """From the start of a process to its first token, beside a process that imports torch alone."""
    allowed_s = 1.5
    what = "process start to first token, against importing torch"
    script = FIRST_TOKEN.format(model=str(bench.files.folder), prompt=bench.prompts.take(16))
    scripts = {"sateen": script, "import torch": TORCH}
    costs: dict[str, list[float]] = {name: [] for name in scripts}
    environment = os.environ | {"OMP_NUM_THREADS": str(bench.threads)}

    def run(name: str, _: int) -> float:
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-c", scripts[name]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        is_said = bool(process.stdout.readline())
        seconds = time.perf_counter() - began
        process.stdout.close()
        if process.wait() or not is_said:
            words = f"ended with {process.returncode} before its first line"
            raise WorkerError("Ended", words, name)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        costs[name].append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        return seconds

    try:
        found = interleave({name: partial(run, name) for name in scripts}, bench.pairs)
    except WorkerError as error:
        bench.add(missing(what, "sateen", "import torch", state(error), str(error), bar=1.0))
        return
    both = list(zip(found["sateen"], found["import torch"], strict=True))
    bench.add(
        row(
            what, ("sateen", found["sateen"]), ("import torch", found["import torch"]), unit="s", bar=1.0,
            ratio=[(theirs + allowed_s) / mine for mine, theirs in both],
            ratio_is=f"(import torch + {allowed_s} s) / ours", over_s=spread([a - b for a, b in both]),
            cpu_s={name: spread(values[-bench.pairs :]) for name, values in costs.items()},
        )
    )  # fmt: skip


def memory(bench: Bench) -> None:
    """Peak resident memory after a prompt of 512 tokens and 32 more, against what the parts allow."""
    torch_bytes = bytes_of_torch()
    for form in FORMS:
        what = f"peak resident memory, {form}"
        try:
            with bench.open(ours(bench, form, max_num_seqs=1, max_model_len=1024)) as (worker, said):
                worker.ask("begin", prompts=[bench.prompts.take(512)], num_tokens=32)
                worker.ask("decode", num_tokens=32)
                peak = worker.ask("usage")["peak_rss_bytes"]
        except WorkerError as error:
            bench.add(missing(what, f"sateen {form}", "formula", state(error), str(error)))
            continue
        held = said["weight_bytes"], said["cache_bytes"], torch_bytes
        allowed = 1.4 * held[0] + held[1] + held[2] + 100e6
        bench.add(
            limit(
                what, peak / 1e6, allowed / 1e6, unit="MB",
                allowed_is="1.4 x weights + cache + import torch + 100 MB",
                **dict(zip(("weight_bytes", "cache_bytes", "import_torch_bytes"), held, strict=True)),
            )
        )  # fmt: skip


def bytes_of_torch() -> int:
    """Peak resident memory of a process that imports torch."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import torch, _worker; print(_worker.usage())"
    done = subprocess.run([sys.executable, "-c", code, HERE], capture_output=True, text=True, check=True)
    return int(ast.literal_eval(done.stdout)["peak_rss_bytes"])


def hybrid(bench: Bench) -> None:
    """Window 128 in five of six layers against full attention in all: random weights, 16k tokens."""
    context, spare = bench.size(16384, 2048), 16 * (bench.pairs + 2) + 64
    hybrid_raw, full_raw = hybrid_shapes(bench.files.folder, context)
    room = {"max_num_seqs": 4, "max_model_len": context}
    sides = {
        name: Side(name, "sateen", {"model": raw, **room})
        for name, raw in (("sateen hybrid", hybrid_raw), ("sateen full", full_raw))
    }
    what, step = "decode, window 128 against full attention", 16

    def more(worker: Worker, _: int) -> float:
        said = worker.ask("decode", num_tokens=step)
        return float(said["tokens"] / said["seconds"])

    try:
        with ExitStack() as stack:
            workers = {}
            for (name, side), raw in zip(sides.items(), (hybrid_raw, full_raw), strict=True):
                workers[name], said = stack.enter_context(bench.open(side))
                wanted = kv_formula(raw, context, room["max_num_seqs"])
                held = {"allocated_bytes": said["cache_bytes"], "formula_bytes": wanted, "context": context}
                apart = 100 * abs(said["cache_bytes"] / wanted - 1)
                bench.add(limit(f"allocated KV, {name}", apart, 2.0, unit="% from the formula", **held))
            begun = 0
            for num_seqs, bar in ((1, 1.5), (4, 2.0)):
                new = [bench.prompts.take(context - 2 * spare) for _ in range(num_seqs - begun)]
                begun = num_seqs
                talk(f"reading {len(new)} prompts of {len(new[0])} tokens, on both sides")
                for worker in workers.values():
                    worker.ask("begin", prompts=new, num_tokens=2 * spare - 1)
                found = interleave(
                    {name: partial(more, worker) for name, worker in workers.items()}, bench.pairs
                )
                (mine, mine_found), (twin, twin_found) = found.items()
                bench.add(
                    row(
                        f"decode, batch {num_seqs}, context {context}, bare loop, bf16", (mine, mine_found),
                        (twin, twin_found), unit="tokens/s", bar=bar, new_tokens=step,
                    )
                )  # fmt: skip
    except WorkerError as error:
        bench.add(missing(what, "sateen hybrid", "sateen full", state(error), str(error)))


def quality(bench: Bench) -> None:
    """Perplexity of the weight forms against bfloat16 on held-out text; also of a second model, if given."""
    from sateen.data.text import python_docs, split_heldout

    texts, steps = held_out(), bench.size(1024, 48)
    if bench.is_quick:
        texts = {name: text[:800] for name, text in texts.items()}
    models: list[tuple[str, str, dict[str, str], int | None]] = [
        ("model", str(bench.files.folder), texts, 1024)
    ]
    if bench.demo is not None:
        own = {document.name: document.text for document in split_heldout(python_docs())[1]}
        models.append(("demo", str(bench.demo), own, None))
    else:
        bench.add(missing("perplexity, demo", "sateen", "sateen bf16", "not measured", "use --demo MODEL"))
    for label, model, documents, context in models:
        asked = list(documents.values())
        base: dict[str, dict[str, Any]] = {}
        for form, allowed in (("bf16", 0.0), ("int8", 0.5), ("int4", 2.0)):
            what = f"perplexity, {label}, {form}"
            options = {"model": model, "weights": FORMS[form], "dtype": "bfloat16"}
            one_token_steps = {"max_num_seqs": 1, "max_num_batched_tokens": 1}
            try:
                side = Side(f"sateen {form} {label}", "sateen", options | one_token_steps)
                with bench.open(side) as (worker, _):
                    found = {
                        "whole texts": worker.ask("perplexity", texts=asked, context=context),
                        "step by step": worker.ask("step_perplexity", texts=asked[:8], context=steps),
                    }
            except WorkerError as error:
                bench.add(missing(what, f"sateen {form}", "sateen bf16", state(error), str(error)))
                continue
            if form == "bf16":
                base = found
                continue
            for way, said in found.items() if base else ():
                bench.add(
                    limit(
                        f"{what}, {way}", 100 * (said["perplexity"] / base[way]["perplexity"] - 1), allowed,
                        unit="% above bf16", perplexity=said["perplexity"], tokens=said["tokens"],
                        bf16_perplexity=base[way]["perplexity"], **uncertainty(said, base[way]),
                        text=list(documents) if label == "model" else "held-out Python documentation",
                    )
                )  # fmt: skip


def uncertainty(said: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Standard error in percent of the difference of two perplexities, where each token's part is known."""
    if "nats" not in said:
        return {}
    apart = [a - b for a, b in zip(said["nats"], base["nats"], strict=True)]
    return {"standard_error": round(100 * statistics.stdev(apart) / math.sqrt(len(apart)), 3)}
