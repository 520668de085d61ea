"""Recorded speech: clips with transcripts in a folder, and their waveforms in one file.

A corpus is what `sateen data speech` leaves: a folder per set, each with a `manifest.jsonl` and sound files.
Clips are held out by prompt: the sets of several languages say the same prompts, and a translation of a
training clip is no fair test. Legend: N samples.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.data.text import Document, is_held_out
from sateen.errors import ConfigError

log = logging.getLogger("sateen.data")

MANIFEST = "manifest.jsonl"
SAMPLES, CLIPS = "samples.i16", "clips.jsonl"


@dataclass(frozen=True)
class Clip:
    """One recording.

    Attributes:
        name: unique in its corpus, `<set>/<prompt>`.
        prompt: what is said, the same in every language; decides the held-out split.
        language: of the speech, as a two-letter code.
        text: the transcript.
        seconds: length.
        file: sound file; relative paths are relative to the manifest.
    """

    name: str
    prompt: str
    language: str
    text: str
    seconds: float
    file: str

    @property
    def document(self) -> Document:
        """The transcript."""
        return Document(self.name, self.text)


def speech_clips(
    folder: Path, *, languages: Sequence[str] = (), max_seconds: float = float("inf")
) -> list[Clip]:
    """The clips of a corpus in the order of their names, with absolute files.

    Args:
        folder: holds `<set>/manifest.jsonl`.
        languages: which ones; all when empty.
        max_seconds: longer clips are left out.

    Raises:
        ConfigError: there is no manifest, or nothing is left.
    """
    manifests = sorted(folder.glob(f"*/{MANIFEST}"))
    if not manifests:
        raise ConfigError(f"{folder} holds no speech; `sateen data speech --out {folder}` fetches some")
    clips = [
        Clip(**{**entry, "file": str(manifest.parent / entry["file"])})
        for manifest in manifests
        for entry in map(json.loads, manifest.read_text(encoding="utf-8").splitlines())
    ]
    known = sorted({clip.language for clip in clips})
    kept = [c for c in clips if (not languages or c.language in languages) and c.seconds <= max_seconds]
    if not kept:
        raise ConfigError(
            f"{folder} has no clip of at most {max_seconds:g} s in {', '.join(languages) or 'any language'} "
            f"(languages there: {', '.join(known)})"
        )
    return sorted(kept, key=lambda clip: clip.name)


def split_clips(clips: Iterable[Clip], share: float) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out clips: all clips of a prompt are on one side, whatever their language."""
    train: list[Clip] = []
    heldout: list[Clip] = []
    for clip in clips:
        (heldout if is_held_out(clip.prompt, share) else train).append(clip)
    return train, heldout


def read_wave(path: str | Path, sample_rate: int) -> NDArray[np.float32]:
    """A sound file as mono samples [N] in -1 to 1 at `sample_rate`; channels are averaged.

    Raises:
        ConfigError: the file is not one that libsndfile reads, or the extra `audio` is not installed.
    """
    soundfile, soxr = audio_libraries()
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ConfigError(
            f"{path}: not a readable sound file ({error}); WAV, FLAC, OGG and MP3 are"
        ) from None
    mono = samples.mean(axis=1)
    if rate != sample_rate:
        mono = soxr.resample(mono, rate, sample_rate)
    return np.asarray(mono, dtype=np.float32)


def audio_libraries() -> tuple[Any, Any]:
    """The modules soundfile and soxr.

    Raises:
        ConfigError: they are not installed.
    """
    try:
        import soundfile
        import soxr
    except ModuleNotFoundError as error:
        raise ConfigError(f"reading sound needs {error.name}: pip install 'sateen[audio]'") from None
    return soundfile, soxr


class WaveFile:
    """Clips of one sample rate, end to end in a memory-mapped file of 16-bit samples.

    Attributes:
        clips: in the file's order.
        sample_rate: in Hz.
        offsets: int64 [clips + 1], where each clip begins.
    """

    def __init__(self, folder: Path):
        head, *rows = (folder / CLIPS).read_text(encoding="utf-8").splitlines()
        self.folder = folder
        self.sample_rate = int(json.loads(head)["sample_rate"])
        self.clips = tuple(Clip(**json.loads(row)) for row in rows)
        self.offsets = np.array(json.loads(head)["offsets"], dtype=np.int64)
        self._samples = np.memmap(folder / SAMPLES, dtype=np.int16, mode="r")
        if len(self.clips) + 1 != len(self.offsets) or len(self._samples) != self.offsets[-1]:
            raise ConfigError(f"{folder} is damaged: its samples and its list differ; delete it")

    def wave(self, index: int) -> Tensor:
        """A clip's samples, float32 [N] in -1 to 1."""
        return self.piece(index, 0, int(self.offsets[index + 1] - self.offsets[index]))

    def piece(self, index: int, start: int, length: int) -> Tensor:
        """Samples `start` to `start + length` of a clip, with silence behind its end: float32 [length]."""
        begin = int(self.offsets[index]) + start
        end = min(begin + length, int(self.offsets[index + 1]))
        out = torch.zeros(length)
        out[: end - begin] = torch.from_numpy(self._samples[begin:end].astype(np.float32)) / 32768
        return out


def write_waves(folder: Path, clips: Sequence[Clip], sample_rate: int) -> None:
    """Writes the clips as a `WaveFile`, under a temporary name first."""
    fresh = folder.with_name(f".{folder.name}.writing")
    fresh.mkdir(parents=True, exist_ok=True)
    offsets = [0]
    with (fresh / SAMPLES).open("wb") as file:
        for clip in clips:
            samples = np.rint(read_wave(clip.file, sample_rate) * 32767).clip(-32768, 32767).astype("<i2")
            file.write(samples.tobytes())
            offsets.append(offsets[-1] + len(samples))
    head = {"sample_rate": sample_rate, "offsets": offsets}
    rows = [json.dumps(entry, ensure_ascii=False) for entry in (head, *(vars(clip) for clip in clips))]
    (fresh / CLIPS).write_text("\n".join(rows) + "\n", encoding="utf-8")
    fresh.rename(folder)
