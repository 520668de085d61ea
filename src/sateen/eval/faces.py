"""`sateen eval MODEL`: perplexity and checked tasks of one model, in a receipt's words."""

from __future__ import annotations

import inspect
import json as codec
import sys
from collections.abc import Sequence
from typing import Any

from sateen.data.facts import LongTask
from sateen.data.long_context import long_task
from sateen.data.tasks import Task, task_class
from sateen.data.text import Document, python_docs, split_heldout, text_dir
from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.int8_layers import BUDGET
from sateen.errors import ConfigError
from sateen.eval import audio_faces
from sateen.eval.served import check_folder, receipt_of, text_quality
from sateen.eval.tasks import evaluate_task

PERPLEXITY = "perplexity"


def main(
    model: str,
    *,
    tasks: Sequence[str] = (PERPLEXITY,),
    text: str | None = None,
    num_examples: int = 200,
    seed: int = 0,
    length: Sequence[int] = (),
    lm_eval: Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    attention: str = "auto",
    kv_cache_dtype: str = "auto",
    int8_budget: float = BUDGET,
    receipt: str | None = None,
    json: bool = False,
) -> int:
    """Prints what was measured and returns the exit code.

    Args:
        model: what `load_model` takes.
        tasks: `perplexity`, and names of verifiable tasks; or `audio` alone, for a run folder on speech.
        text: file or folder for the perplexity; the Python documentation that `python_docs` sources hold
            out when None.
        num_examples: questions per task.
        seed: of the questions.
        length: tokens of the questions of `needle`, `multikey`, `vt` and `cwe`; several make rows such as
            `needle@1024`. 1024 where the model reads as many.
        lm_eval: tasks of lm-evaluation-harness, instead of ours.
        limit, num_fewshot, include_path: see `sateen.eval.lm_eval.evaluate`.
        attention, kv_cache_dtype, int8_budget: as of `LLM`. With other forms than `auto` texts go through the
            engine's caches, and what floating point gets without them is measured too, as the `twin`.
        receipt: a folder for `receipt.json` and `RECEIPT.md`; none is written when None.
        json: print JSON with the keys of a receipt's `quality`, or the harness's results.

    Raises:
        ConfigError: a task is unknown, there is no text to read, the model has no tokenizer, or the harness
            is not installed; or `receipt` is a folder with another kind of receipt.
    """
    engine: dict[str, Any] = {
        "attention": attention,
        "kv_cache_dtype": kv_cache_dtype,
        "int8_budget": int8_budget,
    }
    is_plain = attention == kv_cache_dtype == "auto"
    if receipt is not None and (lm_eval or audio_faces.AUDIO in tasks):
        raise ConfigError("--receipt is for perplexity and verifiable tasks, not for --lm-eval or audio")
    if lm_eval:
        return _harness(
            model, lm_eval, json=json, limit=limit, num_fewshot=num_fewshot, include_path=include_path,
            **engine,
        )  # fmt: skip
    if (limit, num_fewshot, include_path) != (None, None, None):
        raise ConfigError("--limit, --num-fewshot and --include-path go with --lm-eval")
    if audio_faces.AUDIO in tasks:
        if len(tasks) > 1:
            raise ConfigError("--tasks audio stands alone: it measures speech, the others text")
        if not is_plain:
            raise ConfigError("--attention and --kv-cache-dtype are not for --tasks audio")
        return audio_faces.main(model, json=json)
    classes = {name: task_class(name) for name in tasks if name != PERPLEXITY}
    folder = None if receipt is None else check_folder(receipt)
    llm = LLM(model, draft="none", max_num_seqs=32, **engine)
    if llm.tokenizer is None:
        raise ConfigError(
            f"{model} has no tokenizer, and what is measured is text; save one beside the model"
        )
    quality: dict[str, Any] = {}
    if PERPLEXITY in tasks:
        documents = _documents(text)
        if not any(document.text for document in documents):
            raise ConfigError(f"{text or 'the Python documentation'} has no text to measure perplexity on")
        _talk(f"perplexity on {text or 'held-out Python documentation'}: {len(documents)} documents")
        quality |= text_quality(llm, documents, is_cached=not is_plain)
    haystack = _haystack(text) if any(issubclass(cls, LongTask) for cls in classes.values()) else []
    for name, cls in classes.items():
        for label, size in _lengths(name, cls, length, llm):
            _talk(f"{label}: {num_examples} examples, greedy")
            task = make_task(cls, llm.tokenizer, _distance(llm), haystack, size)
            result = evaluate_task(llm, task, n=num_examples, seed=seed)
            quality.setdefault("tasks", {})[label] = result.as_receipt()
    if (int8 := llm.stats()["int8_attention"]) is not None:
        quality["int8_attention"] = int8
    if folder is not None:
        lengths = ["--length", ",".join(map(str, length))] if length else []
        texts = ["--text", text] if text else []
        command = (
            "sateen", "eval", model, "--tasks", ",".join(tasks), *texts, *lengths,
            "--num-examples", str(num_examples), "--seed", str(seed), "--attention", attention,
            "--kv-cache-dtype", kv_cache_dtype, "--int8-budget", f"{int8_budget:g}",
        )  # fmt: skip
        receipt_of(llm, model, quality, seed=seed, command=command).write(folder)
    print(codec.dumps(quality, indent=2) if json else "\n".join(lines(quality)))
    return 0


def _harness(model: str, tasks: Sequence[str], *, json: bool, **settings: Any) -> int:
    """Prints the harness's table, or its results as JSON, and returns the exit code."""
    try:
        from lm_eval.utils import make_table

        from sateen.eval.lm_eval import evaluate
    except ModuleNotFoundError as error:
        raise ConfigError(f"--lm-eval needs the harness ({error}); pip install 'sateen[lm-eval]'") from None
    results = evaluate(model, tasks, max_num_seqs=16, **settings)
    print(codec.dumps(results["results"], indent=2, default=str) if json else make_table(results))
    return 0


def make_task(
    cls: type[Task], tokenizer: Tokenizer, distance: int, haystack: Sequence[str] = (), length: int = 1024
) -> Task:
    """A task on held-out examples, with the arguments that its class takes.

    Args:
        cls: the task's class.
        tokenizer: measures lengths.
        distance: tokens that a recall task puts between a fact and its question.
        haystack: documents around the questions of a task over long contexts.
        length: tokens of those questions and their answers.
    """
    if issubclass(cls, LongTask):
        return long_task(cls, tokenizer, haystack, is_heldout=True, length=length)
    offered = {
        "is_heldout": True,
        "count_tokens": lambda text: len(tokenizer.encode(text)),
        "distance": distance,
    }
    accepted = inspect.signature(cls).parameters
    return cls(**{name: value for name, value in offered.items() if name in accepted})


def _documents(text: str | None) -> list[Document]:
    return list(text_dir(text)) if text else split_heldout(python_docs())[1]


def _haystack(text: str | None) -> list[str]:
    return [document.text for document in _documents(text)]


def _lengths(name: str, cls: type[Task], asked: Sequence[int], llm: LLM) -> list[tuple[str, int]]:
    """`(label, tokens)` of every row of a task.

    Raises:
        ConfigError: the model reads no text that long.
    """
    if not issubclass(cls, LongTask):
        return [(name, 0)]
    longest = llm.model.config.max_position_embeddings - cls.max_tokens
    if asked and max(asked) > longest:
        raise ConfigError(f"--length {max(asked)}: {name} fits at most {longest} tokens into this model")
    sizes = list(asked) or [min(1024, longest)]
    return [(name if len(sizes) == 1 else f"{name}@{size}", size) for size in sizes]


def lines(quality: dict[str, Any]) -> list[str]:
    """The measurements for people, one a line."""
    twin = quality.get("twin", {})
    plain = [
        f"{key.replace('_', ' '):<15}{quality[key]:.4f}"
        + (f" ({twin[key]:.4f} in floating point)" if twin else "")
        for key in ("bits_per_byte", "perplexity")
        if key in quality
    ]
    if int8 := quality.get("int8_attention"):
        largest = max(int8["errors"].values())
        plain += [
            f"{int8['attention']} attention errs at most {largest:.4f} in a layer, budget {int8['budget']:g}",
            f"layers in floating point: {', '.join(int8['float_layers']) or 'none'}",
        ]
    return plain + [
        f"{name:<15}{task['accuracy']:.1%} of {task['n']} (chance {task['chance']:.1%})"
        for name, task in quality.get("tasks", {}).items()
    ]


def _distance(llm: LLM) -> int:
    """Twice the widest window, so that sliding layers alone cannot answer."""
    return 2 * max((spec.window or 0 for spec in llm.model.config.specs), default=0) or 64


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
