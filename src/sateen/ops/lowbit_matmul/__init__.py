"""Products with weights of eight and four bits, activations rounded to int8 on the way in."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.ops.lowbit_matmul.native import thin_matmul
from sateen.ops.lowbit_matmul.packing import (
    Packed,
    PackedInt4,
    PackedInt8,
    pack_int4,
    pack_int8,
    unpack_lowbit,
)
from sateen.ops.lowbit_matmul.reference import OP

__all__ = [
    "OP",
    "Packed",
    "PackedInt4",
    "PackedInt8",
    "lowbit_matmul",
    "pack_int4",
    "pack_int8",
    "thin_matmul",
    "unpack_lowbit",
]


@torch.no_grad()
def lowbit_matmul(x_TD: Tensor, packed: Packed, *, backend: str = "auto") -> Tensor:
    """`x @ W.T` for a weight of eight or four bits.

    Args:
        x_TD: float activations; each token is rounded to int8 in groups of 32 columns.
        packed: W [F, D] from `pack_int8` or `pack_int4`.
        backend: `auto`, or one of `OP.backends`.

    Returns:
        [T, F] in x's dtype; not differentiable. A token with a number that is not finite has outputs of NaN.

    Raises:
        ShapeError: activations or stored tensors that do not fit together.
        BackendUnavailable: the named backend cannot run this call.

    Numerics: a code is round(127 x / max|x|) of its group, halves to even; a group whose numbers are below
    2^-100 counts as zeros. The sums of a group are exact in int32 and alike on every instruction set; they
    are scaled and added in float32. tests/ops/test_lowbit_matmul.py measures what the rounding costs.
    Source: ours; integer sums per group of 32 as in ggml's Q8_0 and Q4_1 products.
    """
    shape = packed.out_features, packed.in_features
    if x_TD.ndim != 2 or not x_TD.is_floating_point() or x_TD.shape[1] != shape[1]:
        raise ShapeError(
            f"lowbit_matmul takes float activations [T,D] for a weight [F,D]; got {x_TD.dtype} "
            f"{tuple(x_TD.shape)} and {shape}"
        )
    with torch.autocast(x_TD.device.type, enabled=False):
        out: Tensor = OP(x_TD, packed, backend=backend)
    return out
