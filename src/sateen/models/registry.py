"""The model families and presets by name: one line each. A family is loaded when a config asks for it."""

from __future__ import annotations

from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.presets import PRESETS

FAMILIES = {
    "complexnet": "sateen.models.fairy",
    "hysparse": "sateen.models.hysparse",
    "llama": "sateen.models.llama",
    "mistral": "sateen.models.llama",
    "qwen2": "sateen.models.llama",
    "qwen3": "sateen.models.llama",
    "mimo": "sateen.models.mimo",
    "mimo_audio": "sateen.models.mimo_audio_lm",
    "mimo_v2_flash": "sateen.models.mimo_v2_flash",
}


def preset(name: str) -> dict[str, Any]:
    """The config dictionary of a preset.

    Raises:
        ConfigError: no preset has this name; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return dict(PRESETS[name])
