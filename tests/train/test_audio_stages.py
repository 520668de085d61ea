"""The audio stages on a tiny run: bit-exact resume with codebooks, what checkpoints hold, what is refused."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sateen.checkpoint import hf
from sateen.checkpoint.audio import load_audio_tokenizer
from sateen.checkpoint.state import latest_checkpoint
from sateen.config import RunConfig, Silent, StageContext, stage_function
from sateen.data.audio import WaveFile
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError
from sateen.train.metrics import read_metrics

TIMES = ("tokens_per_s", "step_s")
SMALL_TOKENIZER = {
    "d_model": 32, "encoder_layers": 2, "encoder_skip_layer_id": 1, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
    "vocoder_dim": 32, "vocoder_intermediate_dim": 64, "vocoder_num_layers": 1, "vocoder_attention_heads": 2,
    "num_quantizers": 3, "codebook_size": [16, 16, 8],
}  # fmt: skip
SMALL_LM = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "audio_channels": 2, "delay_pattern": "0-1",
    "speech_vocab_size": "17-17", "speech_zeroemb_idx": "16-16", "local_dim": 16, "local_layers": 1,
    "local_attn_heads": 2, "local_ffn_dim": 32, "input_local_layers": 1, "input_local_dim": 16,
}  # fmt: skip
STEPS = 8


def recipe(speech: Path, *, lm: dict | None = None, **changes) -> RunConfig:
    """Crops of ten frames, two a batch; codebooks begin at the fifth of eight steps."""
    tokenizer = {
        "stage": "audio_tokenizer", "tokens": 20 * STEPS, "seq_len": 10, "tokens_per_batch": 20,
        "unquantized_tokens": 80, "num_mels": [20], "mel_windows": [320], "text_weight": 1.0,
        "text_layers": 1, "tokenizer": {"preset": "mimo-audio-tokenizer-mini", "overrides": SMALL_TOKENIZER},
    }  # fmt: skip
    audio_lm = {
        "stage": "audio_lm", "tokens": 1200, "seq_len": 150, "tokens_per_batch": 300, "patches_per_batch": 40,
    }  # fmt: skip
    return RunConfig.model_validate(
        {
            "name": "test",
            "seed": 3,
            "threads": 1,
            "model": {"preset": "mimo-audio-mini", "overrides": SMALL_LM | (lm or {})},
            "tokenizer": {"vocab_size": 300},
            "data": {"speech": {"kind": "speech", "path": str(speech), "heldout_share": 0.2}},
            "stages": [tokenizer | changes, audio_lm],
        }
    )


def run(config: RunConfig, folder: Path, index: int = 0, progress=None) -> None:
    folder.mkdir(exist_ok=True)
    stage = config.stages[index]
    stage_function(stage.stage)(StageContext(config, stage, index, folder, progress or Silent()))


class Interrupt(Silent):
    """Presses Ctrl-C after a number of updates."""

    def __init__(self, after: int):
        self.left = after

    def update(self, done: int, **values: float) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)


def assert_same(one: Path, two: Path, *files: str) -> None:
    """Model files, optimizer and random state, counters and metrics, bit for bit."""
    a, b = latest_checkpoint(one), latest_checkpoint(two)
    assert a.progress == b.progress
    x, y = a.tensors(), b.tensors()
    assert [name for name in x | y if not torch.equal(x[name], y[name])] == []
    for file in files:
        p, q = load_file(a.hf / file), load_file(b.hf / file)
        assert [name for name in p | q if not torch.equal(p[name], q[name])] == []
    lines = [[{k: v for k, v in m.items() if k not in TIMES} for m in read_metrics(f)] for f in (one, two)]
    assert lines[0] == lines[1]


@pytest.fixture(scope="module")
def tokenizer_run(made_speech, tmp_path_factory) -> Path:
    """The first stage in one go."""
    folder = tmp_path_factory.mktemp("tokenizer") / "run"
    run(recipe(made_speech), folder)
    return folder


@pytest.fixture(scope="module")
def trained(tokenizer_run, made_speech, tmp_path_factory) -> Path:
    """Both stages, each in one go."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(tokenizer_run, folder, symlinks=True)
    run(recipe(made_speech), folder, 1)
    return folder


@pytest.mark.parametrize("after", [3, 6], ids=["before the codebooks", "behind them"])
def test_a_resumed_tokenizer_equals_an_unbroken_one(after, tokenizer_run, made_speech, tmp_path):
    config = recipe(made_speech)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken", progress=Interrupt(after))
    broken = load_audio_tokenizer(tmp_path / "broken" / "model")
    assert broken.encoder.quantizer.is_initialized == (after > 4)
    run(config, tmp_path / "broken")
    assert_same(tokenizer_run, tmp_path / "broken", "model.safetensors", "text_reader/model.safetensors")


def test_what_a_tokenizer_stage_reports(trained):
    lines = [line for line in read_metrics(trained) if line["stage"] == "audio_tokenizer"]
    assert [line["tokens"] for line in lines] == [20 * i for i in range(1, STEPS + 1)]
    assert all(line["loss_commitment"] == 0 for line in lines[:4])
    assert all(line["loss_commitment"] > 0 for line in lines[4:])
    for line in lines:
        parts = line["loss_reconstruction"] + line["loss_commitment"] + line["loss_text"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert "heldout_loss_reconstruction" in lines[-1]


def test_a_saved_entry_is_its_sum_over_its_smoothed_count(tokenizer_run):
    """By the formula in float64, so that averages and entries go on together from a checkpoint."""
    for book in load_audio_tokenizer(tokenizer_run / "model").encoder.quantizer.codebooks:
        counts, sums = book.cluster_size.double(), book.embed_avg.double()
        total = counts.sum()
        smoothed = (counts + 1e-5) / (total + len(counts) * 1e-5) * total
        torch.testing.assert_close(book.embed.double(), sums / smoothed[:, None], rtol=1e-5, atol=1e-6)
        assert float(book.inited) == 1
        assert float(total) > 0


def test_the_language_model_carries_its_audio_tokenizer(trained):
    model_folder = trained / "model"
    codec = load_audio_tokenizer(trained)
    stage_one = sorted((trained / "checkpoints").glob("step_*"), key=lambda p: int(p.name[5:]))[0]
    original = load_audio_tokenizer(stage_one / "hf")
    assert codec.fingerprint() == original.fingerprint()
    wave = WaveFile(trained / "data" / "speech-waves-heldout").wave(0)
    assert torch.equal(codec.encode(wave), original.encode(wave))
    model = hf.load(model_folder)
    names = {"sosp": "<|sosp|>", "empty": "<|empty|>", "eot": "<|eot|>"}
    tokenizer = Tokenizer.load(model_folder)
    for name, text in names.items():
        assert getattr(model.spec.tokens, name) == tokenizer.token_id(text)
    lines = [line for line in read_metrics(trained) if line["stage"] == "audio_lm"]
    assert lines[-1]["code_nats_per_frame"] == pytest.approx(
        lines[-1]["loss_code_0"] + lines[-1]["loss_code_1"]
    )
    assert lines[-1]["heldout_code_nats_per_frame"] > 0


def test_a_resumed_language_model_equals_an_unbroken_one(trained, tokenizer_run, made_speech, tmp_path):
    config = recipe(made_speech)
    shutil.copytree(tokenizer_run, tmp_path / "run", symlinks=True)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", 1, progress=Interrupt(2))
    run(config, tmp_path / "run", 1)
    assert_same(trained, tmp_path / "run", "model.safetensors", "audio_tokenizer/model.safetensors")


def test_codes_are_those_of_the_tokenizer_and_are_kept(trained):
    codec = load_audio_tokenizer(trained)
    waves = WaveFile(trained / "data" / "speech-waves")
    codes = load_file(trained / "data" / "speech-codes.safetensors")
    assert len(codes) == len(waves.clips)
    for index in (0, len(codes) - 1):
        assert torch.equal(codes[f"{index:06}"].long(), codec.encode(waves.wave(index)))


def test_what_does_not_fit_is_refused(tokenizer_run, made_speech, tmp_path):
    config = recipe(made_speech, lm={"speech_vocab_size": "17-9", "speech_zeroemb_idx": "16-8"})
    with pytest.raises(ConfigError, match="put an audio_tokenizer stage before it"):
        run(config, tmp_path / "none", 1)
    shutil.copytree(tokenizer_run, tmp_path / "run", symlinks=True)
    with pytest.raises(ConfigError, match=r"\(16, 8\) codes.*\(16, 16\)"):
        run(config, tmp_path / "run", 1)
    twice = config.model_copy(update={"stages": (config.stages[0],) * 2})
    with pytest.raises(ConfigError, match="starts from nothing"):
        run(twice, tmp_path / "run", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens_per_batch": 25}, "no whole number of crops"),
        ({"micro_batches": 2}, "move the codebooks more than once"),
        ({"num_mels": [20, 40]}, "1 entries for 2 of num_mels"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message, made_speech):
    with pytest.raises(ValueError, match=message):
        recipe(made_speech, **change)
