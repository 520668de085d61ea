"""The model families and presets by name; a family is loaded when a config asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from sateen.errors import ConfigError, unknown_name
from sateen.models.base import Family
from sateen.models.presets import PRESETS

FAMILIES = {
    "llama": "sateen.models.llama",
    "mistral": "sateen.models.llama",
    "qwen2": "sateen.models.llama",
    "qwen3": "sateen.models.llama",
    "mimo": "sateen.models.mimo",
    "mimo_v2_flash": "sateen.models.mimo_v2_flash",
}


def family(raw: Mapping[str, Any], origin: str) -> Family:
    """The family of a config dictionary.

    Raises:
        ConfigError: `model_type` is missing or unknown.
    """
    name = raw.get("model_type") or ""
    # The first remote code of MiMo-V2-Flash left model_type empty; its architecture still tells.
    if not name and raw.get("architectures") == ["MiMoV2FlashForCausalLM"]:
        name = "mimo_v2_flash"
    if name not in FAMILIES:
        raise ConfigError(f"{origin}: {unknown_name('model_type', str(name), FAMILIES)}")
    chosen: Family = import_module(FAMILIES[name]).FAMILY
    return chosen


def preset(name: str) -> dict[str, Any]:
    """The config dictionary of a preset.

    Raises:
        ConfigError: no preset has this name; the message lists them.
    """
    if name not in PRESETS:
        raise ConfigError(unknown_name("preset", name, PRESETS))
    return dict(PRESETS[name])
