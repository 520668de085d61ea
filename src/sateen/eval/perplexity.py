"""Bits per byte and perplexity of held-out documents, each read from its beginning.

Without a cache layers attend in floating point; an engine's cache measures what it serves, integers included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.data.packing import PackedBatch, pack
from sateen.data.text import Document
from sateen.data.tokenizer import Tokenizer
from sateen.engine.cache.kv_cache import KVCache
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences


@dataclass(frozen=True)
class Perplexity:
    """What a model pays for a text.

    Attributes:
        bits_per_byte: total bits over the text's UTF-8 bytes; comparable across tokenizers.
        perplexity: exp of the mean natural-log loss per token; comparable for one tokenizer only.
        num_tokens: predicted tokens.
        num_bytes: bytes of the text.
    """

    bits_per_byte: float
    perplexity: float
    num_tokens: int
    num_bytes: int


def windows(ids: list[int], context: int) -> list[tuple[list[int], int]]:
    """Pieces of at most `context` input tokens, each with the number of its first scored prediction.

    Pieces after the first begin half a context earlier than what they score, so that every token but the
    first few is predicted with at least half a context before it.
    """
    total = len(ids) - 1
    pieces, scored = [], 0
    while scored < total:
        start = 0 if scored == 0 else scored - context // 2
        stop = min(start + context, total)
        pieces.append((ids[start : stop + 1], scored - start))
        scored = stop
    return pieces


@torch.inference_mode()
def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    *,
    context: int,
    tokens_per_batch: int = 8192,
    cache: KVCache | None = None,
) -> Perplexity:
    """The model's bits per byte on these documents; each is preceded by the end-of-text token.

    Args:
        context: longest input, in tokens.
        tokens_per_batch: tokens of one forward; bounds memory.
        cache: an idle engine's; keys and values then go through it, in its dtype and its form of attention.
    """
    if cache is not None:
        context = min(context, cache.max_model_len)
    num_bytes = 0
    pieces: list[tuple[list[int], int]] = []
    for document in documents:
        num_bytes += len(document.text.encode())
        pieces += windows([tokenizer.eos_id, *tokenizer.encode(document.text)], context)
    nats, count = 0.0, 0
    waiting: list[tuple[list[int], int]] = []
    for piece in [*pieces, None]:
        if waiting and (piece is None or not _fits([*waiting, piece], tokens_per_batch, cache)):
            batch = _batch(waiting)
            nats += _nats(model, batch, cache)
            count += int((batch.labels >= 0).sum())
            waiting = []
        if piece is not None:
            waiting.append(piece)
    return Perplexity(nats / math.log(2) / num_bytes, math.exp(nats / count), count, num_bytes)


def _batch(pieces: list[tuple[list[int], int]]) -> PackedBatch:
    labels = [[-100] * first + ids[1 + first :] for ids, first in pieces]
    return pack([ids[:-1] for ids, _ in pieces], labels)


def _fits(pieces: list[tuple[list[int], int]], most_tokens: int, cache: KVCache | None) -> bool:
    """Whether one forward may take these pieces."""
    if sum(len(ids) for ids, _ in pieces) > most_tokens:
        return False
    if cache is None:
        return True
    pages = sum(cache.pages_for(len(ids) - 1) for ids, _ in pieces)
    return len(pieces) <= cache.num_free_slots and pages <= cache.num_free_pages


def _hidden(model: Decoder, batch: PackedBatch, cache: KVCache | None) -> Tensor:
    seq = Sequences(batch.cu_seqlens, batch.position_ids)
    if cache is None:
        return model.trunk(batch.input_ids, seq)
    counts = batch.cu_seqlens.diff().tolist()
    entries = [cache.open(count) for count in counts]
    try:
        for entry, count in zip(entries, counts, strict=True):
            assert cache.reserve(entry, count)
        return model.trunk(batch.input_ids, seq, cache.forward(entries, counts))
    finally:
        for entry in entries:
            cache.free(entry)


def _nats(model: Decoder, batch: PackedBatch, cache: KVCache | None) -> float:
    batch = batch.to(model.device)
    hidden = _hidden(model, batch, cache)
    normed, total = model.head_input(hidden), 0.0
    for start in range(0, batch.num_tokens, 1024):
        rows = slice(start, start + 1024)
        logits = model.logits(normed[rows]).float()
        total += F.cross_entropy(logits, batch.labels[rows], ignore_index=-100, reduction="sum").item()
    return total
