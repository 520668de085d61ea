"""How a layer's matrices are stored, as native/linear.h reads them, and which of them read the same input.

Shape letters: E experts, F and D the output and input width of a matrix.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from sateen.nn.attention import Attention
from sateen.nn.attention.hysparse import SparseAttention
from sateen.nn.moe import Experts
from sateen.nn.quant.int8 import IntegerExperts, IntegerLinear
from sateen.ops.lowbit_matmul.native import FORMATS, INT4, INT8

INTEGERS = {"int8": INT8, "int4": INT4}


class Form(NamedTuple):
    """One matrix, or a stack of `num_stacked`, as native/linear.h stores it."""

    kind: int
    shape: tuple[int, ...]
    weight: Tensor
    scales: Tensor | None = None
    bias: Tensor | None = None
    num_stacked: int = 1


def form_of(module: nn.Module, name: str = "") -> Form | None:
    """The form of a layer's weights, of stacked experts those called `name`; None where there is none."""
    if isinstance(module, IntegerLinear):
        shape = module.out_features, module.in_features
        return Form(INTEGERS[module.weights], shape, module.codes, module.scales, module.bias)
    if isinstance(module, IntegerExperts):
        codes, scales = getattr(module, f"{name}_codes"), getattr(module, f"{name}_scales")
        return Form(INTEGERS[module.weights], module.shapes[name], codes, scales, None, len(codes))
    if type(module) not in (nn.Linear, nn.Embedding, Experts):
        return None
    weight = getattr(module, name or "weight")
    if weight.dtype not in FORMATS or not weight.is_contiguous():
        return None
    num_stacked = weight.shape[0] if weight.ndim == 3 else 1
    shape = tuple(weight.shape[-2:])
    return Form(FORMATS[weight.dtype], shape, weight, None, getattr(module, "bias", None), num_stacked)


def projections(attention: Attention) -> dict[str, nn.Module | None]:
    """The matrices that read a layer's input: `q`, `k`, `v` and `gate_proj`, None where it has none."""
    kv = ("swa_k_proj", "swa_v_proj") if isinstance(attention, SparseAttention) else ("k_proj", "v_proj")
    names = zip(("q", "k", "v", "gate_proj"), ("q_proj", *kv, "gate_proj"), strict=True)
    return {part: getattr(attention, name, None) for part, name in names}


def mixed(*forms: Form | None) -> str | None:
    """Matrices with one input must read it in one form; int8 and int4 weights do."""
    kinds = {min(form.kind, INT8) for form in forms if form is not None}
    return None if len(kinds) < 2 else "has matrices of several kinds"
