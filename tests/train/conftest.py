"""Small corpora made of nothing: random words, and voiced syllables with two formants."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import soundfile

WORDS = ["warp", "weft", "loom", "thread", "satin", "weave", "silk", "cotton", "shuttle", "reed", "heddle"]
RATE = 16000
VOWELS = {"a": (800, 1200), "e": (500, 1900), "i": (300, 2300), "o": (500, 900), "u": (320, 800)}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty small documents of random words."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    for i in range(60):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=60)))
    return folder


def _syllables(text: str, rng: np.random.Generator) -> np.ndarray:
    """One syllable of about 0.2 s per vowel of the text, with a short noise before each."""
    pieces = []
    for letter in text:
        if letter not in VOWELS:
            continue
        seconds, pitch = rng.uniform(0.15, 0.25), rng.uniform(90, 140)
        t = np.arange(int(seconds * RATE)) / RATE
        sound = np.zeros_like(t)
        for k in range(1, int(4000 / pitch)):
            gain = sum(np.exp(-(((k * pitch - f) / 120) ** 2)) for f in VOWELS[letter])
            sound += (gain + 0.01) * np.sin(2 * np.pi * k * pitch * t)
        noise = rng.normal(0, 0.05, int(0.03 * RATE))
        pieces += [noise, 0.3 * sound / np.abs(sound).max() * np.hanning(len(t)) ** 0.3]
    return np.concatenate(pieces).astype(np.float32)


@pytest.fixture(scope="session")
def made_speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 30 clips of random syllables, in the form that `sateen data speech` leaves."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("speech")
    (folder / "made").mkdir()
    rows = []
    for i in range(30):
        words = ("".join([*rng.choice(list("bdgmnaeiou"), 5), "a"]) for _ in range(rng.integers(2, 6)))
        text = " ".join(words)
        wave = _syllables(text, rng)
        soundfile.write(folder / "made" / f"{i}.flac", wave, RATE, subtype="PCM_16")
        row = {"name": f"made/{i}", "prompt": f"p{i}", "language": "xx", "text": text}
        rows.append(json.dumps(row | {"seconds": len(wave) / RATE, "file": f"{i}.flac"}) + "\n")
    (folder / "made" / "manifest.jsonl").write_text("".join(rows))
    return folder
