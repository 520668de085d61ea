"""Models between full-precision masters, quantised masters and packed two-bit weights.

Every function builds another `Decoder` that shares the tensors it can with the one it was given.
"""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import Tensor

from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.quant_config import KEY, read_quant, write_quant
from sateen.nn.quant import (
    Fairy2iLinear,
    LowbitLinear,
    PackedLinear,
    PackedPhaseLinear,
    PhaseLinear,
    QuantLinear,
)
from sateen.nn.spec import QuantSpec


def with_quant(config: ModelConfig, quant: QuantSpec | None) -> ModelConfig:
    """The same shape with another `quantization_config`, or with none.

    Raises:
        ConfigError: a setting that `config.json` may not have either.
    """
    raw = copy.deepcopy(dict(config.raw))
    raw.pop(KEY, None)
    if quant is not None:
        raw[KEY] = write_quant(quant)
        read_quant(raw[KEY], "settings")
    elif ModelConfig.from_hf(raw).quant is not None:
        raw[KEY] = {"quant_method": "none"}  # a family that quantises unless it is told not to
    return replace(config, raw=raw, quant=quant)


def quantize_model(model: Decoder, quant: QuantSpec) -> Decoder:
    """The model with quantised linear layers, the given weights as their masters.

    Raises:
        ConfigError: the model is quantised in another way, or has nothing to quantise.
    """
    have = model.config.quant
    if have == quant:
        return model
    if have is not None:
        raise ConfigError(
            f"the model has {have.method} weights{' already, packed' if have.packed else ' already'}; "
            "take them off first with `sateen convert SRC DST --weights float`"
        )
    return _with_tensors(with_quant(model.config, quant), _tensors(model), model)


def convert_fairy2i(model: Decoder, stages: int = 2) -> Decoder:
    """The model in Fairy2i's widely-linear two-bit form, its weights as masters, for training or packing.

    Args:
        stages: bits per weight of the linear layers.

    Raises:
        ConfigError: see `quantize_model`.
    """
    return quantize_model(model, QuantSpec("fairy2i", stages=stages, act="float"))


def pack_model(model: Decoder) -> Decoder:
    """The model with stored codes and scales in place of its quantised masters; it serves, and cannot train.

    Raises:
        ConfigError: the model has no quantised weights.
    """
    quant = model.config.quant
    if quant is None:
        raise ConfigError(
            "only quantised weights can be packed and this model has none; `sateen convert SRC DST --weights "
            "fairy2i` quantises those of a real model, the `qat` stage trains them"
        )
    if quant.packed:
        return model
    tensors = _tensors(model)
    for name, module in model.named_modules():
        if isinstance(module, PhaseLinear | Fairy2iLinear | LowbitLinear):
            packed = module.pack()
            for leaf in ("weight", "weight_real", "weight_imag"):
                tensors.pop(f"{name}.{leaf}", None)
            tensors |= {f"{name}.codes": packed.codes, f"{name}.scales": packed.scales}
    return _with_tensors(with_quant(model.config, replace(quant, packed=True)), tensors, model).eval()


def unquantize_model(model: Decoder) -> Decoder:
    """The model in floating point: its masters as they are, or the values that its packed weights stand for.

    Raises:
        ConfigError: the model has no quantised weights.
    """
    quant = model.config.quant
    if quant is None:
        raise ConfigError("the model has no quantised weights to take off")
    tensors = _tensors(model)
    dtype = model.model.embed_tokens.weight.dtype
    for name, module in model.named_modules():
        if not isinstance(module, PackedLinear):
            continue
        del tensors[f"{name}.codes"], tensors[f"{name}.scales"]
        if isinstance(module, PackedPhaseLinear):
            re, im = module.quantized_parts()
            tensors |= {f"{name}.weight_real": re.to(dtype), f"{name}.weight_imag": im.to(dtype)}
        else:
            tensors[f"{name}.weight"] = module.quantized_weight().to(dtype)
    return _with_tensors(with_quant(model.config, None), tensors, model)


def linear_bytes(model: Decoder) -> dict[str, int]:
    """What `sateen inspect` says of the quantised layers: `layers`, `weights` (real parameters), `bytes`."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    weights = stored = 0
    for layer in layers:
        if isinstance(layer, PackedLinear):
            weights += layer.num_weights
            stored += layer.stored_bytes
        else:
            masters = [p for name, p in layer.named_parameters() if name != "bias"]
            weights += sum(p.numel() for p in masters)
            stored += sum(p.numel() * p.element_size() for p in masters)
    return {"layers": len(layers), "weights": weights, "bytes": stored}


def _tensors(model: Decoder) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}


def _with_tensors(config: ModelConfig, tensors: dict[str, Tensor], like: Decoder) -> Decoder:
    model = Decoder.build_empty(config).adopt(tensors)
    model.source = like.source
    return model
