"""Serving models with weights of eight or four bits, made from a model in floating point.

Nothing is stored in this form: a checkpoint keeps its floats, and `LLM(weights=...)` packs them at its start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from sateen.errors import ConfigError, unknown_name
from sateen.models.decoder import Decoder
from sateen.nn.moe import Experts
from sateen.nn.quant.int8 import IntegerExperts, IntegerHead, IntegerLinear
from sateen.ops.pages import move_to_huge_pages

WEIGHTS = ("int8", "int4")
HEAD = "lm_head"


def lowbit_model(model: Decoder, weights: str, *, in_place: bool = False) -> Decoder:
    """A serving model whose linear layers and experts have weights of eight or four bits.

    The output matrix is int8 with both and reads its inputs more finely, because its errors go straight into
    the logits; where it is tied, the embedding stays beside it as it was. Embeddings, norms, routers and
    biases are shared with the given one.

    Args:
        weights: `int8` or `int4`; see `ops.pack_int8` and `ops.pack_int4`.
        in_place: change `model` itself, so that each matrix in floating point goes when its codes are there.

    Raises:
        ConfigError: the model is packed already, has two-bit weights or no linear layers to pack, or
            `weights` is unknown.
    """
    if weights not in WEIGHTS:
        raise ConfigError(unknown_name("weights", weights, WEIGHTS))
    if (have := lowbit_weights(model)) is not None:
        raise ConfigError(
            f"weights {weights!r} packs a model in floating point and this one is {have} already"
        )
    if model.config.quant is not None:
        raise ConfigError(
            f"weights {weights!r} packs a model in floating point and this one has "
            f"{model.config.quant.method} weights; serve them as they are with weights='auto'"
        )
    packed = model if in_place else _shared(model)
    count = 0
    for name in [name for name, module in packed.named_modules() if _form(module) is not None]:
        module = packed.get_submodule(name)
        make = _form(module)
        assert make is not None
        owner, _, leaf = name.rpartition(".")
        if name == HEAD and isinstance(module, nn.Linear):
            made: nn.Module = IntegerHead(module, "int8")
        else:
            made = make(module, weights)
        setattr(packed.get_submodule(owner), leaf, made)
        count += 1
    if count <= 1:
        raise ConfigError(f"weights {weights!r} found no linear layers to pack; it is for real-valued models")
    move_to_huge_pages(packed.buffers())
    return packed.eval()


def lowbit_weights(model: nn.Module) -> str | None:
    """`int8` or `int4` for what `lowbit_model` gave, None for other models."""
    found = {m.weights for m in model.modules() if isinstance(m, IntegerLinear | IntegerExperts)}
    return None if not found else min(found)


def packed_tensors(model: Decoder, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a packed model, by its names, of weights in floating point.

    Args:
        model: from `lowbit_model`.
        source: tensors by the names of the model it was made from. Those that have no place in it stay.
    """
    tensors = dict(source)
    for name, module in model.named_modules():
        if isinstance(module, IntegerLinear):
            found = tensors.pop(f"{name}.weight", None)
            if found is None and name == HEAD and model.config.tie_word_embeddings:
                found = source.get("model.embed_tokens.weight")
            if found is not None:
                tensors |= {f"{name}.{key}": x for key, x in module.pack(found).items()}
        elif isinstance(module, IntegerExperts):
            stacks = {
                key: tensors.pop(f"{name}.{key}") for key in module.shapes if f"{name}.{key}" in tensors
            }
            tensors |= {f"{name}.{key}": x for key, x in module.pack(stacks).items()}
    return tensors


def _form(module: nn.Module) -> Callable[[Any, str], nn.Module] | None:
    if type(module) is nn.Linear:
        return IntegerLinear
    return IntegerExperts if type(module) is Experts else None


def _shared(model: Decoder) -> Decoder:
    """Another model with the same tensors."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    other = Decoder.build_empty(model.config).adopt(tensors)
    other.source = model.source
    return other
