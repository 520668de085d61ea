"""The classes of each model type and their places in transformers' registries."""

from __future__ import annotations

import sys

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sateen.errors import ConfigError, unknown_name
from sateen.models.registry import FAMILIES
from sateen.transformers.config import SateenConfig
from sateen.transformers.model import SateenForCausalLM

TEXT = tuple(name for name in FAMILIES if name != "mimo_audio")
# What stands under `architectures` in published configs; the plain names of the others are their own.
ARCHITECTURES = {
    "complexnet": "ComplexNetLM",
    "hysparse": "HySparseForCausalLM",
    "mimo": "MiMoForCausalLM",
    "mimo_v2_flash": "MiMoV2FlashForCausalLM",
}


def register(*model_types: str) -> None:
    """Makes AutoConfig and AutoModelForCausalLM read these types with our classes, for this process.

    Importing `sateen.transformers` does it for the types that transformers lacks. Calling it for
    `mimo_v2_flash` keeps that family's MTP heads and reads the hub's spelling of its config whatever its
    values.

    Raises:
        ConfigError: a type that has no family here, or one that is more than a text model.
    """
    for name in model_types:
        if name not in TEXT:
            raise ConfigError(unknown_name("text model_type", name, TEXT))
        model_name = ARCHITECTURES.get(name, f"{name.title()}ForCausalLM")
        config_name = f"{model_name.removesuffix('ForCausalLM').removesuffix('LM')}Config"
        home = {"__module__": __package__}
        config_class = type(config_name, (SateenConfig,), home | {"model_type": name})
        model_class = type(model_name, (SateenForCausalLM,), home | {"config_class": config_class})
        # Where pickle looks for them.
        setattr(sys.modules[__package__], config_name, config_class)
        setattr(sys.modules[__package__], model_name, model_class)
        AutoConfig.register(name, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)


def register_missing() -> None:
    """`register` for the types that transformers lacks."""
    register(*(name for name in TEXT if name not in CONFIG_MAPPING))
