"""Settings of runs: frozen classes, TOML recipes and their errors. Nothing here imports torch."""

from sateen.config.base import Config
from sateen.config.data import (
    SOURCES,
    ChatTaskSource,
    ModelSource,
    PythonDocsSource,
    Source,
    TaskSource,
    TextDirSource,
    TokenizerConfig,
)
from sateen.config.optim import (
    AdamWConfig,
    ConstantSchedule,
    CosineSchedule,
    LossesConfig,
    MuonConfig,
    OptimizerConfig,
    ScheduleConfig,
    WSDSchedule,
)
from sateen.config.recipe import find_recipe, load_recipe, resolved_toml
from sateen.config.run import RunConfig
from sateen.config.stages import (
    STAGES,
    MTPConfig,
    PretrainConfig,
    Progress,
    RLConfig,
    SFTConfig,
    Silent,
    Stage,
    StageConfig,
    StageContext,
    stage_function,
)

__all__ = [
    "SOURCES",
    "STAGES",
    "AdamWConfig",
    "ChatTaskSource",
    "Config",
    "ConstantSchedule",
    "CosineSchedule",
    "LossesConfig",
    "MTPConfig",
    "ModelSource",
    "MuonConfig",
    "OptimizerConfig",
    "PretrainConfig",
    "Progress",
    "PythonDocsSource",
    "RLConfig",
    "RunConfig",
    "SFTConfig",
    "ScheduleConfig",
    "Silent",
    "Source",
    "Stage",
    "StageConfig",
    "StageContext",
    "TaskSource",
    "TextDirSource",
    "TokenizerConfig",
    "WSDSchedule",
    "find_recipe",
    "load_recipe",
    "resolved_toml",
    "stage_function",
]
