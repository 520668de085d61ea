"""The demo's measurements: both models on held-out text and tasks, their caches, drafts and speed."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sateen.checkpoint.hf import load_model
from sateen.data.tasks import Recall, Sums, Task
from sateen.data.text import Document, python_docs, split_heldout
from sateen.data.token_file import TokenFile
from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.eval.baselines import baselines
from sateen.eval.perplexity import perplexity
from sateen.eval.speculative import acceptance, decode_speed, speed_row
from sateen.eval.tasks import evaluate_task
from sateen.models.decoder import count_parameters
from sateen.receipt import Receipt, hardware, versions, write_atomically

SUMS, RECALLS, PROMPTS = 500, 200, 32
TEMPERATURE = 0.8


def evaluate(folder: Path, settings: dict[str, Any]) -> None:
    """Writes `evaluation.json`, `receipt.json` and `RECEIPT.md` into the demo's folder and the model's."""

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    train_docs, heldout = split_heldout(python_docs())
    models: dict[str, Any] = {}
    for name in ("hybrid", "twin"):
        say(f"evaluating {name}")
        models[name] = measure(folder / name, train_docs, heldout)
    say("measuring gzip, xz, unigram and bigram on the same text")
    data, tokenizer = folder / "hybrid" / "data", Tokenizer.load(folder / "hybrid" / "model")
    tables = baselines(
        TokenFile(data / "docs"),
        TokenFile(data / "docs-heldout"),
        [d.text for d in heldout],
        tokenizer.token_bytes,
    )
    evaluation = {
        "minutes": settings["minutes"],
        "models": models,
        "baselines": tables,
        "worse": worse(models["hybrid"], models["twin"]),
        "commands": [
            f"sateen demo --minutes {settings['minutes']:g} --fresh",
            f"sateen eval {folder}",
        ],
    }
    write_atomically(folder / "evaluation.json", json.dumps(evaluation, indent=1) + "\n")
    receipt(folder, evaluation)


def measure(run: Path, train_docs: list[Document], heldout: list[Document]) -> dict[str, Any]:
    """One model's section of `evaluation.json`."""
    model = load_model(run)
    tokenizer = Tokenizer.load(run / "model")
    context = model.config.max_position_embeddings
    text = perplexity(model, tokenizer, heldout, context=context)
    plain = LLM(run, draft="none", max_num_seqs=32)
    drafting = LLM(run, draft="mtp", max_num_seqs=32)
    window = max((spec.window or 0 for spec in model.config.specs), default=0) or 64
    # Further than three stacked windows reach, so that only full attention can carry the value.
    tasks = _tasks(tokenizer, 4 * window, [d.text for d in train_docs])
    results = {
        name: evaluate_task(plain, task, n=n, seed=1).as_receipt() for name, (task, n) in tasks.items()
    }
    prompts = _prompts(tokenizer, heldout)
    sampled = SamplingParams(temperature=TEMPERATURE, max_tokens=64)
    greedy = SamplingParams(temperature=0.0, max_tokens=64)
    single, single_drafting = (
        LLM(run, draft=draft, max_num_seqs=1, max_model_len=context) for draft in ("none", "mtp")
    )
    with_drafts, without = decode_speed(single_drafting, single, prompts, sampled)
    return {
        "parameters": count_parameters(model),
        "layers": [
            {
                "index": s.index,
                "attention": s.attention,
                "window": s.window,
                "mlp": "moe" if s.moe else "dense",
            }
            for s in model.config.specs
        ],
        "quality": {"bits_per_byte": text.bits_per_byte, "perplexity": text.perplexity, "tasks": results},
        "kv": _kv(single_drafting, context),
        "draft": {
            "sampled": vars(acceptance(drafting, prompts, sampled)),
            "greedy": vars(acceptance(drafting, prompts, greedy)),
        },
        "speed": [speed_row("decode, drafts", with_drafts), speed_row("decode, no draft", without)],
        "samples": _samples(plain, tokenizer, prompts, tasks),
        **_training(run),
    }


def _tasks(tokenizer: Tokenizer, distance: int, filler: list[str]) -> dict[str, tuple[Task, int]]:
    count: Callable[[str], int] = lambda text: len(tokenizer.encode(text))  # noqa: E731
    return {
        "sums": (Sums(is_heldout=True), SUMS),
        "recall": (Recall(count_tokens=count, distance=distance), RECALLS),
    }


def _prompts(tokenizer: Tokenizer, heldout: list[Document]) -> list[list[int]]:
    """Beginnings of held-out passages, 48 tokens each, drawn over all documents by length."""
    rng = random.Random(2)
    encoded = [ids for d in heldout if len(ids := tokenizer.encode(d.text)) > 128]
    chosen = rng.choices(encoded, weights=[len(ids) for ids in encoded], k=PROMPTS)
    starts = [rng.randrange(len(ids) - 112) for ids in chosen]
    return [ids[start : start + 48] for ids, start in zip(chosen, starts, strict=True)]


def _kv(llm: LLM, context: int) -> dict[str, Any]:
    """Allocated cache bytes for one sequence of the model's own context, MTP heads included."""
    layers = [
        {"index": row["layer"], "layer_kind": row["layer_kind"], "bytes": row["bytes"]}
        for row in llm.allocated_layers()
    ]
    total = sum(layer["bytes"] for layer in layers)
    return {"context": context, "layers": layers, "bytes": total, "bytes_per_token": total / context}


def _samples(
    llm: LLM, tokenizer: Tokenizer, prompts: list[list[int]], tasks: dict[str, tuple[Task, int]]
) -> list[Any]:
    rng = random.Random(3)
    rows = []
    texts = llm.generate(prompts[:4], SamplingParams(temperature=TEMPERATURE, max_tokens=96, seed=0))
    for prompt, output in zip(prompts, texts, strict=False):
        rows.append(("continued text", tokenizer.decode(prompt), output.outputs[0].text))
    for name, (task, _) in tasks.items():
        for _ in range(2):
            example = task.sample(rng)
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": example.prompt}], add_generation_prompt=True
            )
            output = llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=48))[0]
            rows.append((f"{name} (answer {example.answer})", example.prompt, output.outputs[0].text))
    return [{"kind": kind, "prompt": prompt, "completion": completion} for kind, prompt, completion in rows]


def _training(run: Path) -> dict[str, Any]:
    stages = json.loads((run / "progress.json").read_text())["done"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {"train_tokens": lines[-1]["tokens"], "train_s": sum(stage["wall_s"] for stage in stages)}


def worse(hybrid: dict[str, Any], twin: dict[str, Any]) -> list[dict[str, Any]]:
    """What the hybrid does worse than its full-attention twin, and where drafts do not pay."""
    rows = []
    if hybrid["quality"]["bits_per_byte"] > twin["quality"]["bits_per_byte"]:
        rows.append(("bits per byte", twin["quality"]["bits_per_byte"], hybrid["quality"]["bits_per_byte"]))
    for name, result in hybrid["quality"]["tasks"].items():
        before = twin["quality"]["tasks"][name]["accuracy"]
        if result["accuracy"] < before:
            rows.append((f"{name} accuracy", before, result["accuracy"]))
    speed = {row["what"]: row["median"] for row in hybrid["speed"]}
    if speed["decode, drafts"] < speed["decode, no draft"]:
        rows.append(("decode tokens/s with drafts", speed["decode, no draft"], speed["decode, drafts"]))
    return [{"what": what, "before": before, "after": after} for what, before, after in rows]


def receipt(folder: Path, evaluation: dict[str, Any]) -> None:
    """The demo's receipt, in its folder and beside the hybrid's weights."""
    hybrid, twin = evaluation["models"]["hybrid"], evaluation["models"]["twin"]
    by_kind: dict[str, list[int]] = {}
    for layer in hybrid["kv"]["layers"]:
        by_kind.setdefault(layer["layer_kind"], []).append(layer["bytes"])
    context = hybrid["kv"]["context"]
    weights = sum(f.stat().st_size for f in (folder / "hybrid" / "model").resolve().glob("*.safetensors"))
    written = Receipt(
        source=Receipt.read(folder / "hybrid").source,
        seeds=Receipt.read(folder / "hybrid").seeds | {"tasks": 1, "prompts": 2},
        hardware=hardware(),
        versions=versions(),
        quality={**hybrid["quality"], "baselines": evaluation["baselines"], "twin": twin["quality"]},
        bytes={
            "weights": weights,
            "kv_bytes_per_token": [
                {
                    "layer_kind": kind,
                    "num_layers": len(sizes),
                    "context": context,
                    "bytes": sum(sizes) / context,
                }
                for kind, sizes in by_kind.items()
            ],
            "kv_allocated": [{"context": context, "bytes": hybrid["kv"]["bytes"]}],
        },
        speed=hybrid["speed"],
        draft={
            key: hybrid["draft"]["sampled"][key] for key in ("acceptance_length", "acceptance_by_position")
        },
        worse=evaluation["worse"],
        commands=evaluation["commands"],
    )
    written.write(folder / "hybrid" / "model")
    written.write(folder)
