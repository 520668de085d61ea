"""Training speed of our step against transformers' Llama with fused AdamW, eager and compiled.

    python benchmarks/train.py --pairs 9 --out benchmarks/results/train.json

Both sides train the same shape on the same tokens with clipping and AdamW at the same settings; they run in
interleaved pairs in one process, so that a busy machine slows both; against the compiled peer ours runs with
`compile = true` too. Before any timing the two models get
equal weights and must agree on the loss and on its gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from _results import publish, quartiles, revision
from torch import nn

from sateen.config import AdamWConfig
from sateen.data.packing import PackedBatch, pack
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.receipt import hardware
from sateen.train.objective import CrossEntropy, TokenObjective
from sateen.train.optim import build_optimizer
from sateen.train.step import TrainStep
from sateen.train.text import compile_pieces

VOCAB, BATCH, LENGTH = 8192, 8, 256
SHAPES: dict[str, dict[str, int]] = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 7, "num_attention_heads": 4},
    "30M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 7, "num_attention_heads": 8},
}
OPTIMIZER = AdamWConfig(learning_rate=3e-4)

Step = Callable[[], float]


def build(shape: str) -> tuple[Decoder, nn.Module]:
    """Our model and transformers', with equal weights."""
    raw: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": LENGTH,
        **SHAPES[shape],
    }
    ours = Decoder(ModelConfig.from_hf(raw)).init_weights(0)
    settings = {k: v for k, v in raw.items() if k != "model_type"}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, use_cache=False)).train()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def tokens() -> tuple[torch.Tensor, PackedBatch]:
    """The same random sequences as a rectangle and packed."""
    ids = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    return ids, pack(ids.tolist())


def our_step(model: Decoder, batch: PackedBatch, dtype: torch.dtype, *, is_compiled: bool = False) -> Step:
    """One optimizer step of ours, as a stage with or without `compile` runs it; returns its loss."""
    if is_compiled:
        compile_pieces(model)
    step = TrainStep(
        model, [(TokenObjective(CrossEntropy()), build_optimizer(model, OPTIMIZER))], dtype=dtype
    )
    return lambda: step([batch]).metrics["loss"]


def their_step(model: nn.Module, ids: torch.Tensor, dtype: torch.dtype, *, is_compiled: bool) -> Step:
    """One optimizer step of transformers' model as its users write it; returns its loss."""
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    groups = [
        {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps, fused=True
    )
    forward: Any = torch.compile(model) if is_compiled else model

    def step() -> float:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def check_equal(shape: str) -> None:
    """Stops unless both models give the same loss and gradients in float32."""
    ours, theirs = build(shape)
    ids, batch = tokens()
    objective = TokenObjective(CrossEntropy())
    objective.begin_step([batch])
    loss = objective.loss(ours, batch).total
    other = theirs(input_ids=ids, labels=ids).loss
    loss.backward()  # type: ignore[no-untyped-call]
    other.backward()
    assert abs(loss.item() - other.item()) < 1e-5, (loss.item(), other.item())
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        error = float((p.grad - q.grad).norm() / q.grad.norm())
        assert error < 1e-4, (name, error)


def measure(shape: str, dtype: torch.dtype, is_compiled: bool, pairs: int) -> dict[str, Any]:
    """Tokens per second of both sides and the quartiles of their ratio over interleaved pairs."""
    ours, theirs = build(shape)
    ids, batch = tokens()
    sides = (
        our_step(ours, batch, dtype, is_compiled=is_compiled),
        their_step(theirs, ids, dtype, is_compiled=is_compiled),
    )
    for step in sides:
        for _ in range(2):
            step()
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        # The order alternates, so that neither side always runs on the other's warm cache.
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            began = time.perf_counter()
            sides[side]()
            times[side].append(time.perf_counter() - began)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    ratio = quartiles(ratios)
    count = BATCH * LENGTH
    return {
        "shape": shape,
        "parameters": sum(p.numel() for p in ours.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "compiled" if is_compiled else "eager",
        "pairs": pairs,
        "warmup_steps": 2,
        "ours_tokens_per_s": round(count / statistics.median(times[0])),
        "peer_tokens_per_s": round(count / statistics.median(times[1])),
        **{f"ratio_{key}": round(ratio[key], 3) for key in ("p25", "median", "p75")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"]
    )
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    results = []
    for shape in options.shapes:
        check_equal(shape)
        for dtype in options.dtypes:
            for mode in options.modes:
                result = measure(shape, getattr(torch, dtype), mode == "compiled", options.pairs)
                print(json.dumps(result), file=sys.stderr)
                results.append(result)
    document = {
        "what": "training step, tokens per second; ratio = ours / peer",
        "batch": BATCH,
        "length": LENGTH,
        "vocab_size": VOCAB,
        "hardware": {
            "cpu": hardware()["cpu"],
            "threads": torch.get_num_threads(),
            "isa": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "revision": revision(),
        "results": results,
    }
    publish(document, options.out)


if __name__ == "__main__":
    main()
