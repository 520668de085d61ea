"""The comparisons of tokens per second that `engine.py` can make; each adds its rows to the bench it gets."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from _engine_bench import Bench, Measure, Side, ours, state, talk
from _pairs import interleave, missing, row, spread
from _worker import Worker, WorkerError


def decode(bench: Bench) -> None:
    """One sequence, token by token: bare loops against bare loops, then the calls that users make."""
    length, count = 64, bench.size(128, 16)
    context = 512

    def bare(worker: Worker, number: int) -> float:
        worker.ask("begin", prompts=[prompt(number)], num_tokens=count)
        said = worker.ask("decode", num_tokens=count)
        worker.ask("end")
        return float(said["tokens"] / said["seconds"])

    def call(worker: Worker, number: int) -> float:
        said = worker.ask("generate", prompts=[texts(number)], num_tokens=count)
        if said["tokens"] != count:
            talk(f"{worker.name}: {said['tokens']} of {count} tokens, the text ended")
        return float(said["tokens"] / said["seconds"])

    def llama(name: str, path: Any, bar: float, target: float) -> Side:
        return Side(f"llama.cpp {name}", "llama.cpp", {"model": str(path), "context": context}, bar, target)

    files = bench.files
    peers = {
        "bf16": [llama("F16", files.f16, 0.9, 1.2)],
        "int8": [llama("Q8_0", files.q8_0, 1.0, 1.3)],
        "int4": [llama("Q4_1", files.shipped, 1.2, 2.0)],
    }
    prompt, texts = rounds(lambda: bench.prompts.take(length)), rounds(lambda: bench.prompts.text(length))
    for form, sides in peers.items():
        mine = ours(bench, form, max_num_seqs=1, max_model_len=context)
        measures: dict[str, tuple[str, Measure]] = {
            f"decode, batch 1, bare loop, {form}": ("tokens/s", bare),
            f"decode, batch 1, generate and create_completion, {form}": ("tokens/s", call),
        }
        bench.compare(mine, sides, measures, prompt_tokens=length, new_tokens=count)
    mine = ours(bench, "bf16", max_num_seqs=1, max_model_len=context)
    theirs = Side("transformers bf16", "transformers", {"model": str(files.folder)})
    measures = {"decode, batch 1, bare loop, bf16": ("tokens/s", bare)}
    bench.compare(mine, [theirs], measures, prompt_tokens=length, new_tokens=count)


def batch(bench: Bench) -> None:
    """Sixteen sequences at once through each engine's `generate`, prompts read within."""
    num_seqs, length, count = 16, 32, bench.size(128, 8)

    def call(worker: Worker, number: int) -> float:
        said = worker.ask("generate", prompts=prompts(number), num_tokens=count)
        if said["tokens"] != num_seqs * count:
            raise WorkerError("Short", f"{said['tokens']} of {num_seqs * count} tokens", worker.name)
        return float(said["tokens"] / said["seconds"])

    prompts = rounds(lambda: [bench.prompts.take(length) for _ in range(num_seqs)])
    room = {"max_num_seqs": num_seqs, "max_model_len": 512}
    model = str(bench.files.folder)
    peers = [
        Side("vLLM bf16", "vLLM", {"model": model, "is_compiled": not bench.is_quick, **room}, 1.5, 2.5),
        Side("transformers bf16", "transformers", {"model": model}),
    ]
    measures: dict[str, tuple[str, Measure]] = {"decode, batch 16, generate, bf16": ("tokens/s", call)}
    bench.compare(ours(bench, "bf16", **room), peers, measures, prompt_tokens=length, new_tokens=count)


def prefill(bench: Bench) -> None:
    """A prompt up to its first greedy token; logits of the last position alone on both sides."""
    peers = [Side("transformers bf16", "transformers", {"model": str(bench.files.folder)}, 1.1, 1.4)]
    room = {"max_num_seqs": 1, "max_model_len": 2112, "max_num_batched_tokens": 2048}
    measures: dict[str, tuple[str, Measure]] = {}

    def read(length: int, prompt: Callable[[int], list[int]], worker: Worker, number: int) -> float:
        said = worker.ask("begin", prompts=[prompt(number)], num_tokens=1)
        worker.ask("end")
        return float(length / said["seconds"])

    for length in (512,) if bench.is_quick else (512, 2048):
        measure = partial(read, length, rounds(partial(bench.prompts.take, length)))
        measures[f"prefill, {length} tokens, bf16"] = "tokens/s", measure
    bench.compare(ours(bench, "bf16", **room), peers, measures, **room)


def http(bench: Bench) -> None:
    """Sixteen concurrent clients against the same engine without a server, prompts and texts within both."""
    clients, length, count = 16, 32, bench.size(128, 8)
    total = bench.size(48, 16)
    room = {"model": str(bench.files.folder), "max_num_seqs": clients, "max_model_len": 512}
    bars = {"streaming": 0.75, "not streaming": 0.85}
    prompts = {name: rounds(lambda: [bench.prompts.take(length) for _ in range(total)]) for name in bars}
    costs: dict[str, list[float]] = {name: [] for name in bars}

    def rate(worker: Worker, said: dict[str, Any]) -> float:
        if said["tokens"] != total * count:
            raise WorkerError("Short", f"{said['tokens']} of {total * count} tokens", worker.name)
        return float(said["tokens"] / said["seconds"])

    def through(worker: Worker, name: str, number: int) -> float:
        asked, streams = prompts[name](number), name == "streaming"
        said = worker.ask("run", prompts=asked, num_tokens=count, clients=clients, streams=streams)
        costs[name].append(said["cpu_s"] / said["seconds"])
        return rate(worker, said)

    def plain(worker: Worker, number: int) -> float:
        asked = prompts["streaming"](number)
        return rate(worker, worker.ask("generate", prompts=asked, num_tokens=count))

    what = f"{clients} clients over HTTP, {{}}, bf16"
    try:
        with ExitStack() as stack:
            server, _ = stack.enter_context(bench.open(Side("sateen serve", "sateen serve", room)))
            offline, _ = stack.enter_context(
                bench.open(Side("sateen offline", "sateen", room | {"prefix_cache": True}))
            )
            sides = {name: partial(through, server, name) for name in bars}
            found = interleave(sides | {"offline": partial(plain, offline)}, bench.pairs)
            usage = bench.usage((server, offline))
    except WorkerError as error:
        for name, bar in bars.items():
            why = state(error), str(error)
            bench.add(missing(what.format(name), "sateen serve", "sateen offline", *why, bar=bar))
        return
    for name, bar in bars.items():
        cost = spread(costs[name][-bench.pairs :])
        bench.add(
            row(
                what.format(name), ("sateen serve", found[name]), ("sateen offline", found["offline"]),
                unit="tokens/s", bar=bar, client_cpu_share=cost, requests=total, new_tokens=count, **usage,
            )
        )  # fmt: skip
        talk(f"the clients took {cost['median']:.1%} of a core, which the server did not have")


def rounds(make: Callable[[], Any]) -> Callable[[int], Any]:
    """Something of its own for each round, the same for every side of it."""
    kept: dict[int, Any] = {}

    def one(number: int) -> Any:
        if number not in kept:
            kept[number] = make()
        return kept[number]

    return one
