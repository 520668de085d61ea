"""What drafts are worth: acceptance, repetition and decode speed with and without them."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sateen.engine.engine import LLM
from sateen.engine.request import RequestOutput, SamplingParams


@dataclass(frozen=True)
class Acceptance:
    """How far drafts carry.

    Attributes:
        temperature: of sampling; 0 is greedy.
        acceptance_length: tokens emitted per pass of the main model, bonus token included.
        acceptance_by_position: share of rounds in which the draft at each position was accepted.
        repetition_4gram: share of 4-grams in the outputs that repeat an earlier one of the same output; a
            repetitive text is easy to draft, so the two belong together.
    """

    temperature: float
    acceptance_length: float
    acceptance_by_position: list[float]
    repetition_4gram: float


def repetition(sequences: Sequence[Sequence[int]], n: int = 4) -> float:
    """Share of n-grams that occurred earlier in their own sequence; 0 when no sequence has one."""
    total = repeated = 0
    for tokens in sequences:
        grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        total += sum(grams.values())
        repeated += sum(count - 1 for count in grams.values())
    return repeated / total if total else 0.0


def acceptance(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Acceptance:
    """Acceptance over these prompts, `llm` drafting with the model's own heads."""
    outputs = llm.generate(prompts, [replace(params, seed=i) for i in range(len(prompts))])
    drafts = [output.outputs[0].draft for output in outputs]
    rounds = sum(d.rounds for d in drafts)
    width = max((len(d.accepted) for d in drafts), default=0)
    by_position = [sum(d.accepted[k] for d in drafts if k < len(d.accepted)) / rounds for k in range(width)]
    emitted = sum(d.emitted for d in drafts)
    tokens = [output.outputs[0].token_ids for output in outputs]
    return Acceptance(
        params.temperature, emitted / rounds if rounds else 1.0, by_position, repetition(tokens)
    )


def decode_speed(
    with_drafts: LLM, without: LLM, prompts: list[list[int]], params: SamplingParams, *, pairs: int = 9
) -> tuple[list[float], list[float]]:
    """Tokens per second of both engines, measured in turn, one figure each per pair."""
    for llm in (with_drafts, without):
        llm.generate(prompts[:1], params)
    speeds: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs):
        prompt = [prompts[i % len(prompts)]]
        for llm, figures in zip((with_drafts, without), speeds, strict=True):
            start = time.perf_counter()
            outputs: list[RequestOutput] = llm.generate(prompt, params)
            figures.append(len(outputs[0].outputs[0].token_ids) / (time.perf_counter() - start))
    return speeds


def speed_row(what: str, figures: list[float], unit: str = "tokens/s") -> dict[str, float | int | str]:
    """A receipt's `speed` entry: median and quartiles."""
    quartiles = statistics.quantiles(figures, n=4, method="inclusive")
    return {
        "what": what,
        "unit": unit,
        "median": quartiles[1],
        "p25": quartiles[0],
        "p75": quartiles[2],
        "n": len(figures),
    }
