"""What `int8_attention.py` measures errors on: random queries, keys and values, and a model's own."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sateen import ops
from sateen.checkpoint.hf import load_model
from sateen.data.tokenizer import Tokenizer
from sateen.nn.attention import full

HEADS, CHANNELS, TOKENS = 4, 64, 1024
CAPTURED_LAYERS = 5  # of a model, evenly from its first to its last

QKV = tuple[Tensor, Tensor, Tensor]


def normal(N: int, generator: torch.Generator) -> QKV:
    q, k, v = (torch.randn(1, HEADS, N, CHANNELS, generator=generator) for _ in range(3))
    return q, k, v


def uniform(N: int, generator: torch.Generator) -> QKV:
    q, k, v = (torch.rand(1, HEADS, N, CHANNELS, generator=generator) - 0.5 for _ in range(3))
    return q, k, v


def offset_keys(N: int, generator: torch.Generator) -> QKV:
    q, k, v = normal(N, generator)
    k = k + 5 * torch.randn(1, HEADS, 1, CHANNELS, generator=generator)
    return q, k, v * torch.where(torch.arange(CHANNELS) % 16 == 0, 20.0, 1.0)


def token_outliers(N: int, generator: torch.Generator) -> QKV:
    return tuple(
        x * torch.where(torch.arange(N) % 128 == 5, 10.0, 1.0)[:, None] for x in normal(N, generator)
    )  # type: ignore[return-value]


INPUTS: dict[str, tuple[str, Callable[[int, torch.Generator], QKV]]] = {
    "normal": ("N(0, 1)", normal),
    "uniform": ("U(-0.5, 0.5)", uniform),
    "offset": ("N(0, 1); keys plus 5 N(0, 1) per channel, every 16th value channel times 20", offset_keys),
    "outliers": ("N(0, 1); every 128th token times 10 in q, k and v", token_outliers),
}


@torch.inference_mode()
def captured(path: Path) -> list[QKV]:
    """Queries, keys and values of some layers of a model that reads text, all once per query head."""
    model = load_model(path, dtype="float32").eval()
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = Tokenizer.load(path).encode(text)[:TOKENS]
    found: list[QKV] = []
    attend = ops.attention

    def keep(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        group = q.shape[1] // k.shape[1]
        packed = (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
        found.append(tuple(x.transpose(0, 1)[None].contiguous() for x in packed))  # type: ignore[arg-type]
        return attend(q, k, v, **options)  # type: ignore[arg-type, return-value]

    full.ops.attention = keep  # type: ignore[assignment]
    try:
        model(torch.tensor([ids]))
    finally:
        full.ops.attention = attend
    last = len(found) - 1
    return [found[last * i // (CAPTURED_LAYERS - 1)] for i in range(CAPTURED_LAYERS)]
