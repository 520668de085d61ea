"""Measures of rebuilt speech and predicted codes: formulas, hand-worked values and known extremes."""

import math

import numpy as np
import pytest
import torch

from sateen.eval.audio import code_use, log_mel_distance, measure_settings, stoi, table
from sateen.eval.code_prediction import (
    best_copy_shares,
    code_prediction,
    copy_nats,
    unigram_nats,
    unigram_probabilities,
)
from sateen.eval.griffin_lim import averaged, baseline_waves, griffin_lim
from sateen.eval.mel_codec import MelCodec
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.mimo_audio.layout import audio_input, pack
from sateen.models.mimo_audio.lm import AudioLM
from sateen.models.registry import preset
from sateen.nn.mel import log_mel
from sateen.train.code_losses import code_nats

RATE = 16000
SETTINGS = measure_settings(RATE)


def spoken(seconds: float = 1.2) -> torch.Tensor:
    """A voiced sound whose pitch glides and whose level beats like syllables, with some noise."""
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(110 + 30 * np.sin(2 * np.pi * 1.5 * t)) / RATE
    sound = sum(np.sin(k * phase) / k for k in range(1, 30)) * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * t))
    noise = np.random.default_rng(0).normal(0, 0.02, len(t))
    return torch.tensor(0.2 * sound + noise, dtype=torch.float32)


def test_the_distance_of_a_louder_copy_is_the_logarithm_of_its_gain():
    wave = spoken()
    assert log_mel_distance(wave, wave, SETTINGS) == 0
    assert log_mel_distance(wave * 3, wave, SETTINGS) == pytest.approx(math.log(3), rel=1e-4)


def test_stoi_falls_with_noise_and_ignores_level():
    wave, noise = spoken(), torch.randn(19200, generator=torch.Generator().manual_seed(0))
    assert stoi(wave, wave, RATE) == pytest.approx(1, abs=1e-6)
    assert stoi(wave * 0.1, wave, RATE) == pytest.approx(1, abs=1e-6)
    values = [stoi(wave + level * noise, wave, RATE) for level in (0.05, 0.2, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] - values[2] > 0.3


def test_griffin_lim_gives_back_a_sound_with_these_magnitudes():
    wave = spoken()
    window = torch.hann_window(SETTINGS.win_length)
    spectrum = torch.stft(wave, SETTINGS.n_fft, SETTINGS.hop_length, window=window, return_complex=True).abs()

    def error(iterations: int) -> float:
        made = griffin_lim(spectrum.T, SETTINGS, len(wave), num_iterations=iterations)
        again = torch.stft(
            made, SETTINGS.n_fft, SETTINGS.hop_length, window=window, return_complex=True
        ).abs()
        return float((again - spectrum).norm() / spectrum.norm())

    # The theorem of Griffin and Lim: no iteration makes the distance larger.
    errors = [error(iterations) for iterations in (0, 1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


def test_averages_are_means_of_magnitudes():
    frames = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 8.0]])
    expected = torch.tensor([[2.0, 2.0], [2.0, 2.0], [5.0, 8.0]])
    torch.testing.assert_close(averaged(frames.log(), 2), expected.log())
    torch.testing.assert_close(averaged(frames.log(), None), torch.tensor([[3.0, 4.0]] * 3).log())


def test_baselines_are_ordered_by_what_they_keep():
    wave = spoken()
    made = baseline_waves(wave, SETTINGS)
    assert list(made) == ["mel", "mel_25hz", "mel_mean"]
    distances = [log_mel_distance(made_N, wave, SETTINGS) for made_N in made.values()]
    assert distances == sorted(distances)
    assert distances[2] > 2 * distances[0]
    # The mean is all that is left of the last one: its frames hardly differ.
    frames = log_mel(made["mel_mean"][None], SETTINGS)[0][10:-10]
    assert float(frames.std(0).mean()) < 0.5 * float(log_mel(wave[None], SETTINGS)[0].std(0).mean())


def test_the_codec_without_a_network_codes_patches_it_has_seen():
    """With an entry per patch a clip of the training set comes back as from its own mel frames."""
    wave = spoken(0.8)
    rich = MelCodec(SETTINGS, (64, 64)).fit([wave])
    poor = MelCodec(SETTINGS, (2,)).fit([wave])
    own = log_mel_distance(baseline_waves(wave, SETTINGS)["mel"], wave, SETTINGS)
    distance = log_mel_distance(rich.rebuild(wave), wave, SETTINGS)
    assert len(rich.rebuild(wave)) == len(wave)
    assert distance == pytest.approx(own, rel=0.1)
    assert log_mel_distance(poor.rebuild(wave), wave, SETTINGS) > 2 * distance


def test_code_use_by_hand():
    """Four codes equally often are a perplexity of 4; shares 1/2, 1/4, 1/4 of 2^1.5."""
    codes = torch.tensor([[0, 1, 2, 3], [5, 5, 1, 0]])
    first, second = code_use(codes, (8, 6))
    assert first == {"entries": 8, "used": 4, "perplexity": 4.0}
    assert second == {"entries": 6, "used": 3, "perplexity": round(2**1.5, 2)}


def test_predictors_without_a_model_by_hand():
    train = [torch.tensor([[0], [0], [1]])]  # counts 2, 1, 0; each once more: shares 3/6, 2/6, 1/6
    shares = unigram_probabilities(train, (3,))
    torch.testing.assert_close(shares[0], torch.tensor([3, 2, 1], dtype=torch.float64) / 6)
    held = [torch.tensor([[2], [2], [0]]), torch.tensor([[1]])]
    by_hand = -(2 * math.log(1 / 6) + math.log(3 / 6) + math.log(2 / 6)) / 4
    assert float(unigram_nats(held, shares)) == pytest.approx(by_hand)
    copying = -(
        math.log(1 / 6) + math.log(0.5 / 6 + 0.5) + math.log(0.5 * 3 / 6) + math.log(2 / 6)
    ) / 4  # fmt: skip
    assert float(copy_nats(held, shares, torch.tensor([0.5]))) == pytest.approx(copying)
    assert float(copy_nats(held, shares, torch.tensor([0.0]))) == pytest.approx(by_hand)
    # A channel that never repeats gets no share, one that always does the largest.
    clip = torch.tensor([[0, 1], [1, 1], [0, 1], [1, 1], [2, 1]])
    both = unigram_probabilities([clip], (3, 3))
    assert best_copy_shares([clip], both).tolist() == [0.0, 0.95]


@pytest.fixture(scope="module")
def model() -> AudioLM:
    raw = preset("mimo-audio-mini") | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2,
    }  # fmt: skip
    built = Decoder.build(ModelConfig.from_hf(raw)).init_weights(0)
    assert isinstance(built, AudioLM)
    return built


def clips(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (length, 8), generator=generator) for length in lengths]


def test_code_losses_are_the_models_own(model):
    """Whole patches: the mean that training minimises; a cut one: without the frames that fill it up."""
    (codes,) = clips(12)
    own = model.loss_parts(pack(model.spec, [audio_input(model.spec, codes).learnt(model.spec)]))
    expected = torch.stack([own[f"code_{r}"] for r in range(8)]).double()
    torch.testing.assert_close(code_nats(model, [codes]), expected, rtol=1e-5, atol=0)
    cut = codes[:10]
    filled = torch.cat([cut, cut[-1:], cut[-1:]])
    all_twelve = code_nats(model, [filled]) * 12
    ten = code_nats(model, [cut]) * 10
    assert (all_twelve > ten).all()
    torch.testing.assert_close(code_nats(model, [codes, cut]), (expected * 12 + ten) / 22, rtol=1e-5, atol=0)


def test_a_model_that_knows_nothing_pays_for_every_code(model):
    blank = Decoder.build(model.config)
    blank.load_state_dict(model.state_dict())
    for head in blank.local_transformer_lm_heads:
        torch.nn.init.zeros_(head.weight)
    found = code_prediction(blank, clips(40, 30), clips(20, 11))
    sizes = (257, 257, *[65] * 6)
    assert found["model"]["bits"] == [round(math.log2(size), 4) for size in sizes]
    assert found["model"]["bits_per_frame"] == pytest.approx(sum(map(math.log2, sizes)), abs=1e-3)
    assert found["model"]["perplexity"] == pytest.approx(math.prod(sizes) ** (1 / 8), abs=0.01)
    assert found["unigram"]["bits"][0] < 8


def test_the_table_has_a_row_per_way_and_a_dash_for_what_is_missing():
    lines = table({"tokenizer": {"stoi": 0.5, "pesq_wb": 1.5}, "mel": {"stoi": 0.9}})
    assert lines[0].split() == ["stoi", "pesq_wb"]
    assert lines[1].split() == ["tokenizer", "0.500", "1.500"]
    assert lines[2].split() == ["mel", "0.900", "-"]
