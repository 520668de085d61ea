"""The stages of a run: their settings, the table of their functions and what a function is given."""

from sateen.config.stages.audio import AudioLMStageConfig, AudioTokenizerStageConfig
from sateen.config.stages.base import StageConfig
from sateen.config.stages.context import Progress, Silent, StageContext
from sateen.config.stages.rl import MOPDConfig, RLConfig
from sateen.config.stages.table import STAGES, AnyStage, Stage, stage_function
from sateen.config.stages.text import MTPConfig, PretrainConfig, QATConfig, SFTConfig

__all__ = [
    "STAGES",
    "AnyStage",
    "AudioLMStageConfig",
    "AudioTokenizerStageConfig",
    "MOPDConfig",
    "MTPConfig",
    "PretrainConfig",
    "Progress",
    "QATConfig",
    "RLConfig",
    "SFTConfig",
    "Silent",
    "Stage",
    "StageConfig",
    "StageContext",
    "stage_function",
]
