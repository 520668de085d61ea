"""The `qat` stage: the model goes on training with two-bit weights in its linear layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from sateen.checkpoint.load import load
from sateen.checkpoint.shards import resolve
from sateen.config import QATConfig, StageContext
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError
from sateen.models.decoder import Decoder
from sateen.models.quant_config import default_spec
from sateen.models.quantize import quantize_model
from sateen.nn.spec import QuantSpec
from sateen.train.objective import TokenObjective
from sateen.train.pretrain import cross_entropy_objective
from sateen.train.text import train_text


def qat(context: StageContext) -> None:
    """Quantises the run's model, or the one that the stage names, and trains its masters on text.

    Raises:
        ConfigError: the model cannot take the method, or the stage names a model and is not the first.
    """
    stage = context.stage
    assert isinstance(stage, QATConfig)
    if stage.model is not None and context.stage_index:
        raise ConfigError(
            f"stages.{context.stage_index}.model = {str(stage.model)!r} would drop what the stages before "
            "trained; leave it out, or make qat the first stage"
        )

    def objective(model: Decoder) -> TokenObjective:
        return cross_entropy_objective(context)

    def adapt(model: Decoder) -> Decoder:
        if stage.model is not None:
            source = resolve(stage.model)
            given = load(source, dtype=torch.float32, device=context.config.device)
            _refuse_other_shape(model, given, source)
            _refuse_other_tokenizer(context.folder / "tokenizer", source)
            model = given
        return quantize_model(model, quant_spec(stage))

    train_text(context, objective, adapt=adapt)


def quant_spec(stage: QATConfig) -> QuantSpec:
    """What the stage's settings ask for."""
    spec = replace(default_spec(stage.method), skip=stage.skip)
    if stage.method == "fairy2i":
        spec = replace(spec, stages=stage.num_stages)
    return spec if stage.activations == "auto" else replace(spec, act=stage.activations)


def _refuse_other_shape(described: Decoder, given: Decoder, source: Path) -> None:
    """The recipe's `model` says what the run's model is, so both must agree."""
    ours, theirs = (
        (config.specs, config.vocab_size, config.hidden_size, config.tie_word_embeddings)
        for config in (described.config, given.config)
    )
    if ours != theirs:
        raise ConfigError(
            f"{source} is no model of the shape that the recipe's `model` describes; set model.config to its "
            "config.json"
        )


def _refuse_other_tokenizer(ours: Path, source: Path) -> None:
    """Ids of another vocabulary would train a model of nonsense."""
    has_one = (source / "tokenizer.json").is_file()
    if has_one and Tokenizer.load(source).fingerprint != Tokenizer.load(ours).fingerprint:
        raise ConfigError(f"the run's tokenizer is not that of {source}; set tokenizer.path to it")
