"""Log-probabilities of whole sequences: packed forwards without caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences

SCORE_NUMBERS = 1 << 24  # logits held at once


def score(model: Decoder, sequences: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[float]]:
    """The raw log-probabilities of all tokens but the first of each sequence.

    Args:
        max_tokens: of one forward, but for a sequence that is longer and has its own.
    """
    groups: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room:
            groups.append([])
            room = max(max_tokens, len(sequence))
        groups[-1].append(sequence)
        room -= len(sequence)
    return [scores for group in groups for scores in _score(model, group)]


@torch.inference_mode()
def _score(model: Decoder, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """As `score`, in one forward."""
    ids = torch.tensor([token for sequence in sequences for token in sequence], device=model.device)
    lengths = [len(sequence) for sequence in sequences]
    seq = Sequences.of_lengths(lengths, model.device)
    normed = model.head_input(model.trunk(ids, seq))
    labels = ids.roll(-1)
    chunk = max(1, SCORE_NUMBERS // model.config.vocab_size)
    parts = []
    for start in range(0, len(ids), chunk):
        logits = model.logits(normed[start : start + chunk]).float()
        y = labels[start : start + chunk]
        parts.append(logits.gather(-1, y[:, None]).squeeze(-1) - logits.logsumexp(-1))
    flat = torch.cat(parts).tolist()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [flat[end - length : end - 1] for end, length in zip(ends, lengths, strict=True)]
