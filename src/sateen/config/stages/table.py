"""The table of stages: their settings and their functions.

A new stage is a settings class and a row in `STAGES`. Its function lives in a room above and is imported when
the run reaches it; the runner knows no stage by name.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from sateen.config.base import one_of
from sateen.config.stages.audio import AudioLMStageConfig, AudioTokenizerStageConfig
from sateen.config.stages.base import StageConfig
from sateen.config.stages.context import StageContext
from sateen.config.stages.rl import MOPDConfig, RLConfig
from sateen.config.stages.text import MTPConfig, PretrainConfig, QATConfig, SFTConfig


class Stage(NamedTuple):
    """A row of `STAGES`: the function as `module:function`, and its settings class."""

    function: str
    config: type[StageConfig]


STAGES: dict[str, Stage] = {
    "pretrain": Stage("sateen.train.pretrain:pretrain", PretrainConfig),
    "sft": Stage("sateen.train.sft:sft", SFTConfig),
    "mtp": Stage("sateen.train.mtp:mtp", MTPConfig),
    "qat": Stage("sateen.train.qat:qat", QATConfig),
    "rl": Stage("sateen.post.rl:rl", RLConfig),
    "mopd": Stage("sateen.post.mopd:mopd", MOPDConfig),
    "audio_tokenizer": Stage("sateen.train.audio_tokenizer:audio_tokenizer", AudioTokenizerStageConfig),
    "audio_lm": Stage("sateen.train.audio_lm:audio_lm", AudioLMStageConfig),
}


def _classes() -> dict[str, type[StageConfig]]:
    return {name: stage.config for name, stage in STAGES.items()}


AnyStage = Annotated[StageConfig, one_of("stage", _classes)]


def stage_function(name: str) -> Callable[[StageContext], None]:
    """The function of a stage, importing its room."""
    function: Any = pkgutil.resolve_name(STAGES[name].function)
    return function  # type: ignore[no-any-return]
