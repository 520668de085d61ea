"""Accuracy on tasks whose answers a program checks, asked through the engine."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

from sateen.data.tasks import Example, Task
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import ConfigError


@dataclass(frozen=True)
class TaskResult:
    """How often a model answered correctly.

    Attributes:
        accuracy: share of correct answers.
        n: questions asked.
        chance: share that guessing would get.
        wrong: up to three wrong answers as (prompt, output, answer).
    """

    accuracy: float
    n: int
    chance: float
    wrong: list[tuple[str, str, str]]

    def as_receipt(self) -> dict[str, float | int]:
        """The keys a receipt holds."""
        return {key: value for key, value in asdict(self).items() if key != "wrong"}


def evaluate_task(
    llm: LLM, task: Task, *, n: int, seed: int, max_tokens: int | None = None, is_chat: bool | None = None
) -> TaskResult:
    """The greedy accuracy on `n` examples drawn with `seed`.

    Args:
        max_tokens: of an answer; the task's own when None.
        is_chat: ask as a user turn in the tokenizer's template; otherwise the prompt is the bare text behind
            the end-of-text token. The task's own way when None.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError("tasks are asked in text, and this model has no tokenizer; save one beside it")
    is_chat = task.is_chat if is_chat is None else is_chat
    rng = random.Random(seed)
    examples = [task.sample(rng) for _ in range(n)]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": e.prompt}], add_generation_prompt=True)
        if is_chat
        else [tokenizer.eos_id, *tokenizer.encode(e.prompt)]
        for e in examples
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens or task.max_tokens))
    texts = [output.outputs[0].text for output in outputs]
    verdicts = [task.check(text, example) for text, example in zip(texts, examples, strict=True)]
    return TaskResult(sum(verdicts) / n, n, task.chance, _wrong(examples, texts, verdicts))


def _wrong(examples: list[Example], texts: list[str], verdicts: list[bool]) -> list[tuple[str, str, str]]:
    rows = zip(examples, texts, verdicts, strict=True)
    return [(e.prompt, text, e.answer) for e, text, is_right in rows if not is_right][:3]
