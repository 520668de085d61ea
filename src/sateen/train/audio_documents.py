"""Codes of a run's speech, and batches of documents made of them for the audio language model.

Each source is encoded once; the files carry the audio tokenizer's fingerprint, since codes of another one
mean other sounds. Legend: T frames, R codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sateen.data.audio import WaveFile
from sateen.data.drawn import DrawnBatches
from sateen.errors import ConfigError
from sateen.models.mimo_audio.layout import AudioBatch, AudioLayout, audio_input, join, pack, part
from sateen.models.mimo_audio.prompts import Prompts
from sateen.models.mimo_audio.tokenizer import AudioTokenizer


class SpokenClip(NamedTuple):
    """Attributes:
    text: the transcript.
    codes_TR: int64, frame-major, as many codebooks as the language model reads.
    """

    text: str
    codes_TR: Tensor


def encode_clips(file: Path, waves: WaveFile, tokenizer: AudioTokenizer) -> list[Tensor]:
    """The codes [R, T] of all clips of a wave file, read from `file` or encoded and written there.

    A file of another tokenizer is replaced.
    """
    fingerprint = tokenizer.fingerprint()
    names = [f"{index:06}" for index in range(len(waves.clips))]
    if file.is_file():
        with safe_open(file, framework="pt") as saved:
            if (saved.metadata() or {}).get("audio_tokenizer") == fingerprint:
                return [saved.get_tensor(name).long() for name in names]
    codes = [tokenizer.encode(waves.wave(index)).cpu() for index in range(len(names))]
    stored = {name: code_RT.to(torch.int16).contiguous() for name, code_RT in zip(names, codes, strict=True)}
    fresh = file.with_name(f".{file.name}.writing")
    save_file(stored, fresh, metadata={"audio_tokenizer": fingerprint})
    fresh.rename(file)
    return codes


class DocumentLoader(DrawnBatches):
    """Endless batches of documents drawn at random; batch i depends on the seed and i alone.

    Args:
        sources: clips with the weight of their source; within a source every clip is equally likely.
        tasks: kind of document -> weight.
        prompts: makes the layouts.
        positions: of a batch at most; it ends before the first document that does not fit.
        seq_len: longest document. Longer speech alone is cut; clips too long for a task are not drawn for it.
        seed: of the choice.
    """

    what = "documents"

    def __init__(
        self,
        sources: Sequence[tuple[Sequence[SpokenClip], float]],
        *,
        tasks: Mapping[str, float],
        prompts: Prompts,
        positions: int,
        seq_len: int,
        seed: int,
    ):
        self.prompts, self.positions, self.seq_len = prompts, positions, seq_len
        super().__init__(seed)
        self.sources = [clips for clips, _ in sources]
        self.source_odds = _shares([weight for _, weight in sources])
        self.tasks = [task for task, weight in tasks.items() if weight > 0]
        self.task_odds = _shares([tasks[task] for task in self.tasks])

    def __next__(self) -> AudioBatch:
        """The next batch."""
        rng = self.next_generator()
        documents: list[AudioLayout] = []
        room = self.positions
        for document in iter(lambda: self._draw(rng), None):
            if len(document) > room:
                break
            documents.append(document)
            room -= len(document)
        return pack(self.prompts.spec, documents)

    def _draw(self, rng: np.random.Generator) -> AudioLayout:
        task = self.tasks[int(rng.choice(len(self.tasks), p=self.task_odds))]
        for _ in range(1000):
            clips = self.sources[int(rng.choice(len(self.sources), p=self.source_odds))]
            document = self.document(task, clips[int(rng.integers(len(clips)))])
            if task == "continuation" and len(document) > self.seq_len:
                start = int(rng.integers(len(document) - self.seq_len + 1))
                return part(document, start, start + self.seq_len)
            if len(document) <= self.seq_len:
                return document
        raise ConfigError(f"no clip fits a {task} document of seq_len = {self.seq_len} positions; raise it")

    def document(self, task: str, clip: SpokenClip) -> AudioLayout:
        """One clip as a document; what is learnt of it is marked."""
        prompts, spec = self.prompts, self.prompts.spec
        if task == "asr":
            return join([prompts.asr(clip.codes_TR), prompts.answer_text(clip.text)])
        if task == "tts":
            return join([prompts.tts(clip.text), prompts.answer_speech(clip.text, clip.codes_TR)])
        assert task == "continuation", task
        return audio_input(spec, clip.codes_TR).learnt(spec)


def _shares(weights: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float64]]:
    shares: np.ndarray[Any, np.dtype[np.float64]] = np.array(weights) / sum(weights)
    return shares
