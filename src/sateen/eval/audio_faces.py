"""`sateen eval RUN --tasks audio`: what a run on speech learnt, measured on the clips it held out."""

from __future__ import annotations

import json as codec
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sateen.checkpoint import hf
from sateen.checkpoint.audio import load_audio_tokenizer
from sateen.checkpoint.shards import read_config, resolve
from sateen.data.audio import WaveFile
from sateen.errors import ConfigError
from sateen.eval import audio, code_prediction
from sateen.eval.mel_codec import MelCodec
from sateen.models.mimo_audio.lm import AudioLM
from sateen.models.mimo_audio.tokenizer import AudioTokenizer
from sateen.train.audio_documents import encode_clips

AUDIO = "audio"
SHORTEST_S = 1.5
CLIPS_PER_LANGUAGE = 12
HELDOUT = "-waves-heldout"


def main(run: str, *, json: bool = False) -> int:
    """Prints reconstruction by language, the use of the codebooks and the prediction of codes.

    Args:
        run: a run folder with an audio stage; its held-out clips are used.
        json: print JSON with the keys of a receipt's `quality`.

    Raises:
        ConfigError: the run held out no speech.
        CheckpointError: it has no audio tokenizer.
    """
    folder = Path(run)
    sources = sorted(path.name.removesuffix(HELDOUT) for path in folder.glob(f"data/*{HELDOUT}"))
    if not sources:
        raise ConfigError(f"{run}: no held-out speech in its data; give the run folder of an audio recipe")
    tokenizer = load_audio_tokenizer(folder)
    waves = {name: WaveFile(folder / "data" / f"{name}{HELDOUT}") for name in sources}
    train = [WaveFile(folder / "data" / f"{name}-waves") for name in sources]
    quality = {AUDIO: measure(tokenizer, train, list(waves.values()))}
    target = resolve(folder)
    if read_config(target).get("audio_channels"):
        model = hf.load_model(target)
        assert isinstance(model, AudioLM)
        quality[AUDIO]["code_prediction"] = _prediction(folder, sources, waves, tokenizer, model)
    print(codec.dumps(quality, indent=2) if json else "\n".join(lines(quality[AUDIO])))
    return 0


def measure(
    tokenizer: AudioTokenizer, train: Sequence[WaveFile], files: Sequence[WaveFile]
) -> dict[str, Any]:
    """Reconstruction of some clips of each language, and the use of the codebooks over all of them.

    Args:
        tokenizer: what is measured.
        train: clips that the baseline's codebooks are made of.
        files: held-out clips.
    """
    config = tokenizer.config
    codec = MelCodec(audio.measure_settings(config.sampling_rate), config.codebook_size)
    _talk("k-means of mel patches, the baseline of the same bit rate")
    codec.fit(_mixed(train))
    by_language: dict[str, list[Tensor]] = {}
    for file in files:
        for index, clip in enumerate(file.clips):
            if clip.seconds >= SHORTEST_S:  # STOI needs a few hundred milliseconds of speech
                by_language.setdefault(clip.language, []).append(file.wave(index))
    rows, codes = {}, []
    for language, waves in sorted(by_language.items()):
        chosen = waves[:: -(-len(waves) // CLIPS_PER_LANGUAGE)]
        _talk(f"rebuilding {len(chosen)} held-out clips, language {language}")
        rows[language] = {"n": len(chosen), "rows": audio.reconstruction(tokenizer, chosen, codec)}
        codes += [tokenizer.encode(wave_N) for wave_N in chosen]
    use = audio.code_use(torch.cat(codes, 1), tokenizer.config.codebook_size) if codes else []
    return {"reconstruction": rows, "code_use": use}


def _mixed(files: Sequence[WaveFile]) -> Iterator[Tensor]:
    """All clips, in an order that mixes sets and prompts, the same every time."""
    places = [(file, index) for file in files for index in range(len(file.clips))]
    for position in np.random.default_rng(0).permutation(len(places)):
        file, index = places[int(position)]
        yield file.wave(index)


def _prediction(
    folder: Path,
    sources: Sequence[str],
    waves: dict[str, WaveFile],
    tokenizer: AudioTokenizer,
    model: AudioLM,
) -> dict[str, Any]:
    train: list[Tensor] = []
    heldout: list[Tensor] = []
    for name in sources:
        files = {
            "codes": (WaveFile(folder / "data" / f"{name}-waves"), train),
            "codes-heldout": (waves[name], heldout),
        }
        for part, (wave_file, into) in files.items():
            codes = encode_clips(folder / "data" / f"{name}-{part}.safetensors", wave_file, tokenizer)
            into += [code_RT[: model.spec.channels].T for code_RT in codes]
    _talk(f"predicting the codes of {len(heldout)} held-out clips")
    return code_prediction.code_prediction(model, train, heldout)


def lines(quality: dict[str, Any]) -> list[str]:
    """The measurements for people."""
    out = []
    for language, found in quality["reconstruction"].items():
        out += [f"{language}, {found['n']} held-out clips", *audio.table(found["rows"]), ""]
    out.append(
        "codes in use      "
        + ", ".join(f"{u['used']} of {u['entries']} ({u['perplexity']:.0f})" for u in quality["code_use"])
    )
    if "code_prediction" in quality:
        out += ["", *code_prediction.table(quality["code_prediction"])]
    return out


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
