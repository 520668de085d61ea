"""The reconstruction loss of the audio tokenizer: distances between mel spectrograms at several scales.

Legend: B clips, N samples, T frames, M mel channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.nn.mel import MelSettings, mel_spectrogram

LOG_FLOOR = 1e-5


def mel_scales(sample_rate: int, num_mels: Sequence[int], windows: Sequence[int]) -> tuple[MelSettings, ...]:
    """One setting per scale; a hop is half a window, as in MiMo-Audio §2.1.2."""
    return tuple(
        MelSettings(sample_rate, window, window, window // 2, mels, is_normalized=True)
        for mels, window in zip(num_mels, windows, strict=True)
    )


def multi_scale_mel_loss(made_BN: Tensor, true_BN: Tensor, scales: Sequence[MelSettings]) -> Tensor:
    """Mean over scales of the L1 distance of mel spectrograms, plus that of their decimal logarithms.

    MiMo-Audio §2.1.2 gives an L1 distance at three scales of a normalised transform and does not say of what:
    both terms, and the floor of 1e-5, are ours. Differentiable in `made_BN`.
    """
    total = made_BN.new_zeros(())
    for scale in scales:
        made_BTM, true_BTM = mel_spectrogram(made_BN, scale), mel_spectrogram(true_BN, scale)
        logs = torch.log10(made_BTM.clamp_min(LOG_FLOOR)) - torch.log10(true_BTM.clamp_min(LOG_FLOOR))
        total = total + (made_BTM - true_BTM).abs().mean() + logs.abs().mean()
    return total / len(scales)
