"""Decoding in portions: equal to decoding at once where it can be, and to the published bookkeeping."""

from __future__ import annotations

import pytest
import torch

from sateen.errors import ConfigError
from sateen.models.mimo_audio.streaming import StreamingDecoder
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.models.mimo_audio.tokenizer_config import AudioTokenizerConfig, audio_tokenizer_preset

SMALL = audio_tokenizer_preset("mimo-audio-tokenizer-mini").to_hf() | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "vocoder_dim": 32,
    "vocoder_num_layers": 2,
}


@pytest.fixture(scope="module")
def tokenizer() -> AudioTokenizer:
    return AudioTokenizer(AudioTokenizerConfig.from_hf(SMALL)).init_weights(0).eval()


def codes_of(tokenizer: AudioTokenizer, num_tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    sizes = tokenizer.config.codebook_size
    return torch.stack([torch.randint(c, (num_tokens,), generator=generator) for c in sizes])


def stream(decoder: StreamingDecoder, codes: torch.Tensor, portions: list[int]) -> list[torch.Tensor]:
    parts = codes.split(portions, dim=1)
    return [decoder.push(part, is_last=i == len(parts) - 1) for i, part in enumerate(parts)]


@pytest.mark.parametrize("portions", [[30], [1] * 30, [10, 20], [6, 0, 1, 13, 10], [29, 1], [30, 0]])
def test_with_frozen_norms_a_stream_equals_decoding_at_once(tokenizer, portions):
    codes = codes_of(tokenizer, 30)
    statistics = tokenizer.decoder.statistics(tokenizer.encoder.quantizer.decode(codes)[None])
    whole = tokenizer.decode(codes)
    waves = stream(StreamingDecoder(tokenizer, statistics=statistics), codes, portions)
    joined = torch.cat(waves)
    assert joined.shape == whole.shape == (30 * 640,)
    assert (joined - whole).abs().max() < 1e-6
    # Nothing is emitted before the vocoder's windows (2 x 10 frames) and overlap (2 frames) are known.
    assert StreamingDecoder(tokenizer).right_overlap == 6
    seen = 0
    for size, wave in list(zip(portions, waves, strict=True))[:-1]:
        before, seen = seen, seen + size
        assert len(wave) == (max(seen - 6, 0) - max(before - 6, 0)) * 640


def test_one_token_less_held_back_is_not_enough(tokenizer):
    codes = codes_of(tokenizer, 30)
    statistics = tokenizer.decoder.statistics(tokenizer.encoder.quantizer.decode(codes)[None])
    decoder = StreamingDecoder(tokenizer, statistics=statistics, right_overlap=5)
    difference = (torch.cat(stream(decoder, codes, [15, 15])) - tokenizer.decode(codes)).abs()
    wrong = difference > 2e-6  # twice what counts as equal above
    # Only the end of the first portion: the samples that overlap with the next two frames.
    assert wrong.any()
    assert wrong.nonzero().min() >= 10 * 640 - 240
    assert wrong.nonzero().max() < 10 * 640


def test_without_frozen_norms_a_stream_differs_by_the_norms_alone(tokenizer):
    codes = codes_of(tokenizer, 40)
    whole = tokenizer.decode(codes)
    joined = torch.cat(stream(StreamingDecoder(tokenizer), codes, [20, 20]))
    assert joined.shape == whole.shape
    assert (joined - whole).abs().max() > 1e-4
    # The first portion is what the first 20 tokens give by themselves, less what is held back.
    assert torch.allclose(joined[: 14 * 640], tokenizer.decode(codes[:, :20])[: 14 * 640], atol=1e-6)


def test_a_long_stream_keeps_its_left_context_only(tokenizer):
    """The published bookkeeping, written out over a list of tokens."""
    codes = codes_of(tokenizer, 60)
    left, right, step = 12, 7, 640
    decoder = StreamingDecoder(tokenizer, left_context=left, right_overlap=right)
    waves = stream(decoder, codes, [5, 9, 1, 20, 3, 22])
    remembered, emitted, position = [], 0, 0
    for size, wave, is_last in zip([5, 9, 1, 20, 3, 22], waves, [False] * 5 + [True], strict=True):
        remembered += range(position, position + size)
        position += size
        total = len(remembered)
        if not is_last and total <= right:
            assert len(wave) == 0
            continue
        whole = tokenizer.decode(codes[:, remembered])
        end = total if is_last else total - right
        assert torch.allclose(wave, whole[emitted * step : end * step], atol=1e-6)
        if total > left:
            remembered, emitted = remembered[-left:], end - (total - left)
        else:
            emitted = end
    assert sum(len(wave) for wave in waves) == 60 * step


def test_a_stream_takes_few_codebooks_and_starts_anew_after_its_end(tokenizer):
    codes = codes_of(tokenizer, 12)[:2]
    decoder = StreamingDecoder(tokenizer)
    for _ in range(2):
        assert torch.allclose(torch.cat(stream(decoder, codes, [4, 8])), tokenizer.decode(codes), atol=1e-6)


@pytest.mark.parametrize(("left", "right"), [(10, 11), (10, -1)])
def test_contexts_that_cannot_be_are_refused(tokenizer, left, right):
    with pytest.raises(ConfigError, match=f"right_overlap {right} and left_context {left}"):
        StreamingDecoder(tokenizer, left_context=left, right_overlap=right)
