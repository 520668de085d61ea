"""Mixed load on the engine: `sateen bench engine-load`.

Clients send prompts of random lengths, some with a common beginning, some sampled, and some hang up at a
random moment; drafts, prefix reuse, preemption and a full queue are at work. Afterwards nothing may be held,
and every complete greedy answer must be the one that its prompt gets alone, from an engine without reuse.
Where they part although the alone run's two best logits are closer than 1e-4, float32 sums taken in another
order decide; such cases are counted.
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _results import publish, revision

from sateen import LLM, SamplingParams
from sateen.engine.state import Request
from sateen.errors import QueueFull
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.receipt import hardware, versions

TIE = 1e-4  # logits of a single run that are closer than this may be swapped by rounding
ALLOWED_TIES = 3


@dataclass
class Call:
    """One client's request.

    Attributes:
        prompt: token ids.
        params: of its tokens.
        patience: steps after which the client hangs up; None for never.
        request: in the engine, once it was accepted.
    """

    prompt: list[int]
    params: SamplingParams
    patience: int | None
    request: Request | None = field(default=None, repr=False)


def main() -> None:
    """Prints one JSON object and fails where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--clients", type=int, default=32, help="requests at once (default: 32)")
    parser.add_argument("--preset", default="mimo-v2-flash-tiny", help="model, with random weights")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--out", type=Path, help="also write the result here")
    flags = parser.parse_args()
    model = random_model(flags.preset)
    began, cpu = time.perf_counter(), cpu_s()
    llm = LLM(model, **engine_settings(flags.clients))
    calls = random_calls(flags.requests, model.config.vocab_size, random.Random(flags.seed))
    refused = drive(llm, calls, flags.clients)
    load_s, load_cpu_s = time.perf_counter() - began, cpu_s() - cpu
    result = compare(model, calls) | {"refused": refused, "leaks": leaks(llm)}
    stats = llm.stats()
    keys = ("steps", "prompt_tokens", "generated_tokens", "preemptions", "aborted", "acceptance_by_position")
    result |= {key: stats[key] for key in keys}
    result |= {"prefix": stats["prefix"], "seconds": load_s, "cpu_s": load_cpu_s}
    result |= {"revision": revision(), "hardware": hardware(), "versions": versions()}
    publish(result, flags.out)
    if result["different"] or result["ties"] > ALLOWED_TIES or result["leaks"]:
        raise SystemExit(1)


def random_model(name: str) -> Decoder:
    """Random weights, large enough for attention to matter, with routing settled by the bias."""
    model = Decoder(ModelConfig.from_hf(preset(name) | {"initializer_range": 0.1})).init_weights(0).eval()
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias.add_(2.0 * torch.arange(moe.spec.num_experts))
    return model


def engine_settings(clients: int) -> dict[str, Any]:
    """Fewer slots than clients, and too few pages for what they may want."""
    slots = max(2, clients * 3 // 4)
    return {
        "max_num_seqs": slots, "max_model_len": 320, "num_pages": max(5, slots),
        "max_num_batched_tokens": 8 * slots, "max_waiting": clients // 8,
    }  # fmt: skip


def random_calls(count: int, vocab_size: int, rng: random.Random) -> list[Call]:
    """Prompts of 1 to 250 tokens, half of them behind one of four beginnings; a fifth hang up."""
    starts = [[rng.randrange(vocab_size) for _ in range(rng.randint(60, 190))] for _ in range(4)]
    calls = []
    for number in range(count):
        start = rng.choice(starts) if rng.random() < 0.5 else []
        start = start[: rng.randint(1, len(start))] if start and rng.random() < 0.3 else start
        prompt = start + [rng.randrange(vocab_size) for _ in range(rng.randint(1, 60))]
        greedy = rng.random() < 0.8
        params = SamplingParams(
            temperature=0.0 if greedy else 0.8, max_tokens=rng.randint(1, 80), seed=number, ignore_eos=True
        )
        calls.append(Call(prompt, params, rng.randint(0, 30) if rng.random() < 0.2 else None))
    return calls


def drive(llm: LLM, calls: list[Call], clients: int) -> int:
    """Sends all calls, `clients` of them at once; returns how often the full queue turned one away."""
    pending, refused = list(reversed(calls)), 0
    active: list[Call] = []
    while pending or active:
        while pending and len(active) < clients:
            call = pending[-1]
            try:
                call.request = llm.add(call.prompt, call.params)
            except QueueFull:  # the client comes back after the step
                refused += 1
                break
            active.append(pending.pop())
        llm.step()
        for call in active:
            assert call.request is not None
            if call.patience is not None:
                call.patience -= 1
                if call.patience < 0:
                    llm.abort(call.request)
        active = [call for call in active if call.request and call.request.finish_reason is None]
    return refused


def compare(model: Decoder, calls: list[Call]) -> dict[str, Any]:
    """Complete greedy answers against those of each prompt alone."""
    alone = LLM(model, max_num_seqs=1, max_model_len=320, prefix_cache=False)
    told = {"requests": len(calls), "completed": 0, "compared": 0, "different": 0, "ties": 0}
    for call in calls:
        assert call.request is not None
        completion = call.request.output().outputs[0]
        if completion.finish_reason == "abort":
            continue
        told["completed"] += 1
        assert len(completion.token_ids) == call.params.max_tokens
        if not call.params.is_greedy:
            continue
        told["compared"] += 1
        single = alone.generate([call.prompt], call.params)[0].outputs[0].token_ids
        if completion.token_ids != single:
            pairs = zip(completion.token_ids, single, strict=True)
            first = next(i for i, (a, b) in enumerate(pairs) if a != b)
            gap = top_gap(model, call.prompt + single[:first])
            told["ties" if gap < TIE else "different"] += 1
    return told


@torch.inference_mode()
def top_gap(model: Decoder, tokens: list[int]) -> float:
    """Distance of the two largest logits after these tokens, from a whole forward."""
    best = model(torch.tensor([tokens])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def leaks(llm: LLM) -> dict[str, int]:
    """What an engine without work still holds; empty when it is in order."""
    cache = llm.stats()["cache"]
    held = {
        "used_pages": cache["used_pages"],
        "used_slots": cache["used_slots"],
        "references": sum(llm.cache.pages.refs),
        "lost_pages": llm.cache.num_pages - cache["cached_pages"] - cache["free_pages"],
        "waiting": len(llm.scheduler.waiting),
        "running": len(llm.scheduler.running),
    }
    return {name: count for name, count in held.items() if count}


def cpu_s() -> float:
    """Seconds of CPU that this process has used."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
