"""`sateen data speech`: recorded speech with transcripts from Debian's archive, without installing it.

Packages are downloaded with `apt-get download` and unpacked with `dpkg -x`, both as an ordinary user; each
set of clips becomes a folder of 16 kHz FLAC files with a manifest and its licence. A finished set is skipped,
so the same command resumes.
"""

from __future__ import annotations

import gzip
import json as codec
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sateen.data.audio import MANIFEST, audio_libraries, read_wave
from sateen.errors import ConfigError, SateenError, unknown_name

SAMPLE_RATE = 16000
SHORTEST_S = 0.3
Samples = NDArray[np.int16]


@dataclass(frozen=True)
class SpeechSet:
    """A set of recordings in Debian's archive.

    Attributes:
        packages: the first holds the sound, the others what belongs to it.
        language: two-letter code.
        voice: who speaks.
        licence: as its copyright file names it; the file itself is put beside the clips.
        size_mb: what is downloaded.
    """

    packages: tuple[str, ...]
    language: str
    voice: str
    licence: str
    size_mb: int


def _asterisk(language: str, voice: str, licence: str) -> SpeechSet:
    name = f"asterisk-core-sounds-{language}"
    return SpeechSet((f"{name}-g722", name), language, voice, licence, 11)


SETS = {
    "festvox-ru": SpeechSet(("festvox-ru",), "ru", "one man, Russian (N. V. Shmyrev)", "BSD-like", 179),
    "asterisk-en": _asterisk("en", "Allison Smith, US English", "CC-BY-SA-3.0"),
    "asterisk-es": _asterisk("es", "Allison Smith, Mexican Spanish", "CC-BY-SA-3.0"),
    "asterisk-fr": _asterisk("fr", "June Wallack, Canadian French", "CC-BY-SA-3.0"),
    "asterisk-it": _asterisk("it", "Carlo Flora, Italian", "CC-BY-3.0"),
    "asterisk-ru": _asterisk("ru", "one woman, Russian (ivrvoice.ru)", "CC-BY-3.0"),
}
DEFAULT_SETS = ("festvox-ru", "asterisk-en")


def main(*, action: str, out: str, sets: Sequence[str] = DEFAULT_SETS, json: bool = False) -> int:
    """Fetches the sets that are not there yet, prints the corpus folder and returns the exit code.

    Args:
        action: `speech`, the only one.
        out: the corpus folder.
        sets: names in `SETS`.
        json: print what each set holds as JSON.

    Raises:
        ConfigError: an unknown set, or the extra `audio` is not installed.
        SateenError: apt or dpkg is missing or fails, or a package holds other files than expected.
    """
    assert action == "speech", action
    for name in sets:
        if name not in SETS:
            raise ConfigError(f"--sets: {unknown_name('speech set', name, SETS)}")
    audio_libraries()
    folder = Path(out)
    rows = []
    for name in sets:
        if not (folder / name / MANIFEST).is_file():
            _fetch(name, folder)
        clips = [codec.loads(line) for line in (folder / name / MANIFEST).read_text("utf-8").splitlines()]
        minutes = sum(clip["seconds"] for clip in clips) / 60
        rows.append({"set": name, "clips": len(clips), "minutes": round(minutes, 1), **_credit(name)})
        told = f"{name}: {len(clips)} clips, {minutes:.1f} min, {SETS[name].voice}"
        licence = f"{SETS[name].licence} licence, see {folder / name / 'COPYRIGHT'}"
        _talk(f"{told}; {licence} and pass it on with the clips")
    print(codec.dumps(rows, indent=2) if json else folder)
    return 0


def _credit(name: str) -> dict[str, Any]:
    one = SETS[name]
    return {"language": one.language, "voice": one.voice, "licence": one.licence, "packages": one.packages}


def _fetch(name: str, folder: Path) -> None:
    """Downloads, unpacks and converts one set; its folder appears when it is complete."""
    one = SETS[name]
    fresh = folder / f".{name}.writing"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="sateen-speech-") as scratch:
        root = Path(scratch)
        _talk(f"{name}: downloading {one.size_mb} MB ({', '.join(one.packages)})")
        # apt compares what it downloads with the checksums of the archive's signed index.
        _run(["apt-get", "download", "-qq", *one.packages], root)
        for package in sorted(root.glob("*.deb")):
            _run(["dpkg", "-x", package.name, "root"], root)
        copyright_file = root / "root/usr/share/doc" / one.packages[0] / "copyright"
        shutil.copyfile(copyright_file, fresh / "COPYRIGHT")
        _talk(f"{name}: converting")
        reader = _festvox if name == "festvox-ru" else _asterisk_clips
        rows = list(_write(fresh, name, one.language, reader(root / "root", one.language)))
    if not rows:
        raise SateenError(f"{name}: {', '.join(one.packages)} holds no clip with a transcript any more")
    (fresh / MANIFEST).write_text("".join(rows), encoding="utf-8")
    shutil.rmtree(folder / name, ignore_errors=True)
    fresh.rename(folder / name)


def _write(
    folder: Path, name: str, language: str, clips: Iterator[tuple[str, str, Samples]]
) -> Iterator[str]:
    """FLAC files of the clips, and the lines of their manifest."""
    soundfile, _ = audio_libraries()
    for prompt, text, samples in clips:
        seconds = len(samples) / SAMPLE_RATE
        # Silences and tones between brackets are no speech.
        if seconds < SHORTEST_S or not text or text.startswith("["):
            continue
        file = prompt.replace("/", "__") + ".flac"
        soundfile.write(folder / file, samples, SAMPLE_RATE, subtype="PCM_16")
        entry = {"name": f"{name}/{prompt}", "prompt": prompt, "language": language, "text": text}
        yield codec.dumps(entry | {"seconds": round(seconds, 3), "file": file}, ensure_ascii=False) + "\n"


def _festvox(root: Path, language: str) -> Iterator[tuple[str, str, Samples]]:
    """(prompt, transcript, samples) of a Festival voice's recordings."""
    (voice,) = (root / "usr/share/festival/voices").glob("*/*")
    lines = (voice / "etc/txt.done.data").read_text(encoding="utf-8").splitlines()
    for line in lines:
        found = re.match(r'\(\s*(\S+)\s+"(.*)"\s*\)', line)
        if found and (file := voice / "wav" / f"{found[1]}.wav").is_file():
            samples = np.rint(read_wave(file, SAMPLE_RATE) * 32768).clip(-32768, 32767)
            # A plus marks the stressed vowel in front of it or behind it; it is no letter.
            yield found[1], found[2].replace("+", "").strip(), samples.astype(np.int16)


def _asterisk_clips(root: Path, language: str) -> Iterator[tuple[str, str, Samples]]:
    """(prompt, transcript, samples) of one language's telephone prompts, which are coded in G.722."""
    try:
        from G722 import G722
    except ModuleNotFoundError:
        raise ConfigError("these prompts are coded in G.722: pip install 'sateen[audio]'") from None
    listing = root / f"usr/share/doc/asterisk-core-sounds-{language}/core-sounds-{language}.txt.gz"
    (sounds,) = (p for p in (root / "usr/share/asterisk/sounds").iterdir() if p.is_dir())
    for line in gzip.decompress(listing.read_bytes()).decode("utf-8", errors="replace").splitlines():
        prompt, colon, text = line.partition(":")
        file = sounds / f"{prompt.strip()}.g722"
        if colon and not line.startswith(";") and file.is_file():
            samples = np.asarray(G722(SAMPLE_RATE, 64000).decode(file.read_bytes()), dtype=np.int16)
            yield prompt.strip(), text.strip(), samples


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SateenError(
            f"{command[0]} is not here: the speech comes from Debian's archive; run this on Debian or Ubuntu "
            "and copy the folder"
        ) from None
    if done.returncode:
        raise SateenError(f"`{' '.join(command)}` failed: {done.stderr.strip().splitlines()[-1:]}")


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
