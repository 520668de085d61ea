"""Speech corpora: the split by prompt, rates, crops, and `sateen data speech` on packages made here."""

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sateen.data import speech
from sateen.data.audio import (
    Clip,
    WaveFile,
    read_wave,
    speech_clips,
    split_clips,
    write_waves,
)
from sateen.data.crops import CropLoader
from sateen.data.speech import SETS, SpeechSet
from sateen.errors import ConfigError, SateenError

RATE = 16000


def tone(hz: float, seconds: float, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_set(folder: Path, language: str, clips: dict[str, np.ndarray]) -> None:
    """A set in the form that `sateen data speech` leaves."""
    folder.mkdir(parents=True)
    rows = []
    for prompt, samples in clips.items():
        soundfile.write(folder / f"{prompt}.flac", samples, RATE, subtype="PCM_16")
        entry = {"name": f"{folder.name}/{prompt}", "prompt": prompt, "language": language}
        rows.append(
            entry | {"text": f"say {prompt}", "seconds": len(samples) / RATE, "file": f"{prompt}.flac"}
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Forty prompts in two languages, of different pitch."""
    for language, hz in (("en", 300), ("xx", 400)):
        clips = {f"p{i}": tone(hz + i, 0.2 + 0.01 * i) for i in range(40)}
        write_set(tmp_path / "corpus" / f"set-{language}", language, clips)
    return tmp_path / "corpus"


def test_clips_are_listed_by_name_and_chosen_by_language_and_length(corpus):
    clips = speech_clips(corpus)
    assert len(clips) == 80
    assert [clip.name for clip in clips] == sorted(clip.name for clip in clips)
    assert {clip.language for clip in speech_clips(corpus, languages=["xx"])} == {"xx"}
    assert max(clip.seconds for clip in speech_clips(corpus, max_seconds=0.3)) <= 0.3
    with pytest.raises(ConfigError, match=r"languages there: en, xx"):
        speech_clips(corpus, languages=["zz"])
    with pytest.raises(ConfigError, match="sateen data speech"):
        speech_clips(corpus / "set-en")


def test_a_prompt_is_on_one_side_in_every_language(corpus):
    train, heldout = split_clips(speech_clips(corpus), 0.3)
    assert len(train) + len(heldout) == 80
    assert {clip.prompt for clip in train} & {clip.prompt for clip in heldout} == set()
    assert 0 < len(heldout) < 48
    # Each held-out prompt brings both of its languages.
    assert len(heldout) == 2 * len({clip.prompt for clip in heldout})
    again = split_clips([clip for clip in speech_clips(corpus) if clip.language == "en"], 0.3)[1]
    assert {c.prompt for c in again} == {c.prompt for c in heldout}


def test_reading_averages_channels_and_resamples(tmp_path):
    left, right = tone(500, 0.5, rate=8000, level=0.6), tone(500, 0.5, rate=8000, level=0.2)
    soundfile.write(tmp_path / "two.wav", np.stack([left, right], 1), 8000, subtype="FLOAT")
    wave = read_wave(tmp_path / "two.wav", RATE)
    assert wave.shape == (8000,)
    # Away from the ends a resampled tone is the tone.
    np.testing.assert_allclose(wave[2000:6000], tone(500, 0.5, level=0.4)[2000:6000], atol=2e-3)
    (tmp_path / "no.wav").write_bytes(b"not sound")
    with pytest.raises(ConfigError, match="not a readable sound file"):
        read_wave(tmp_path / "no.wav", RATE)


def test_a_wave_file_gives_back_clips_and_pieces(corpus, tmp_path):
    clips = speech_clips(corpus, languages=["en"])
    write_waves(tmp_path / "waves", clips, RATE)
    file = WaveFile(tmp_path / "waves")
    assert list(file.clips) == clips
    for index in (0, 7, 39):
        expected, _ = soundfile.read(clips[index].file, dtype="float32")
        np.testing.assert_allclose(file.wave(index).numpy(), expected, atol=1.1 / 32768)
    wave = file.wave(3)
    torch.testing.assert_close(file.piece(3, 100, 50), wave[100:150], rtol=0, atol=0)
    past_end = file.piece(3, len(wave) - 10, 30)
    torch.testing.assert_close(past_end[:10], wave[-10:], rtol=0, atol=0)
    assert past_end[10:].abs().max() == 0
    (tmp_path / "waves" / "samples.i16").write_bytes(b"\0\0")
    with pytest.raises(ConfigError, match="damaged"):
        WaveFile(tmp_path / "waves")


def crops(corpus: Path, folder: Path, **changes) -> CropLoader:
    if not folder.is_dir():
        write_waves(folder, speech_clips(corpus, languages=["en"]), RATE)
    settings = {"crops": 6, "frames": 10, "samples_per_frame": 640, "seed": 5} | changes
    return CropLoader([(WaveFile(folder), 1.0)], **settings)


def test_crops_depend_on_the_seed_and_their_number_alone(corpus, tmp_path):
    loader = crops(corpus, tmp_path / "w")
    batches = [next(loader) for _ in range(4)]
    assert [b.first_frame for b in batches] == [0, 60, 120, 180]
    assert batches[0].num_tokens == 60
    assert batches[0].wave_BN.shape == (6, 6400)
    resumed = crops(corpus, tmp_path / "w")
    resumed.load_state_dict(json.loads(json.dumps({"index": 2, "seed": 5})))
    assert torch.equal(next(resumed).wave_BN, batches[2].wave_BN)
    assert resumed.state_dict() == {"index": 3, "seed": 5}
    assert not torch.equal(batches[0].wave_BN, batches[1].wave_BN)
    with pytest.raises(ConfigError, match="seed 5, not 6"):
        crops(corpus, tmp_path / "w", seed=6).load_state_dict({"index": 1, "seed": 5})


def test_only_whole_clips_have_a_transcript(corpus, tmp_path):
    """Crops of 0.4 s over clips of 0.2 to 0.59 s: a clip that fits has its text and silence behind it."""
    loader, whole, cut = crops(corpus, tmp_path / "w"), 0, 0
    by_text = {f"say p{i}": 0.2 + 0.01 * i for i in range(40)}
    for _ in range(10):
        batch = next(loader)
        for wave, text in zip(batch.wave_BN, batch.texts, strict=True):
            if text is None:
                cut += 1
                assert wave[-100:].abs().max() > 0.4
            else:
                whole += 1
                assert by_text[text] <= 0.4 + 1e-9
                assert wave[round(by_text[text] * RATE) :].abs().sum() == 0
    assert whole > 5
    assert cut > 5


def package(root: Path, name: str, files: dict[str, bytes]) -> None:
    """A Debian package of these files, made with dpkg-deb."""
    tree = root / name
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: test\n"
    )
    subprocess.run(["dpkg-deb", "--build", "-Znone", str(tree), str(root / f"{name}.deb")], check=True,
                   capture_output=True)  # fmt: skip


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which Debian has")
def test_packages_become_a_corpus(tmp_path, monkeypatch, capsys):
    """Both kinds of package, made here; only the download is replaced."""
    g722 = pytest.importorskip("G722", reason="needs g722, of the extra `audio`")
    spoken = (tone(200, 1.0) * 32767).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", tone(250, 0.7), RATE, subtype="PCM_16")
    voice = "usr/share/festival/voices/klingon/voice_x"
    package(tmp_path, "festvox-x", {
        f"{voice}/etc/txt.done.data": '( x_1 "Ж+изнь." )\n( x_2 "absent" )\n'.encode(),
        f"{voice}/wav/x_1.wav": (tmp_path / "a.wav").read_bytes(),
        "usr/share/doc/festvox-x/copyright": b"free",
    })  # fmt: skip
    texts = "; comment\n\ndir/hello: Hello: you.\nbeep: [a tone]\nshort: Hm.\nmissing: No file.\n"
    sounds = "usr/share/asterisk/sounds/xx_A"
    package(tmp_path, "asterisk-core-sounds-xx-g722", {
        f"{sounds}/dir/hello.g722": g722.G722(RATE, 64000).encode(spoken),
        f"{sounds}/beep.g722": g722.G722(RATE, 64000).encode(spoken),
        f"{sounds}/short.g722": g722.G722(RATE, 64000).encode(spoken[:2000]),
        "usr/share/doc/asterisk-core-sounds-xx-g722/copyright": b"credit them",
    })  # fmt: skip
    package(tmp_path, "asterisk-core-sounds-xx", {
        "usr/share/doc/asterisk-core-sounds-xx/core-sounds-xx.txt.gz": gzip.compress(texts.encode()),
    })  # fmt: skip
    monkeypatch.setitem(SETS, "festvox-ru", SpeechSet(("festvox-x",), "ru", "v", "free", 1))
    monkeypatch.setitem(
        SETS, "asterisk-xx",
        SpeechSet(("asterisk-core-sounds-xx-g722", "asterisk-core-sounds-xx"), "xx", "v", "BY", 1),
    )  # fmt: skip
    really_run, downloads = speech._run, []

    def run(command, folder):
        if command[0] == "apt-get":
            downloads.append(command[3:])
            for name in command[3:]:
                shutil.copyfile(tmp_path / f"{name}.deb", folder / f"{name}.deb")
        else:
            really_run(command, folder)

    monkeypatch.setattr(speech, "_run", run)
    out = tmp_path / "corpus"
    assert speech.main(action="speech", out=str(out), sets=("festvox-ru", "asterisk-xx")) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(out)
    assert "asterisk-xx: 1 clips" in said.err
    clips = speech_clips(out)
    assert [(c.name, c.language, c.text) for c in clips] == [
        ("asterisk-xx/dir/hello", "xx", "Hello: you."),
        ("festvox-ru/x_1", "ru", "Жизнь."),
    ]
    assert (out / "asterisk-xx/COPYRIGHT").read_text() == "credit them"
    coded = read_wave(clips[0].file, RATE)
    # G.722 delays by 22 samples and is not exact; the tone survives it.
    delayed = spoken[: len(coded) - 22] / 32767
    assert np.corrcoef(coded[22 : 22 + len(delayed)], delayed)[0, 1] > 0.98
    np.testing.assert_allclose(read_wave(clips[1].file, RATE), tone(250, 0.7), atol=2 / 32768)
    speech.main(action="speech", out=str(out), sets=("festvox-ru", "asterisk-xx"), json=True)
    assert len(downloads) == 2  # what is there is not fetched again
    assert json.loads(capsys.readouterr().out)[0]["clips"] == 1


def test_an_unknown_set_and_a_missing_program_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="asterisk-en"):
        speech.main(action="speech", out=str(tmp_path), sets=("asterisk-eng",))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SateenError, match="apt-get is not here"):
        speech.main(action="speech", out=str(tmp_path / "c"), sets=("asterisk-en",))
    assert not (tmp_path / "c" / "asterisk-en").exists()


def test_a_clips_document_is_its_transcript():
    clip = Clip("s/p", "p", "en", "Hello.", 1.0, "p.flac")
    assert (clip.document.name, clip.document.text) == ("s/p", "Hello.")
