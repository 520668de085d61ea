"""How well an audio language model predicts the codes of held-out speech, beside predictors without a model.

Legend: T frames, R channels, C entries of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sateen.models.mimo_audio.lm import AudioLM
from sateen.train.code_losses import code_nats

COPY_SHARES = tuple(i / 20 for i in range(20))


def unigram_probabilities(clips: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Per channel the share of each code [C] in these clips [T, R]; every code counts once more than seen."""
    whole_TR = torch.cat(list(clips))
    counts = [torch.bincount(whole_TR[:, r], minlength=size).double() + 1 for r, size in enumerate(sizes)]
    return [count / count.sum() for count in counts]


def unigram_nats(clips: Sequence[Tensor], probabilities: Sequence[Tensor]) -> Tensor:
    """Mean nats per code of each channel [R] under fixed shares."""
    whole_TR = torch.cat(list(clips))
    return torch.stack([-p.log()[whole_TR[:, r]].mean() for r, p in enumerate(probabilities)])


def copy_nats(clips: Sequence[Tensor], probabilities: Sequence[Tensor], shares_R: Tensor) -> Tensor:
    """Mean nats per code of each channel [R] of a predictor that expects the frame before it again.

    A code has probability `share` of being the one before it, and is drawn from the unigram otherwise; a
    clip's first frame is drawn from the unigram.
    """
    sums, count = torch.zeros(len(probabilities), dtype=torch.float64), 0
    for codes_TR in clips:
        for r, p in enumerate(probabilities):
            code_T, share = codes_TR[:, r], float(shares_R[r])
            mixed_T = (1 - share) * p[code_T[1:]] + share * (code_T[1:] == code_T[:-1])
            sums[r] -= p[code_T[0]].log() + mixed_T.log().sum()
        count += len(codes_TR)
    return sums / count


def best_copy_shares(clips: Sequence[Tensor], probabilities: Sequence[Tensor]) -> Tensor:
    """The share of each channel [R], in steps of 0.05, under which these clips cost least."""
    channels = len(probabilities)
    tried = torch.stack(
        [copy_nats(clips, probabilities, torch.full((channels,), share)) for share in COPY_SHARES]
    )
    return torch.tensor(COPY_SHARES, dtype=torch.float64)[tried.argmin(0)]


def code_prediction(
    model: AudioLM, train: Sequence[Tensor], heldout: Sequence[Tensor]
) -> dict[str, dict[str, Any]]:
    """What each predictor pays on held-out clips; the model sees all codes before each one.

    Args:
        model: what is measured.
        train: codes [T, R] that the predictors without a model count.
        heldout: codes of clips that nobody trained on.

    Returns:
        `model`, `unigram`, `copy`; each `bits` per code by channel, `bits_per_frame` and `perplexity`, the
        geometric mean over all codes.
    """
    sizes = [size - 1 for size in model.spec.vocab_sizes]
    probabilities = unigram_probabilities(train, sizes)
    shares_R = best_copy_shares(train, probabilities)
    found = {
        "model": code_nats(model, heldout),
        "unigram": unigram_nats(heldout, probabilities),
        "copy": copy_nats(heldout, probabilities, shares_R),
    }
    return {name: _row(nats_R) for name, nats_R in found.items()}


def _row(nats_R: Tensor) -> dict[str, Any]:
    bits = [round(float(x) / math.log(2), 4) for x in nats_R]
    return {
        "bits": bits,
        "bits_per_frame": round(sum(bits), 3),
        "perplexity": round(math.exp(float(nats_R.mean())), 2),
    }


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The rows for people: perplexity by channel, then over all."""
    channels = len(next(iter(rows.values()))["bits"])
    head = f"{'perplexity of':<18}" + "".join(f"{f'code {r}':>9}" for r in range(channels))
    lines = [
        f"{name:<18}"
        + "".join(f"{2**bits:>9.2f}" for bits in row["bits"])
        + f"{row['perplexity']:>9.2f}{row['bits_per_frame']:>13.2f}"
        for name, row in rows.items()
    ]
    return [f"{head}{'all':>9}{'bits/frame':>13}", *lines]
