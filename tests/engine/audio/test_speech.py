"""`sateen audio say|transcribe` with a fresh small model: files out, words out, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile", reason="needs the extra audio")

from sateen.checkpoint import hf  # noqa: E402
from sateen.checkpoint.audio import SUBFOLDER, AudioTokenizer  # noqa: E402
from sateen.cli import main  # noqa: E402
from sateen.data.tokenizer import CHATML_TOKENS, Tokenizer  # noqa: E402
from sateen.models.base import ModelConfig  # noqa: E402
from sateen.models.decoder import Decoder  # noqa: E402
from sateen.models.mimo_audio.lm import AudioLM  # noqa: E402
from sateen.models.mimo_audio.tokenizer_config import (  # noqa: E402
    AudioTokenizerConfig,
    audio_tokenizer_preset,
)
from sateen.models.mimo_audio_lm import TOKEN_STRINGS  # noqa: E402
from sateen.models.registry import preset  # noqa: E402

CODEC = audio_tokenizer_preset("mimo-audio-tokenizer-mini").to_hf() | {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "vocoder_dim": 16, "vocoder_num_layers": 1,
}  # fmt: skip
LM = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "local_dim": 16, "local_attn_heads": 4, "local_ffn_dim": 20,
    "local_layers": 1, "input_local_layers": 1, "input_local_dim": 16, "vocab_size": 280,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizers; behind text it says a patch, behind a patch anything."""
    folder = tmp_path_factory.mktemp("speech")
    Tokenizer.train(["say that again"] * 4, 275, (*CHATML_TOKENS, *TOKEN_STRINGS)).save(folder / "text")
    built = Decoder.build(ModelConfig.from_hf(preset("mimo-audio-mini") | LM))
    assert isinstance(built, AudioLM)
    built.init_weights(0, zero_outputs=True)
    with torch.no_grad():
        built.model.embed_tokens.weight.fill_(1.0)
        built.speech_group_downcast.weight.zero_()
        built.lm_head.weight.zero_()
        built.lm_head.weight[built.spec.tokens.empty] = 1.0
    hf.save(built, folder / "model", carry_from=folder / "text")
    AudioTokenizer(AudioTokenizerConfig.from_hf(CODEC)).init_weights(0).save(folder / "model" / SUBFOLDER)
    return folder / "model"


def test_say_writes_the_sound_of_its_patches(model, tmp_path, capsys):
    """A patch is 4 frames of 640 samples; 32 positions are 5.12 s, about half of them patches."""
    out = tmp_path / "out.wav"
    words = ["audio", "say", "that", str(out), "--model", str(model), "--seconds", "5.12", "--json"]
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    wave, rate = soundfile.read(out)
    assert rate == told["sample_rate"] == 16000
    assert len(wave) == round(told["seconds"] * 16000)
    assert len(wave) % 2560 == 0
    assert 0 < len(wave) // 2560 <= 32
    first = out.read_bytes()
    assert main(words) == 0
    assert out.read_bytes() == first


def test_transcribe_prints_text(model, tmp_path, capsys):
    sound = tmp_path / "in.wav"
    soundfile.write(sound, 0.3 * np.sin(np.arange(16000) / 8), 16000)
    assert (
        main(["audio", "transcribe", str(sound), "--model", str(model), "--max-tokens", "5", "--json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["codes"] == [8, 26]
    assert told["seconds"] == 1.0
    assert isinstance(told["text"], str)


def test_what_does_not_belong_together_is_refused(model, tmp_path, capsys):
    out = str(tmp_path / "out.wav")
    assert main(["audio", "say", "hi", out]) == 2
    assert "--model" in capsys.readouterr().err
    assert main(["audio", "say", "hi", str(tmp_path / "out.mp3"), "--model", str(model)]) == 2
    assert ".wav" in capsys.readouterr().err
    small = tmp_path / "codec"
    AudioTokenizer(AudioTokenizerConfig.from_hf(CODEC | {"codebook_size": [16] * 8})).init_weights(0).save(
        small
    )
    assert main(["audio", "say", "hi", out, "--model", str(model), "--tokenizer", str(small)]) == 2
    assert "codebooks" in capsys.readouterr().err
    assert not Path(out).exists()
