"""The receipt of an evaluated engine: its quality, beside floating point too, and its bytes."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sateen.data.text import Document
from sateen.engine.engine import LLM
from sateen.errors import ConfigError
from sateen.eval.perplexity import perplexity
from sateen.receipt import JSON_NAME, Receipt, hardware, versions

KIND = "evaluated model"  # of a receipt's source


def text_quality(llm: LLM, documents: Iterable[Document], *, is_cached: bool) -> dict[str, Any]:
    """Perplexity and bits per byte in a receipt's words; with a `twin` where they go through the caches.

    Args:
        llm: an idle engine with a tokenizer.
        documents: held-out text.
        is_cached: the text goes through the engine's caches. The twin is the same model in floating point
            without caches.
    """
    assert llm.tokenizer is not None
    documents = list(documents)
    context = llm.max_model_len if is_cached else llm.model.config.max_position_embeddings
    found = []
    for cache in (llm.cache, None) if is_cached else (None,):
        result = perplexity(llm.model, llm.tokenizer, documents, context=context, cache=cache)
        found.append({"bits_per_byte": result.bits_per_byte, "perplexity": result.perplexity})
    return found[0] | ({"twin": found[1]} if is_cached else {})


def check_folder(folder: str | Path) -> Path:
    """The folder that a receipt shall be written to; it is made where it is missing.

    Raises:
        ConfigError: another kind of receipt is there, which training or the demo wrote.
    """
    path = Path(folder)
    if (path / JSON_NAME).is_file() and Receipt.read(path).source.get("kind") != KIND:
        raise ConfigError(f"{path} has a receipt of another kind; give --receipt a folder of its own")
    path.mkdir(parents=True, exist_ok=True)
    return path


def receipt_of(
    llm: LLM, model: str, quality: Mapping[str, Any], *, seed: int, command: Iterable[str]
) -> Receipt:
    """What was measured of an engine, the bytes of its weights, and of one sequence as long as it takes.

    Args:
        llm: the engine.
        model: what it was loaded from.
        quality: in a receipt's words.
        seed: of the task examples.
        command: the words that measure it again.
    """
    twin = quality.get("twin", {})
    worse = [
        {"what": key.replace("_", " "), "before": twin[key], "after": quality[key]}
        for key in twin
        if quality[key] > twin[key]
    ]
    context = llm.max_model_len
    tensors = {x.data_ptr(): x for x in llm.model.state_dict().values()}
    return Receipt(
        source={"kind": KIND, "path": model, "sha256": _sha256(Path(model))},
        seeds={"tasks": seed},
        hardware=hardware(),
        versions=versions(),
        quality=dict(quality),
        bytes={
            "weights": sum(x.nbytes for x in tensors.values()),
            "kv_allocated": [{"context": context, "bytes": sum(llm.kv_bytes(context).values())}],
        },
        worse=worse,
        commands=[shlex.join(command)],
    )


def _sha256(model: Path) -> str | None:
    """Of all weight files, in the order of their names; None for what is no file, such as a preset."""
    folder = model / "model" if (model / "model").is_dir() else model
    files = [model] if model.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    whole = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: whole)
    return whole.hexdigest()
