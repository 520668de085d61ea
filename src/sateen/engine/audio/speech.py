"""`sateen audio say|transcribe`: an audio language model and its tokenizer, between text and sound files.

The model's directory carries the audio tokenizer in `audio_tokenizer/`; another one can be named.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sateen.checkpoint.audio import load_audio_tokenizer
from sateen.data.audio import audio_libraries, read_wave
from sateen.engine.audio.lm import GREEDY, SPEECH, AudioEngine
from sateen.errors import ConfigError
from sateen.models.mimo_audio.tokenizer import AudioTokenizer


def load(model: str | None, tokenizer: str | None) -> tuple[AudioEngine, AudioTokenizer]:
    """The engine of an audio language model, and the audio tokenizer whose codes it knows.

    Raises:
        ConfigError: no model, a model without an audio side, or codebooks that are not the model's.
        CheckpointError: no audio tokenizer is there.
    """
    if model is None:
        raise ConfigError(
            "no model given; --model takes the directory or run folder of an audio language model"
        )
    engine = AudioEngine(model, max_num_seqs=1)
    codec = load_audio_tokenizer(tokenizer or model)
    spec = engine.model.spec
    if codec.config.codebook_size[: spec.channels] != spec.empty_ids:
        raise ConfigError(
            f"the audio tokenizer's codebooks {codec.config.codebook_size[: spec.channels]} are not the "
            f"model's {spec.empty_ids}; name its own with --tokenizer"
        )
    return engine, codec


def say(
    text: str,
    out: str,
    model: str | None = None,
    tokenizer: str | None = None,
    seconds: float = 20.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a text read aloud and returns what was written.

    Args:
        text: what to say.
        out: the .wav or .flac file to write, 16-bit at the tokenizer's rate.
        model: an audio language model's directory or run folder.
        tokenizer: another audio tokenizer than the model's own.
        seconds: longest answer; text positions count as if they were sound.
        seed: of the random choices.

    Raises:
        ConfigError: no model, another kind of output file, or an answer without sound.
    """
    kind = {".wav": "WAV", ".flac": "FLAC"}.get(Path(out).suffix.lower())
    if kind is None:
        raise ConfigError(f"{out}: the output's name must end in .wav or .flac")
    soundfile, _ = audio_libraries()
    engine, codec = load(model, tokenizer)
    positions_hz = codec.config.token_rate_hz / engine.model.spec.group_size
    most = max(1, round(seconds * positions_hz))
    output = engine.speak(text, replace(SPEECH, max_tokens=most, seed=seed))
    if not len(output.codes_TR):
        raise ConfigError("the model answered without sound; try another seed or text")
    wave_N = codec.decode(output.codes_TR.T.contiguous()).clamp(-1, 1)
    rate = codec.config.sampling_rate
    soundfile.write(out, wave_N.numpy(), rate, format=kind, subtype="PCM_16")
    length = len(wave_N) / rate
    return {
        "text": f"{out}: {length:.2f} s at {rate} Hz ({output.finish_reason})",
        "out": out,
        "seconds": length,
        "sample_rate": rate,
        "said": output.text,
        "finish_reason": output.finish_reason,
    }


def transcribe(
    source: str, model: str | None = None, tokenizer: str | None = None, max_tokens: int = 256
) -> dict[str, Any]:
    """The words of a sound file.

    Args:
        source: a WAV, FLAC, OGG or MP3 file.
        model: an audio language model's directory or run folder.
        tokenizer: another audio tokenizer than the model's own.
        max_tokens: longest answer.

    Raises:
        ConfigError: no model, or not a sound file.
        RequestError: the recording is longer than the model's context.
    """
    engine, codec = load(model, tokenizer)
    rate = codec.config.sampling_rate
    wave = read_wave(source, rate)
    codes_RT = codec.encode(torch.from_numpy(wave), num_quantizers=engine.model.spec.channels)
    text = engine.transcribe(codes_RT.T, replace(GREEDY, max_tokens=max_tokens))
    return {"text": text, "seconds": len(wave) / rate, "codes": list(codes_RT.shape)}
