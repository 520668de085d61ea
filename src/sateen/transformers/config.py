"""Our `config.json` as a config of transformers, and what of a changed one is saved."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedConfig

from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder


class SateenConfig(PreTrainedConfig):
    """A `config.json` of ours with its words as attributes; no word is renamed or filled in."""

    rope_scaling: Any = None

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        return kwargs

    def validate_layer_type(self) -> None:
        """Nothing: the family knows its kinds of layers."""


def check_same_model(config: PreTrainedConfig, decoder: Decoder) -> None:
    """Nothing, if both describe the same model.

    Raises:
        ConfigError: it names what differs.
    """
    words = config.to_diff_dict()
    asked, stored = ModelConfig.from_hf(words, origin="config"), decoder.config
    if asked.mtp is None and "num_nextn_predict_layers" not in words:
        asked = replace(asked, mtp=stored.mtp)  # the heads were counted from the tensors
    if replace(asked, raw={}) != replace(stored, raw={}):
        names = (field.name for field in fields(ModelConfig) if field.name != "raw")
        differs = [name for name in names if getattr(asked, name) != getattr(stored, name)]
        raise ConfigError(f"config: {', '.join(differs)} differ from those of the model it is used with")


def config_with(config: PreTrainedConfig, decoder: Decoder) -> ModelConfig:
    """The decoder's config with what the user changed in transformers', such as token ids."""
    check_same_model(config, decoder)
    raw = decoder.config.to_hf()
    changed = {key: value for key, value in config.to_diff_dict().items() if raw.get(key) != value}
    if "torch_dtype" in raw:
        changed.pop("dtype", None)
    return replace(decoder.config, raw=raw | changed)
