"""`sateen audio encode|decode`: sound files to the codes of an audio tokenizer, and back.

Codes travel in a safetensors file: the tensor `codes`, int16 [R, frames], and metadata that says which
tokenizer wrote them. What reads and writes sound is the extra `audio`.
"""

from __future__ import annotations

import json as codec
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from sateen.checkpoint.audio import load_audio_tokenizer
from sateen.checkpoint.shards import open_shard
from sateen.data.audio import audio_libraries, read_wave
from sateen.errors import CheckpointError, ConfigError, ShapeError
from sateen.models.mimo_audio.tokenizer import AudioTokenizer

log = logging.getLogger("sateen.engine")

SOUND_FORMATS = {".wav": "WAV", ".flac": "FLAC"}


class CodeFile(NamedTuple):
    """What a file of codes holds.

    Attributes:
        codes_RT: int64.
        fingerprint: of the tokenizer that wrote them (`AudioTokenizer.fingerprint`), None if not told.
    """

    codes_RT: Tensor
    fingerprint: str | None


def main(action: str, **flags: Any) -> None:
    """Prints what an action of `audio` did, as one line or one JSON object."""
    from sateen.engine.audio.speech import say, transcribe

    as_json = flags.pop("json", False)
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "encode": encode, "decode": decode, "say": say, "transcribe": transcribe,
    }  # fmt: skip
    result = actions[action](**flags)
    print(codec.dumps(result) if as_json else result["text"])


def encode(source: str, out: str, model: str | None = None, quantizers: int | None = None) -> dict[str, Any]:
    """Writes the codes of a sound file and returns what was written.

    Args:
        source: a WAV, FLAC, OGG or MP3 file of any rate and number of channels.
        out: the safetensors file to write.
        model: what `load_audio_tokenizer` takes.
        quantizers: leading residual stages R; all when None.

    Raises:
        ConfigError: no model, not a sound file, an empty or too short one, or too many stages.
        CheckpointError: `model` is no audio tokenizer.
    """
    _refuse_suffix(out, (".safetensors",))
    tokenizer = _load(model)
    config = tokenizer.config
    if quantizers is not None and quantizers > config.num_quantizers:
        raise ConfigError(f"--quantizers {quantizers}: {model} has {config.num_quantizers} stages")
    wave = read_wave(source, config.sampling_rate)
    if len(wave) <= config.nfft // 2:
        raise ConfigError(
            f"{source}: {len(wave)} samples at {config.sampling_rate} Hz; a clip needs more than "
            f"{config.nfft // 2}, half a Fourier transform"
        )
    codes_RT = tokenizer.encode(torch.from_numpy(wave), num_quantizers=quantizers)
    write_codes(Path(out), codes_RT, tokenizer, num_samples=len(wave))
    R, T = codes_RT.shape
    rate = config.token_rate_hz * sum(math.log2(size) for size in config.codebook_size[:R])
    seconds = len(wave) / config.sampling_rate
    return {
        "text": f"{out}: {R} x {T} codes of {seconds:.2f} s, {rate:.0f} bit/s",
        "out": out,
        "codes": [R, T],
        "seconds": seconds,
        "tokens_per_s": config.token_rate_hz,
        "bits_per_s": rate,
        "tokenizer": tokenizer.fingerprint(),
    }


def decode(source: str, out: str, model: str | None = None) -> dict[str, Any]:
    """Writes the sound that codes stand for, 16-bit at the tokenizer's rate, and returns what was written.

    Args:
        source: a file that `encode` wrote, or another safetensors file with integers `codes` [R, frames].
        out: the .wav or .flac file to write; frames times samples_per_token long.
        model: what `load_audio_tokenizer` takes; it must be the tokenizer that wrote the codes.

    Raises:
        ConfigError: no model, or another kind of output file.
        CheckpointError: not a file of codes, or codes of another tokenizer.
        ShapeError: codes of another shape or range than the tokenizer's.
    """
    _refuse_suffix(out, tuple(SOUND_FORMATS))
    soundfile, _ = audio_libraries()
    tokenizer = _load(model)
    codes_RT, fingerprint = read_codes(Path(source))
    if fingerprint is None:
        log.warning("%s does not say which tokenizer wrote it; reading it as codes of %s", source, model)
    elif fingerprint != tokenizer.fingerprint():
        raise CheckpointError(
            f"{source}: its codes are of the tokenizer {fingerprint[:12]}, and {model} is "
            f"{tokenizer.fingerprint()[:12]}; give the tokenizer that wrote them"
        )
    try:
        wave_N = tokenizer.decode(codes_RT)
    except ShapeError as error:
        raise ShapeError(f"{source}: {error}") from None
    rate = tokenizer.config.sampling_rate
    kind = SOUND_FORMATS[Path(out).suffix.lower()]
    samples = wave_N.clamp(-1, 1).numpy()
    _atomically(
        Path(out), lambda file: soundfile.write(str(file), samples, rate, format=kind, subtype="PCM_16")
    )
    return {
        "text": f"{out}: {len(samples) / rate:.2f} s at {rate} Hz",
        "out": out,
        "samples": len(samples),
        "sample_rate": rate,
        "seconds": len(samples) / rate,
        "is_tokenizer_known": fingerprint is not None,
    }


def write_codes(path: Path, codes_RT: Tensor, tokenizer: AudioTokenizer, *, num_samples: int) -> None:
    """Writes codes and where they came from, atomically.

    Metadata, all strings: `sample_rate` (Hz), `num_samples` of the clip at that rate, `tokens_per_s`,
    `fingerprint` and `config` of the tokenizer.
    """
    if max(tokenizer.config.codebook_size) > torch.iinfo(torch.int16).max:
        raise ConfigError(f"codebooks of {max(tokenizer.config.codebook_size)} entries do not fit int16")
    metadata = {
        "sample_rate": str(tokenizer.config.sampling_rate),
        "num_samples": str(num_samples),
        "tokens_per_s": f"{tokenizer.config.token_rate_hz:g}",
        "fingerprint": tokenizer.fingerprint(),
        "config": codec.dumps(tokenizer.config.to_hf()),
    }
    codes = codes_RT.to("cpu", torch.int16).contiguous()
    _atomically(path, lambda file: save_file({"codes": codes}, file, metadata=metadata))


def read_codes(path: Path) -> CodeFile:
    """The codes of a file.

    Raises:
        CheckpointError: not a safetensors file, or none with a tensor `codes` of integers [R, frames].
    """
    with open_shard(path) as shard:
        names = sorted(shard.keys())
        if "codes" not in names:
            raise CheckpointError(f"{path}: no tensor `codes` (there: {', '.join(names) or 'none'})")
        codes = shard.get_tensor("codes")
        metadata = shard.metadata() or {}
    if codes.ndim != 2 or codes.is_floating_point() or codes.is_complex() or not codes.numel():
        raise CheckpointError(
            f"{path}: `codes` is {codes.dtype} {list(codes.shape)}; accepted: integers [stages, frames]"
        )
    return CodeFile(codes.long(), metadata.get("fingerprint"))


def _load(model: str | None) -> AudioTokenizer:
    if model is None:
        raise ConfigError(
            "no audio tokenizer given; --model takes its directory, a run folder that trained one, or a "
            "model that carries one in audio_tokenizer/"
        )
    return load_audio_tokenizer(model)


def _refuse_suffix(out: str, accepted: tuple[str, ...]) -> None:
    if Path(out).suffix.lower() not in accepted:
        raise ConfigError(f"{out}: the output's name must end in {' or '.join(accepted)}")
    if not Path(out).resolve().parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {Path(out).parent} to write it into")


def _atomically(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
