"""recipes/audio-tiny.toml in a few steps on sounds made here: it learns, and its checkpoint codes sound."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from sateen.checkpoint.audio import AudioTokenizer, load_audio_tokenizer
from sateen.cli import main
from sateen.config import Silent, load_recipe
from sateen.eval.audio_faces import lines
from sateen.run import run_recipe
from sateen.train.metrics import read_metrics

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
SMALL = (
    "{d_model=48, encoder_layers=2, encoder_skip_layer_id=1, encoder_ffn_dim=96, decoder_layers=1, "
    "decoder_ffn_dim=96, vocoder_dim=48, vocoder_intermediate_dim=96, vocoder_num_layers=2, "
    "num_quantizers=4, codebook_size=[32, 32, 16, 16]}"
)
SMALL_LM = (
    "{vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, "
    'num_key_value_heads=1, head_dim=24, audio_channels=4, delay_pattern="0-1-2-3", '
    'speech_vocab_size="33-33-17-17", speech_zeroemb_idx="32-32-16-16", local_dim=32, local_layers=1, '
    "local_attn_heads=2, local_ffn_dim=64, input_local_layers=1, input_local_dim=32}"
)


@pytest.fixture(scope="module")
def run(made_speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shortened = [
        f"data.speech.path={made_speech}", "data.speech.heldout_share=0.2", "tokenizer.vocab_size=320",
        f"stages.tokenizer.tokenizer.overrides={SMALL}", f"model.overrides={SMALL_LM}",
        "stages.tokenizer.tokens=4800", "stages.tokenizer.unquantized_tokens=2400",
        "stages.tokenizer.seq_len=20", "stages.tokenizer.tokens_per_batch=80",
        "stages.tokenizer.schedule.warmup_tokens=400", "stages.tokenizer.text_weight=1.0",
        "stages.tokenizer.optimizer.learning_rate=0.05",
        "stages.lm.tokens=9000", "stages.lm.tokens_per_batch=300", "stages.lm.seq_len=300",
        "stages.lm.schedule.warmup_tokens=600", "stages.lm.patches_per_batch=48",
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("audio-tiny") / "run"
    run_recipe(load_recipe([RECIPES / "audio-tiny.toml"], shortened), folder, Silent())
    return folder


def test_both_stages_learn(run):
    rows = read_metrics(run)
    tokenizer = [row for row in rows if row["stage"] == "tokenizer"]
    first, last = (
        np.mean([m["loss_reconstruction"] for m in part]) for part in (tokenizer[:3], tokenizer[-5:])
    )
    assert last < 0.6 * first
    codes = [row["code_nats_per_frame"] for row in rows if row["stage"] == "lm"]
    uniform = 2 * np.log(33) + 2 * np.log(17)
    assert codes[0] == pytest.approx(uniform, abs=1.0)
    assert codes[-1] < uniform - 2


def test_the_checkpoint_codes_and_decodes_after_saving_and_loading(run, tmp_path, capsys):
    tokenizer = load_audio_tokenizer(run)
    tokenizer.save(tmp_path / "again")
    again = AudioTokenizer.load(tmp_path / "again")
    wave = torch.sin(torch.arange(16000) * 0.06) * 0.3
    soundfile.write(tmp_path / "in.wav", wave.numpy(), 16000, subtype="FLOAT")
    codes, out = tmp_path / "codes.safetensors", tmp_path / "out.wav"
    assert main(["audio", "encode", str(tmp_path / "in.wav"), str(codes), "--model", str(run)]) == 0
    assert main(["audio", "decode", str(codes), str(out), "--model", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    made, rate = soundfile.read(out, dtype="float32")
    assert rate == 16000
    expected = again.decode(again.encode(wave)).clamp(-1, 1).numpy()
    np.testing.assert_allclose(made, expected, atol=1.1 / 32768)


def test_eval_measures_the_run_on_what_it_held_out(run, capsys):
    assert main(["eval", str(run), "--tasks", "audio", "--json"]) == 0
    quality = json.loads(capsys.readouterr().out)["audio"]
    rows = quality["reconstruction"]["xx"]["rows"]
    assert set(rows) >= {"tokenizer", "tokenizer_1", "mel", "mel_25hz", "mel_mean"}
    assert rows["mel"]["stoi"] > rows["mel_mean"]["stoi"]
    assert rows["mel"]["log_mel_l1"] < rows["tokenizer"]["log_mel_l1"] < rows["mel_mean"]["log_mel_l1"] * 1.5
    assert [use["entries"] for use in quality["code_use"]] == [32, 32, 16, 16]
    prediction = quality["code_prediction"]
    assert prediction["unigram"]["bits_per_frame"] < 18.01
    assert set(prediction) == {"model", "unigram", "copy"}
    told = lines(quality)
    assert any("bits/frame" in line for line in told)
    assert f"{rows['tokenizer']['stoi']:.3f}" in "\n".join(told)
    assert main(["eval", str(run), "--tasks", "audio,perplexity"]) == 2
    assert "stands alone" in capsys.readouterr().err
