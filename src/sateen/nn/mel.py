"""Mel spectrograms of waveforms: the audio tokenizer's front end, and the scale its losses are measured on.

Everything is computed in float32 from tables made on first use, so a module that calls this holds no buffers
of it. Legend: B batch, N samples, T frames, K frequency bins, M mel channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.errors import ConfigError, ShapeError

FLOOR = 1e-7  # of the magnitude before the logarithm


@dataclass(frozen=True)
class MelSettings:
    """What a mel spectrogram is taken with.

    Attributes:
        sample_rate: of the waveform, in Hz.
        n_fft: length of the Fourier transform, in samples.
        win_length: length of the periodic Hann window, in samples, centred in the transform.
        hop_length: samples between frames.
        n_mels: channels M.
        f_min: lower edge of the first filter, in Hz.
        f_max: upper edge of the last filter, in Hz; half the sample rate when None.
        is_normalized: divide by the window's Euclidean norm, so that levels do not grow with its length.
    """

    sample_rate: int
    n_fft: int
    win_length: int
    hop_length: int
    n_mels: int
    f_min: float = 0.0
    f_max: float | None = None
    is_normalized: bool = False

    def __post_init__(self) -> None:
        top = self.sample_rate / 2 if self.f_max is None else self.f_max
        if not 0 <= self.f_min < top:
            raise ConfigError(f"mel filters from {self.f_min} to {top} Hz; the first edge must be the lower")
        if not 0 < self.hop_length <= self.win_length <= self.n_fft or self.n_mels < 1:
            raise ConfigError(
                f"hop {self.hop_length}, window {self.win_length}, transform {self.n_fft} and {self.n_mels} "
                "mels; accepted: 0 < hop <= window <= transform and at least one mel"
            )

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip: one at sample 0 and one per whole hop."""
        return num_samples // self.hop_length + 1


def mel_filters(settings: MelSettings) -> Tensor:
    """Triangles [K, M] on the HTK mel scale, peak 1, without area normalisation, in float64.

    A filter narrower than the distance of two bins may cover none and is all zeros; it stays in its place,
    because checkpoints were trained with its constant channel.

    Source: m = 2595 log10(1 + f / 700); MiMo-Audio, arXiv 2512.23808, and its published front end.
    """
    top = float(settings.sample_rate // 2) if settings.f_max is None else settings.f_max
    bins_K = torch.linspace(0, settings.sample_rate // 2, settings.n_fft // 2 + 1, dtype=torch.float64)
    low, high = 2595 * torch.log10(1 + torch.tensor([settings.f_min, top], dtype=torch.float64) / 700)
    mels = torch.linspace(float(low), float(high), settings.n_mels + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    widths = edges.diff()
    from_edges = edges[None, :] - bins_K[:, None]
    rising = -from_edges[:, :-2] / widths[:-1]
    falling = from_edges[:, 2:] / widths[1:]
    return torch.minimum(rising, falling).clamp_min(0)


def mel_spectrogram(wave_BN: Tensor, settings: MelSettings) -> Tensor:
    """Magnitudes [B, T, M] in mel channels, in float32; differentiable.

    Frames are centred, with the clip mirrored at its ends; T = N // hop + 1.

    Raises:
        ShapeError: the clip is not longer than half a transform, which mirroring needs.
    """
    if wave_BN.ndim != 2 or wave_BN.shape[1] <= settings.n_fft // 2:
        raise ShapeError(
            f"a waveform of shape {tuple(wave_BN.shape)}; accepted: [clips, samples] with more than "
            f"{settings.n_fft // 2} samples, half a transform"
        )
    window, filters_KM = _tables(settings, wave_BN.device)
    half = settings.n_fft // 2
    padded = F.pad(wave_BN.float()[:, None], (half, half), mode="reflect")[:, 0]
    spectrum_BKT = torch.stft(
        padded, settings.n_fft, settings.hop_length, settings.win_length, window,
        center=False, normalized=False, onesided=True, return_complex=True,
    )  # fmt: skip
    return spectrum_BKT.abs().transpose(1, 2) @ filters_KM


def log_mel(wave_BN: Tensor, settings: MelSettings) -> Tensor:
    """The natural logarithm of `mel_spectrogram`, floored at 1e-7: [B, T, M] in float32."""
    return mel_spectrogram(wave_BN, settings).clamp_min(FLOOR).log()


@lru_cache(maxsize=32)
def _tables(settings: MelSettings, device: torch.device) -> tuple[Tensor, Tensor]:
    window = torch.hann_window(settings.win_length, periodic=True, dtype=torch.float64)
    if settings.is_normalized:
        window = window / window.square().sum().sqrt()
    return window.float().to(device), mel_filters(settings).float().to(device)
