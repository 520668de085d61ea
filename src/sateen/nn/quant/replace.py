"""Which layers of a model get two-bit weights, and how a built model gets them.

`Decoder` calls `quantize_linears` once; `models.quantize` packs. Embeddings, norms and routers are no linear
layers and stay; stacks of experts are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import nn

from sateen.errors import ConfigError
from sateen.nn.complex import ComplexLinear
from sateen.nn.moe import Experts
from sateen.nn.quant.fairy import Fairy2iLinear, PackedFairy2iLinear, PackedPhaseLinear, PhaseLinear
from sateen.nn.quant.lowbit import LowbitLinear, PackedLowbitLinear
from sateen.nn.quant.rounding import QuantLinear
from sateen.nn.spec import QuantSpec

log = logging.getLogger("sateen.nn")


class Method(NamedTuple):
    """The layers a method applies to, and what stands for them with masters and packed."""

    applies_to: type[nn.Module]
    masters: Callable[[Any, QuantSpec], QuantLinear]
    packed: Callable[[Any, QuantSpec], QuantLinear]


METHODS = {
    "phase": Method(ComplexLinear, PhaseLinear, PackedPhaseLinear),
    "fairy2i": Method(nn.Linear, Fairy2iLinear, PackedFairy2iLinear),
    "ternary": Method(nn.Linear, LowbitLinear, PackedLowbitLinear),
    "int2": Method(nn.Linear, LowbitLinear, PackedLowbitLinear),
}


def quantize_linears(model: nn.Module, quant: QuantSpec) -> None:
    """Replaces the model's linear layers in place; parameters keep their names and, unpacked, their tensors.

    `fairy2i` leaves layers of an odd size alone and logs them. An output matrix is quantised only when
    `skip` does not name it, and its input is never rounded, because the losses read the matrix alone
    (source: ours).

    Raises:
        ConfigError: nothing to quantise, a stack of experts, a tied output matrix, or a name to skip that
            names nothing.
    """
    method = METHODS[quant.method]
    names = [name for name, _ in model.named_modules() if name]
    for piece in quant.skip:
        if not any(_is_named(name, piece) for name in names):
            raise ConfigError(
                f"quantization_config.modules_to_not_convert: no module has {piece!r} in its name; names are "
                f"like {names[len(names) // 2]}"
            )
    chosen = {
        name: module
        for name, module in model.named_modules()
        if not any(_is_named(name, piece) for piece in quant.skip)
    }
    if stack := next((name for name, module in chosen.items() if isinstance(module, Experts)), None):
        raise ConfigError(
            f"{quant.method} weights are not there for stacked experts ({stack}); add 'experts' to "
            "modules_to_not_convert to leave them as they are"
        )
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    odd, count = [], 0
    for name, module in chosen.items():
        if not isinstance(module, method.applies_to) or isinstance(module, QuantLinear):
            continue
        weight = getattr(module, "weight", None)
        if id(weight) in tied:
            raise ConfigError(
                f"{name} is the embedding too (tie_word_embeddings), which is not quantised; add {name!r} to "
                "modules_to_not_convert"
            )
        if quant.method == "fairy2i" and weight is not None and any(size % 2 for size in weight.shape):
            odd.append(name)
            continue
        own = replace(quant, act="float") if name == "lm_head" else quant
        make = method.packed if quant.packed else method.masters
        _replace(model, name, make(module, own))
        count += 1
    if odd:
        log.info("fairy2i: %d layers of an odd size stay as they are: %s", len(odd), ", ".join(odd[:5]))
    if not count:
        what = "complex layers; fairy2i is for real ones" if quant.method == "phase" else "real linear layers"
        raise ConfigError(f"quant_method {quant.method!r} found nothing to quantise; it is for {what}")


def _is_named(name: str, piece: str) -> bool:
    """Whether the dotted `piece` stands somewhere in the dotted `name`."""
    return f".{piece}." in f".{name}."


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
