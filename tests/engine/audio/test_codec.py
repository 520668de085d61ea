"""`sateen audio encode|decode`: files in and out, what they say, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sateen.checkpoint.audio import AudioTokenizer
from sateen.cli import main
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig, audio_tokenizer_preset

SMALL = audio_tokenizer_preset("mimo-audio-tokenizer-mini").to_hf() | {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 1,
    "vocoder_dim": 16,
    "vocoder_num_layers": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audio") / "tokenizer"
    AudioTokenizer(AudioTokenizerConfig.from_hf(SMALL)).init_weights(0).save(folder)
    return folder


def tone(path: Path, *, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> Path:
    t = np.arange(int(seconds * rate)) / rate
    wave = 0.4 * np.sin(2 * np.pi * 440 * t)
    soundfile.write(path, np.stack([wave] * channels, 1) if channels > 1 else wave, rate, subtype="FLOAT")
    return path


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a refused command prints; exit code 2 and nothing on stdout."""
    assert main(["audio", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_encode_then_decode(model, tmp_path, capsys):
    wave = tone(tmp_path / "in.wav")
    codes, back = tmp_path / "codes.safetensors", tmp_path / "out.wav"
    assert main(["audio", "encode", str(wave), str(codes), "--model", str(model), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # 16000 samples: 101 mel frames, 51 at 50 Hz, 26 at 25 Hz.
    assert told["codes"] == [8, 26]
    assert (told["seconds"], told["tokens_per_s"], told["bits_per_s"]) == (1.0, 25, 1300)

    tokenizer = AudioTokenizer.load(model)
    samples = torch.from_numpy(soundfile.read(wave, dtype="float32")[0])
    stored = load_file(codes)
    assert list(stored) == ["codes"]
    assert stored["codes"].dtype == torch.int16
    assert torch.equal(stored["codes"].long(), tokenizer.encode(samples))
    with safe_open(codes, "pt") as file:
        metadata = file.metadata()
    assert metadata["fingerprint"] == tokenizer.fingerprint() == told["tokenizer"]
    assert (metadata["sample_rate"], metadata["num_samples"]) == ("16000", "16000")
    assert json.loads(metadata["config"]) == SMALL

    assert main(["audio", "decode", str(codes), str(back), "--model", str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 26 * 640
    decoded, rate = soundfile.read(back, dtype="float32")
    expected = tokenizer.decode(stored["codes"]).clamp(-1, 1).numpy()
    assert rate == 16000
    assert decoded.shape == expected.shape == (26 * 640,)
    assert np.abs(decoded - expected).max() <= 1 / 32768
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes.safetensors", "in.wav", "out.wav"]


def test_fewer_stages_and_other_rates(model, tmp_path, capsys):
    wave = tone(tmp_path / "in.wav", rate=44100, channels=2)
    codes = tmp_path / "codes.safetensors"
    words = ["audio", "encode", str(wave), str(codes), "--model", str(model), "--quantizers", "3"]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{codes}: 3 x 26 codes of 1.00 s, 550 bit/s\n"
    assert load_file(codes)["codes"].shape == (3, 26)
    assert main(["audio", "decode", str(codes), str(tmp_path / "o.flac"), "--model", str(model)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'o.flac'}: 1.04 s at 16000 Hz\n"
    assert soundfile.info(tmp_path / "o.flac").format == "FLAC"


def test_what_is_not_sound_or_no_model_is_refused(model, tmp_path, capsys):
    wave, out = tone(tmp_path / "in.wav"), tmp_path / "codes.safetensors"
    assert "no audio tokenizer given; --model takes" in refused(capsys, "encode", wave, out)
    text = tmp_path / "text.wav"
    text.write_text("hello")
    line = refused(capsys, "encode", text, out, "--model", model)
    assert "text.wav: not a readable sound file" in line
    assert "no audio tokenizer (no config.json there)" in refused(
        capsys, "encode", wave, out, "--model", tmp_path
    )
    empty = tone(tmp_path / "empty.wav", seconds=0)
    assert "0 samples at 16000 Hz; a clip needs more than 320" in refused(
        capsys, "encode", empty, out, "--model", model
    )
    empty = tone(tmp_path / "empty.wav", seconds=0, rate=8000, channels=2)
    assert "0 samples at 16000 Hz" in refused(capsys, "encode", empty, out, "--model", model)
    short = tone(tmp_path / "short.wav", seconds=0.02)
    assert "320 samples at 16000 Hz" in refused(capsys, "encode", short, out, "--model", model)
    words = ("encode", wave, out, "--model", model, "--quantizers", 9)
    assert "--quantizers 9:" in refused(capsys, *words)
    assert "must end in .safetensors" in refused(capsys, "encode", wave, "x.wav", "--model", model)
    nowhere = tmp_path / "nowhere" / "x.safetensors"
    assert "there is no folder" in refused(capsys, "encode", wave, nowhere, "--model", model)
    assert not out.exists()
    missing = tmp_path / "missing.wav"
    assert "missing.wav" in refused(capsys, "encode", missing, out, "--model", model)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"ids": torch.zeros(2, 2, dtype=torch.int16)}, "no tensor `codes` (there: ids)"),
        ({"codes": torch.zeros(4, dtype=torch.int16)}, "`codes` is torch.int16 [4]; accepted: integers"),
        ({"codes": torch.zeros(2, 2)}, "`codes` is torch.float32 [2, 2]"),
        ({"codes": torch.zeros(2, 0, dtype=torch.int16)}, "`codes` is torch.int16 [2, 0]"),
        ({"codes": torch.zeros(9, 2, dtype=torch.int16)}, "(9, 2); accepted: [1 to 8 stages, tokens]"),
        ({"codes": torch.full((1, 2), 256, dtype=torch.int16)}, "codes from 256 to 256; accepted: 0 to 255"),
        ({"codes": torch.full((1, 2), -1, dtype=torch.int16)}, "codes from -1 to -1"),
    ],
)
def test_codes_that_do_not_fit_are_refused(model, tmp_path, capsys, tensors, sentence):
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out.wav"
    save_file(tensors, codes)
    line = refused(capsys, "decode", codes, out, "--model", model)
    assert sentence in line
    assert "codes.safetensors" in line
    assert not out.exists()


def test_codes_of_another_tokenizer_are_refused(model, tmp_path, capsys, caplog):
    wave, codes = tone(tmp_path / "in.wav"), tmp_path / "codes.safetensors"
    assert main(["audio", "encode", str(wave), str(codes), "--model", str(model)]) == 0
    capsys.readouterr()
    other = AudioTokenizer(AudioTokenizerConfig.from_hf(SMALL)).init_weights(1)
    other.save(tmp_path / "other")
    line = refused(capsys, "decode", codes, tmp_path / "o.wav", "--model", tmp_path / "other")
    assert AudioTokenizer.load(model).fingerprint()[:12] in line
    assert other.fingerprint()[:12] in line
    # Codes that do not say whose they are decode, and the result says that it is not known.
    save_file({"codes": load_file(codes)["codes"].int()}, codes)
    words = ["audio", "decode", str(codes), str(tmp_path / "o.wav"), "--model", str(tmp_path / "other")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["is_tokenizer_known"] is False
    assert "does not say which tokenizer wrote it" in caplog.text


def test_files_that_are_not_codes_are_refused(model, tmp_path, capsys):
    wave = tone(tmp_path / "in.wav")
    assert "not a complete safetensors file" in refused(
        capsys, "decode", wave, tmp_path / "out.wav", "--model", model
    )
    assert "must end in .wav or .flac" in refused(
        capsys, "decode", wave, tmp_path / "out.mp3", "--model", model
    )


def test_a_failed_write_leaves_what_was_there(model, tmp_path, monkeypatch, capsys):
    wave, codes = tone(tmp_path / "in.wav"), tmp_path / "codes.safetensors"
    codes.write_text("earlier")

    def fails(*args: object, **kwargs: object) -> None:
        Path(args[1]).write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr("sateen.engine.audio.codec.save_file", fails)
    assert main(["audio", "encode", str(wave), str(codes), "--model", str(model)]) == 1
    assert "disk full" in capsys.readouterr().err
    assert codes.read_text() == "earlier"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes.safetensors", "in.wav"]
