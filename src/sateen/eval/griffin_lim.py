"""Waveforms from mel spectrograms without a model: what an audio tokenizer is compared with.

Legend: N samples, T frames, K frequency bins, M mel channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.nn.mel import FLOOR, MelSettings, log_mel, mel_filters

NUM_ITERATIONS = 32


def griffin_lim(
    magnitude_TK: Tensor, settings: MelSettings, num_samples: int, *, num_iterations: int = NUM_ITERATIONS
) -> Tensor:
    """A waveform [num_samples] whose spectrum has about these magnitudes.

    Phases start at random (seed 0) and are replaced by those of the waveform they give, again and again.
    Source: Griffin and Lim 1984, "Signal estimation from modified short-time Fourier transform".
    """
    window = torch.hann_window(settings.win_length)
    size = (settings.n_fft, settings.hop_length, settings.win_length)
    magnitude_KT = magnitude_TK.T
    generator = torch.Generator().manual_seed(0)
    phase_KT = torch.rand(magnitude_KT.shape, generator=generator) * (2 * torch.pi)
    for _ in range(num_iterations):
        wave = torch.istft(torch.polar(magnitude_KT, phase_KT), *size, window, length=num_samples)
        phase_KT = torch.stft(wave, *size, window, return_complex=True).angle()
    return torch.istft(torch.polar(magnitude_KT, phase_KT), *size, window, length=num_samples)


def wave_of_log_mel(log_mel_TM: Tensor, settings: MelSettings, num_samples: int) -> Tensor:
    """A waveform [num_samples] of log-mel frames: least squares for the bins, Griffin-Lim for phases."""
    inverse_MK = torch.linalg.pinv(mel_filters(settings)).float()
    magnitude_TK = (log_mel_TM.exp() @ inverse_MK).clamp_min(0)
    return griffin_lim(magnitude_TK, settings, num_samples)


def averaged(log_mel_TM: Tensor, frames: int | None) -> Tensor:
    """The frames replaced by the mean mel magnitudes of groups of `frames`, of the whole clip when None."""
    mel_TM = log_mel_TM.exp()
    if frames is None:
        return mel_TM.mean(0, keepdim=True).expand_as(mel_TM).clamp_min(FLOOR).log()
    groups = [group.mean(0, keepdim=True).expand_as(group) for group in mel_TM.split(frames)]
    return torch.cat(groups).clamp_min(FLOOR).log()


def baseline_waves(wave_N: Tensor, settings: MelSettings) -> dict[str, Tensor]:
    """A clip rebuilt from its own mel frames, from their means at 25 Hz, and from their mean alone."""
    frames_TM = log_mel(wave_N[None], settings)[0]
    four = settings.sample_rate // (25 * settings.hop_length)
    kept = {
        "mel": frames_TM,
        "mel_25hz": averaged(frames_TM, four),
        "mel_mean": averaged(frames_TM, None),
    }
    return {name: wave_of_log_mel(mel_TM, settings, len(wave_N)) for name, mel_TM in kept.items()}
