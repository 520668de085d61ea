"""The quality part of `int8_attention.py`: what held-out text costs with integers in the attention."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _engine_inputs import held_out
from _pairs import limit, line
from torch import Tensor

from sateen.checkpoint.hf import load_model
from sateen.data.tokenizer import Tokenizer
from sateen.engine.cache.kv_cache import PAGE, KVCache
from sateen.engine.int8_layers import BUDGET, PROBE_TEXT, choose_layers
from sateen.engine.native.step import NativeStep
from sateen.models.decoder import Decoder
from sateen.nn.attention import LayerLinks, Sequences

CONTEXT = 2048
STEPS = 512  # the last tokens of a text, one by one
FULL_BAR, HALF_BAR = 0.5, 0.1  # percent that perplexity may rise
ROWS = 256  # of logits at once

# what runs: attention, dtype of the rows
FORMS = {
    "float attention, float32 rows": ("float", torch.float32),
    "float attention, bfloat16 rows": ("float", torch.bfloat16),
    "float attention, int8 rows": ("float", torch.int8),
    "full INT8, float32 rows": ("int8", torch.float32),
    "full INT8, int8 rows": ("int8", torch.int8),
    "half INT8, float32 rows": ("int8-half", torch.float32),
    "half INT8, int8 rows": ("int8-half", torch.int8),
}
BARS = {
    "full INT8, float32 rows": FULL_BAR,
    "full INT8, int8 rows": FULL_BAR,
    "half INT8, float32 rows": HALF_BAR,
}


class Read(NamedTuple):
    """Of the tokens that were read: how unlikely each was, and the likeliest in its place."""

    losses: Tensor
    greedy: Tensor


def make_cache(model: Decoder, form: tuple[str, torch.dtype]) -> KVCache:
    layouts = model.config.kv_layouts()[: model.config.num_hidden_layers]
    return KVCache(
        layouts, num_trunk_layers=len(layouts), num_pages=CONTEXT // PAGE, num_slots=1, max_model_len=CONTEXT,
        dtype=form[1], attention=form[0],
    )  # fmt: skip


def read(
    model: Decoder,
    ids: list[int],
    form: tuple[str, torch.dtype],
    float_layers: frozenset[int],
    num_steps: int,
) -> Read:
    """One text through a cache: in one piece, but for the last `num_steps` tokens, natively one by one."""
    cache = make_cache(model, form)
    cache.float_layers = float_layers
    entry = cache.open()
    assert cache.reserve(entry, len(ids))
    count = len(ids) - num_steps
    hidden = [
        model.trunk(torch.tensor(ids[:count]), Sequences.of_lengths([count]), cache.forward([entry], [count]))
    ]
    step = NativeStep(model, cache) if num_steps else None
    for token in ids[count:]:
        assert step is not None
        hidden.append(step.trunk([token], cache.forward([entry], [1]), LayerLinks()))
    targets, losses, greedy = torch.tensor(ids[1:]), [], []
    for x, following in zip(torch.cat(hidden)[:-1].split(ROWS), targets.split(ROWS), strict=True):
        logits = model.logits(model.head_input(x)).float()
        losses.append(torch.nn.functional.cross_entropy(logits, following, reduction="none"))
        greedy.append(logits.argmax(-1))
    return Read(torch.cat(losses).double(), torch.cat(greedy))


@torch.inference_mode()
def quality(path: Path | None) -> list[dict[str, Any]]:
    """Perplexity, its rise, and how often the likeliest token is the float model's; none without a model."""
    if path is None:
        return []
    model = load_model(path, dtype="float32").eval()
    tokenizer = Tokenizer.load(path)
    probe = tokenizer.encode(PROBE_TEXT)
    texts = [ids[:CONTEXT] for text in held_out().values() if len(ids := tokenizer.encode(text)) >= CONTEXT]
    rows = compare(model, probe, texts, list(FORMS), 0)
    return rows + compare(
        model,
        probe,
        texts[:2],
        ["float attention, float32 rows", "float attention, int8 rows", "full INT8, int8 rows"],
        STEPS,
    )


def compare(
    model: Decoder, probe: list[int], texts: list[list[int]], names: list[str], num_steps: int
) -> list[dict[str, Any]]:
    first, rows = names[0], []
    found: dict[str, list[Read]] = {}
    for name in names:
        choose_layers(model, probed := make_cache(model, FORMS[name]), probe, BUDGET)
        found[name] = [read(model, ids, FORMS[name], probed.float_layers, num_steps) for ids in texts]
        if num_steps:
            found[name] = [Read(one.losses[-num_steps:], one.greedy[-num_steps:]) for one in found[name]]
        losses, want = (torch.cat([one.losses for one in found[key]]) for key in (name, first))
        agreed = torch.cat([one.greedy for one in found[name]]) == torch.cat(
            [one.greedy for one in found[first]]
        )
        rise = math.expm1(float((losses - want).mean())) * 100
        error = float((losses - want).std() / len(losses) ** 0.5) * 100
        how = (
            f"the last {num_steps} of {CONTEXT} tokens one by one"
            if num_steps
            else f"{CONTEXT} tokens in one piece"
        )
        row: dict[str, Any] = {
            "form": name, "how": how, "texts": len(texts),
            "perplexity": round(math.exp(float(losses.mean())), 4),
            "rise_percent": round(rise, 4), "standard_error_percent": round(error, 4),
            "same_greedy_percent": round(100 * float(agreed.double().mean()), 2),
        }  # fmt: skip
        if name in BARS:
            row["limit"] = limit(
                f"{name}, {how}: rise of perplexity", max(rise, 0.0), BARS[name], unit="percent"
            )
            print(line(row["limit"]), file=sys.stderr)
        print(f"    {row}", file=sys.stderr, flush=True)
        rows.append(row)
    return rows
