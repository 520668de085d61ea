"""The recorded speech of a run: each source's waveforms, written once into the run folder and opened by both
audio stages.
"""

from __future__ import annotations

from typing import NamedTuple

from sateen.config import SpeechSource, StageContext
from sateen.data.audio import Clip, WaveFile, speech_clips, split_clips, write_waves
from sateen.errors import ConfigError


class SpeechData(NamedTuple):
    """One source of a stage.

    Attributes:
        name: as in the recipe.
        weight: its share.
        train: clips to learn from.
        heldout: clips of other prompts; None where the source holds out none.
    """

    name: str
    weight: float
    train: WaveFile
    heldout: WaveFile | None


def clips_of(source: SpeechSource) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out clips of a source."""
    clips = speech_clips(source.path, languages=source.languages, max_seconds=source.max_seconds)
    return split_clips(clips, source.heldout_share)


def prepare_waves(context: StageContext, sample_rate: int) -> list[SpeechData]:
    """The stage's sources at this sample rate.

    Raises:
        ConfigError: a source is no speech, holds none, or was prepared at another rate.
    """
    found = []
    for name, weight in context.config.source_weights(context.stage).items():
        source = context.config.data[name]
        if weight == 0:
            continue
        if not isinstance(source, SpeechSource):
            raise ConfigError(
                f"data source {name} is {source.kind!r}, and stage {context.stage.stage} listens to speech; "
                "name its sources in the stage"
            )
        train, kept_back = (context.folder / "data" / f"{name}-{part}" for part in ("waves", "waves-heldout"))
        if not train.is_dir():
            context.progress.note(f"preparing the waveforms of {name}")
            clips, heldout = clips_of(source)
            if not clips:
                raise ConfigError(f"data source {name} holds out all of its clips; lower heldout_share")
            if heldout and not kept_back.is_dir():
                write_waves(kept_back, heldout, sample_rate)
            # Last, because its presence says that the source is ready.
            write_waves(train, clips, sample_rate)
        waves = WaveFile(train)
        if waves.sample_rate != sample_rate:
            raise ConfigError(f"{train} is sampled at {waves.sample_rate} Hz, not {sample_rate}; delete it")
        heldout_waves = WaveFile(kept_back) if kept_back.is_dir() else None
        found.append(SpeechData(name, weight, waves, heldout_waves))
    return found
