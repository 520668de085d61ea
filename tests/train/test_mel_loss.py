"""The reconstruction loss against the formula in numpy, and the reader of transcripts against plain torch."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sateen.nn.attention import Sequences
from sateen.train.mel_loss import mel_scales, multi_scale_mel_loss
from sateen.train.text_reader import TextReader


def mel_numpy(wave: np.ndarray, rate: int, mels: int, window: int) -> np.ndarray:
    """Mel magnitudes [T, mels] in float64: centred Hann frames, window of unit norm, HTK triangles."""
    half = window // 2
    padded = np.pad(wave, half, mode="reflect")
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    hann /= np.sqrt((hann**2).sum())
    frames = range(0, len(wave) + 1, window // 2)
    spectrum = np.abs([np.fft.rfft(padded[i : i + window] * hann) for i in frames])
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    bins = np.linspace(0, rate / 2, window // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return spectrum @ np.maximum(0, np.minimum(rising, falling))


def test_the_loss_is_the_formula():
    rng, rate = np.random.default_rng(0), 16000
    true, made = rng.normal(0, 0.1, (2, 3200)), rng.normal(0, 0.02, (2, 3200))
    expected = []
    for mels, window in ((32, 160), (80, 640)):
        terms = []
        for one, other in zip(made, true, strict=True):
            a, b = mel_numpy(one, rate, mels, window), mel_numpy(other, rate, mels, window)
            log_a, log_b = np.log10(np.maximum(a, 1e-5)), np.log10(np.maximum(b, 1e-5))
            terms.append(np.abs(a - b).mean() + np.abs(log_a - log_b).mean())
        expected.append(np.mean(terms))
    loss = multi_scale_mel_loss(
        torch.tensor(made), torch.tensor(true), mel_scales(rate, (32, 80), (160, 640))
    )
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-5)
    same = torch.tensor(true)
    assert float(multi_scale_mel_loss(same, same, mel_scales(rate, (32,), (160,)))) == 0


def test_the_reader_packs_what_it_could_read_one_by_one():
    """Each text alone, through the transformer and torch's own cross-entropy; silent crops cost nothing."""
    reader = TextReader(32, 2).init_weights(0)
    vectors = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    texts = ("one", None, "жук", "")
    total, count = torch.zeros(()), 0
    for b, text in enumerate(texts):
        if text is None:
            continue
        given = [256, *text.encode()]
        rows = torch.cat(
            [reader.connector(vectors[b]), reader.decoder.model.embed_tokens(torch.tensor(given))]
        )
        seq = Sequences(torch.tensor([0, len(rows)], dtype=torch.int32), torch.arange(len(rows)))
        hidden = reader.decoder.trunk(torch.zeros(len(rows), dtype=torch.int64), seq, embeddings_TD=rows)
        logits = reader.decoder.logits(reader.decoder.head_input(hidden[6:]))
        labels = torch.tensor([*text.encode(), 257])
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        count += len(labels)
    (expected,) = torch.autograd.grad(total / count, vectors, retain_graph=True)
    loss = reader.loss(vectors, texts)
    torch.testing.assert_close(loss, total / count, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, vectors)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    assert gradient[1].abs().max() == 0
    assert gradient[0].abs().max() > 0
    assert float(reader.loss(vectors, (None,) * 4)) == 0
