"""How well an audio tokenizer rebuilds held-out speech, beside baselines that use no model.

Intelligibility (STOI) and PESQ come from the packages pystoi and pesq; the distance of log-mel spectrograms
is ours. Legend: N samples, R codebooks, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sateen.errors import ConfigError
from sateen.eval.griffin_lim import baseline_waves
from sateen.eval.mel_codec import MelCodec
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.nn.mel import MelSettings, log_mel

Row = dict[str, float]


def measure_settings(sample_rate: int) -> MelSettings:
    """What distances are measured with: 80 mels, windows of 40 ms, 100 frames a second."""
    return MelSettings(sample_rate, sample_rate // 25, sample_rate // 25, sample_rate // 100, 80)


def log_mel_distance(made_N: Tensor, true_N: Tensor, settings: MelSettings) -> float:
    """Mean absolute difference of natural-log mel spectrograms."""
    made_TM, true_TM = log_mel(made_N[None], settings)[0], log_mel(true_N[None], settings)[0]
    return float((made_TM - true_TM).abs().mean())


def stoi(made_N: Tensor, true_N: Tensor, sample_rate: int) -> float:
    """Short-time objective intelligibility, about 0 to 1 (Taal et al. 2011), by pystoi.

    Raises:
        ConfigError: pystoi is not installed.
    """
    try:
        from pystoi import stoi as measure
    except ModuleNotFoundError:
        raise ConfigError("STOI needs pystoi: pip install 'sateen[audio]'") from None
    return float(measure(true_N.numpy(), made_N.numpy(), sample_rate, extended=False))


def pesq_wideband(made_N: Tensor, true_N: Tensor) -> float | None:
    """PESQ-WB, 1 to 4.64, of 16 kHz waveforms; None where the package pesq is missing or finds no speech."""
    try:
        from pesq import PesqError, pesq
    except ModuleNotFoundError:
        return None
    try:
        return float(pesq(16000, true_N.numpy(), made_N.numpy(), "wb"))
    except PesqError:
        return None


@torch.no_grad()
def reconstruction(
    tokenizer: AudioTokenizer, waves: Sequence[Tensor], codec: MelCodec | None = None
) -> dict[str, Row]:
    """Means over clips of each way to rebuild them.

    Args:
        tokenizer: what is measured.
        waves: held-out clips [N] at its sample rate.
        codec: codes without a neural network, measured beside it.

    Returns:
        `tokenizer` (all codebooks), `tokenizer_<n>` (the first n), `mel_kmeans` where a codec is given, and
        the baselines `mel` (100 Hz mel frames and Griffin-Lim), `mel_25hz` and `mel_mean`; each `log_mel_l1`,
        `stoi` and `pesq_wb` where the rate is 16 kHz and the package is there.
    """
    rate, books = tokenizer.config.sampling_rate, tokenizer.config.num_quantizers
    counts = [n for n in (1, 2, 4, 8) if n < books]
    rows: dict[str, list[Row]] = {}
    for wave_N in waves:
        codes_RL = tokenizer.encode(wave_N)
        made = {"tokenizer": tokenizer.decode(codes_RL)}
        made |= {f"tokenizer_{n}": tokenizer.decode(codes_RL[:n]) for n in counts}
        made |= {"mel_kmeans": codec.rebuild(wave_N)} if codec is not None else {}
        made |= baseline_waves(wave_N, measure_settings(rate))
        for name, one_N in made.items():
            rows.setdefault(name, []).append(_row(_fit(one_N, len(wave_N)), wave_N, rate))
    return {name: _means(found) for name, found in rows.items()}


def _row(made_N: Tensor, true_N: Tensor, rate: int) -> Row:
    row = {
        "log_mel_l1": log_mel_distance(made_N, true_N, measure_settings(rate)),
        "stoi": stoi(made_N, true_N, rate),
    }
    quality = pesq_wideband(made_N, true_N) if rate == 16000 else None
    return row if quality is None else row | {"pesq_wb": quality}


def _means(rows: Sequence[Row]) -> Row:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


def _fit(made_N: Tensor, length: int) -> Tensor:
    """Cut or filled with silence: a tokenizer's output is a whole number of tokens long."""
    out = torch.zeros(length)
    out[: min(length, len(made_N))] = made_N[:length]
    return out


def code_use(codes_RL: Tensor, sizes: Sequence[int]) -> list[dict[str, float]]:
    """Per codebook: its entries, how many occur, and exp of the entropy of their use."""
    found = []
    for code_L, size in zip(codes_RL, sizes, strict=True):
        counts = torch.bincount(code_L, minlength=size).double()
        shares = counts[counts > 0] / counts.sum()
        entropy = float(-(shares * shares.log()).sum())
        found.append(
            {"entries": size, "used": int((counts > 0).sum()), "perplexity": round(math.exp(entropy), 2)}
        )
    return found


def table(rows: dict[str, Row]) -> list[str]:
    """The rows for people."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    head = f"{'':<18}" + "".join(f"{key:>12}" for key in keys)
    cells = {name: [f"{row[k]:.3f}" if k in row else "-" for k in keys] for name, row in rows.items()}
    return [head, *(f"{name:<18}" + "".join(f"{x:>12}" for x in row) for name, row in cells.items())]
