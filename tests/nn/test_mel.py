"""Mel spectrograms against formulas in numpy float64: no line is shared with the code under test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sateen.errors import ConfigError, ShapeError
from sateen.nn.mel import MelSettings, log_mel, mel_filters, mel_spectrogram

PUBLISHED = MelSettings(24000, 960, 960, 240, 128)
MINI = MelSettings(16000, 640, 640, 160, 80)
OTHERS = [
    PUBLISHED,
    MINI,
    MelSettings(16000, 512, 400, 160, 40, f_min=50.0, f_max=7000.0),  # a window shorter than its transform
    MelSettings(24000, 240, 240, 120, 32, is_normalized=True),
]


def reference(wave: np.ndarray, s: MelSettings) -> np.ndarray:
    """Magnitudes [T, M]: mirrored ends, one discrete Fourier sum per frame, triangles filter by filter."""
    half = s.n_fft // 2
    padded = np.concatenate([wave[1 : half + 1][::-1], wave, wave[-half - 1 : -1][::-1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(s.win_length) / s.win_length)
    if s.is_normalized:
        window = window / math.sqrt(sum(w * w for w in window))
    window = np.pad(window, ((s.n_fft - s.win_length) // 2, (s.n_fft - s.win_length + 1) // 2))
    n, k = np.arange(s.n_fft), np.arange(half + 1)
    fourier = np.exp(-2j * np.pi * np.outer(k, n) / s.n_fft)
    frames = [padded[t * s.hop_length :][: s.n_fft] for t in range(len(wave) // s.hop_length + 1)]
    spectrum = np.abs(np.stack(frames) * window @ fourier.T)
    return spectrum @ triangles(s)


def triangles(s: MelSettings) -> np.ndarray:
    def to_mel(f: float) -> float:
        return 2595 * math.log10(1 + f / 700)

    def to_hz(m: float) -> float:
        return 700 * (10 ** (m / 2595) - 1)

    low, high = to_mel(s.f_min), to_mel(s.f_max or s.sample_rate / 2)
    edges = [to_hz(low + (high - low) * i / (s.n_mels + 1)) for i in range(s.n_mels + 2)]
    filters = np.zeros((s.n_fft // 2 + 1, s.n_mels))
    for bin in range(s.n_fft // 2 + 1):
        f = bin * s.sample_rate / s.n_fft
        for m in range(s.n_mels):
            left, peak, right = edges[m : m + 3]
            if left < f < right:
                filters[bin, m] = (f - left) / (peak - left) if f <= peak else (right - f) / (right - peak)
    return filters


@pytest.mark.parametrize("settings", OTHERS, ids=lambda s: f"{s.n_fft}-{s.n_mels}")
@pytest.mark.parametrize("length", [1, 2, 7.5])
def test_magnitudes_equal_the_formulas(settings, length):
    n = int(settings.n_fft * length) + 1
    wave = np.random.default_rng(0).normal(size=n) * np.linspace(0, 1, n)
    ours = mel_spectrogram(torch.from_numpy(wave)[None], settings)[0]
    theirs = reference(wave, settings)
    assert ours.shape == theirs.shape == (settings.num_frames(n), settings.n_mels)
    assert ours.dtype == torch.float32
    assert np.abs(ours.numpy() - theirs).max() < 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("settings", OTHERS, ids=lambda s: f"{s.n_fft}-{s.n_mels}")
def test_filters_equal_the_triangles(settings):
    assert np.abs(mel_filters(settings).numpy() - triangles(settings)).max() < 1e-12


def test_the_logarithm_is_natural_of_magnitudes_and_floored():
    # A pure tone at the centre of bin 40 (1000 Hz) with amplitude 0.5: a Hann window's sum is n_fft / 2, so
    # that the bin holds 0.5 / 2 * 480 = 120 and each neighbour half of it.
    n = np.arange(24000)
    tone = 0.5 * np.cos(2 * np.pi * 1000 * n / 24000)
    frame = log_mel(torch.from_numpy(tone)[None], PUBLISHED)[0, 50]
    weights = triangles(PUBLISHED)
    expected = 120 * weights[40] + 60 * (weights[39] + weights[41])
    heard = expected > 0.1
    assert heard.sum() >= 2
    assert np.abs(frame.numpy()[heard] - np.log(expected[heard])).max() < 1e-4
    silence = log_mel(torch.zeros(1, 24000), PUBLISHED)
    assert torch.allclose(silence, torch.tensor(math.log(1e-7)))


def test_filters_that_cover_no_bin_stay_in_their_place():
    settings = MelSettings(24000, 480, 480, 240, 128)  # bins of 50 Hz, lowest filters of 31 Hz
    empty = (mel_filters(settings).sum(0) == 0).nonzero()[:, 0].tolist()
    assert empty == np.flatnonzero(triangles(settings).sum(0) == 0).tolist()
    assert empty[:2] == [0, 1]  # they end at 31.7 and 48.1 Hz, before the first bin
    noise = torch.randn(1, 9600, generator=torch.Generator().manual_seed(0))
    assert torch.all(log_mel(noise, settings)[..., empty] == torch.tensor(1e-7).log())


@pytest.mark.parametrize("settings", [PUBLISHED, MINI], ids=["published", "mini"])
def test_the_presets_have_a_bin_in_every_filter(settings):
    assert (mel_filters(settings).sum(0) > 0).all()


def test_gradients_equal_finite_differences():
    settings = MelSettings(800, 32, 32, 8, 6)
    wave = torch.randn(1, 70, generator=torch.Generator().manual_seed(1), requires_grad=True)
    log_mel(wave, settings).sum().backward()
    step = 1e-6
    for i in (0, 1, 33, 69):
        shifted = [wave.detach()[0].double().numpy().copy() for _ in range(2)]
        shifted[0][i] += step
        shifted[1][i] -= step
        up, down = (np.log(np.maximum(reference(w, settings), 1e-7)).sum() for w in shifted)
        assert wave.grad[0, i].item() == pytest.approx((up - down) / (2 * step), rel=2e-3, abs=1e-3)


def test_clips_do_not_mix():
    clips = torch.randn(3, 4000, generator=torch.Generator().manual_seed(2))
    together = log_mel(clips, MINI)
    assert torch.allclose(together[1], log_mel(clips[1:2], MINI)[0], atol=1e-6)


def test_what_does_not_work_is_refused():
    with pytest.raises(ShapeError, match="more than 480 samples"):
        log_mel(torch.zeros(1, 480), PUBLISHED)
    assert log_mel(torch.zeros(1, 481), PUBLISHED).shape == (1, 3, 128)
    with pytest.raises(ShapeError, match=r"\(4800,\)"):
        log_mel(torch.zeros(4800), PUBLISHED)
    with pytest.raises(ConfigError, match="hop 500"):
        MelSettings(16000, 512, 400, 500, 40)
    with pytest.raises(ConfigError, match="7000"):
        MelSettings(16000, 512, 400, 160, 40, f_min=8000, f_max=7000)


@pytest.mark.parametrize("settings", [PUBLISHED, MINI, OTHERS[2]], ids=["published", "mini", "band"])
def test_transformers_agrees(settings):
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    wave = np.random.default_rng(3).normal(size=settings.n_fft * 6 + 7) * 0.1
    filters = mel_filter_bank(
        num_frequency_bins=settings.n_fft // 2 + 1,
        num_mel_filters=settings.n_mels,
        min_frequency=settings.f_min,
        max_frequency=settings.f_max or settings.sample_rate / 2,
        sampling_rate=settings.sample_rate,
        norm=None,
        mel_scale="htk",
    )
    assert np.abs(mel_filters(settings).numpy() - filters).max() < 1e-12
    theirs = spectrogram(
        wave,
        window_function(settings.win_length, "hann", frame_length=settings.n_fft),
        frame_length=settings.n_fft,
        hop_length=settings.hop_length,
        power=1.0,
        mel_filters=filters,
        mel_floor=1e-7,
        log_mel="log",
    )
    ours = log_mel(torch.from_numpy(wave)[None], settings)[0]
    assert np.abs(ours.numpy() - theirs.T).max() < 1e-3
