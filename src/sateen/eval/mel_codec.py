"""Codes without a neural network, at a tokenizer's own bit rate: the fair baseline for rebuilding speech.

Log-mel frames are taken four at a time, coded by residual k-means of the tokenizer's codebook sizes, and
turned back into sound by Griffin-Lim. Legend: N samples, T frames, M mel channels, P patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sateen.eval.griffin_lim import wave_of_log_mel
from sateen.models.mimo_audio.quantizer import ResidualQuantizer
from sateen.nn.mel import MelSettings, log_mel

MAX_PATCHES = 10_000
"""Patches that codebooks are means of; bounds the time (source: ours)."""


class MelCodec:
    """Residual k-means of log-mel patches.

    Args:
        settings: of the mel frames.
        codebook_size: entries of each stage.
        frames: of a patch.
    """

    def __init__(self, settings: MelSettings, codebook_size: Sequence[int], frames: int = 4):
        self.settings, self.frames = settings, frames
        self.quantizer = ResidualQuantizer(codebook_size, frames * settings.n_mels)

    def fit(self, waves: Iterable[Tensor]) -> MelCodec:
        """Sets the codebooks from training clips [N]: 50 iterations from random patches, seed 0."""
        patches, count = [], 0
        for wave_N in waves:
            patches.append(self._patches(wave_N))
            count += len(patches[-1])
            if count >= MAX_PATCHES:
                break
        generator = torch.Generator().manual_seed(0)
        self.quantizer.update(torch.cat(patches)[:MAX_PATCHES], 0.0, generator)
        return self

    def rebuild(self, wave_N: Tensor) -> Tensor:
        """A clip from its codes, as long as it was."""
        patches_P = self._patches(wave_N)
        coded_P = self.quantizer.decode(self.quantizer.encode(patches_P))
        mel_TM = coded_P.unflatten(1, (self.frames, -1)).flatten(0, 1)
        return wave_of_log_mel(mel_TM[: self.settings.num_frames(len(wave_N))], self.settings, len(wave_N))

    def _patches(self, wave_N: Tensor) -> Tensor:
        """Log-mel frames [P, frames * M]; the last frame is repeated to fill the last patch."""
        mel_TM = log_mel(wave_N[None], self.settings)[0]
        short = -len(mel_TM) % self.frames
        if short:
            mel_TM = torch.cat([mel_TM, mel_TM[-1:].expand(short, -1)])
        return mel_TM.reshape(-1, self.frames * mel_TM.shape[1])
