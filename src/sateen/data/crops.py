"""Batches of random crops of recorded speech, for training an audio tokenizer.

Legend: B crops, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sateen.data.audio import WaveFile
from sateen.data.drawn import DrawnBatches


@dataclass(frozen=True)
class WaveBatch:
    """Crops of equal length.

    Attributes:
        wave_BN: samples in -1 to 1.
        texts: per crop the transcript of a clip that is whole in it, None for a part of a clip.
        num_tokens: frames of the audio tokenizer, the unit of its budget.
        first_frame: frames of all batches before it.
    """

    wave_BN: Tensor
    texts: tuple[str | None, ...]
    num_tokens: int
    first_frame: int

    def to(self, device: str) -> WaveBatch:
        """The batch on another device."""
        return replace(self, wave_BN=self.wave_BN.to(device))


class CropLoader(DrawnBatches):
    """Endless batches of random crops, every second of every source's audio equally likely.

    Batch i depends on the seed and i alone, so its state is a count. A clip shorter than a crop is whole in
    it, with silence behind.

    Args:
        sources: corpora with their weights.
        crops: per batch, B.
        frames: of the audio tokenizer per crop.
        samples_per_frame: N = frames times this.
        seed: of the choice.
    """

    what = "crops"

    def __init__(
        self,
        sources: Sequence[tuple[WaveFile, float]],
        *,
        crops: int,
        frames: int,
        samples_per_frame: int,
        seed: int,
    ):
        self.files = [file for file, _ in sources]
        self.crops, self.frames, self.length = crops, frames, frames * samples_per_frame
        super().__init__(seed)
        weights = np.array([weight for _, weight in sources])
        self._source_odds = weights / weights.sum()
        sizes = [np.diff(file.offsets).astype(np.float64) for file in self.files]
        self._clip_odds = [size / size.sum() for size in sizes]

    def __next__(self) -> WaveBatch:
        """The next batch."""
        num_frames = self.crops * self.frames
        first_frame = self.index * num_frames
        rng = self.next_generator()
        waves, texts = [], []
        for _ in range(self.crops):
            which = int(rng.choice(len(self.files), p=self._source_odds))
            file, odds = self.files[which], self._clip_odds[which]
            clip = int(rng.choice(len(odds), p=odds))
            spare = int(file.offsets[clip + 1] - file.offsets[clip]) - self.length
            start = int(rng.integers(spare + 1)) if spare > 0 else 0
            waves.append(file.piece(clip, start, self.length))
            texts.append(file.clips[clip].text if spare <= 0 else None)
        return WaveBatch(torch.stack(waves), tuple(texts), num_frames, first_frame)
