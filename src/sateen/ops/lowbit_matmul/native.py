"""Products with packed weights, and thin float products, by the compiled CPU kernels (native/linear.h)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sateen.errors import ShapeError
from sateen.ops.lowbit_matmul.packing import Packed, PackedInt8, check_sizes
from sateen.ops.lowbit_matmul.reference import OP
from sateen.ops.native import native, native_available

# The numbers of `Format` in native/linear.h.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT8, INT4 = 3, 4


def thin_matmul(x_TD: Tensor, weight_FD: Tensor) -> Tensor:
    """`x @ weight.T` for few tokens, as the native decode step computes it; for tests and benchmarks.

    Args:
        x_TD: float32 activations.
        weight_FD: contiguous, float32, bfloat16 or float16. Activations are rounded to bfloat16 for bfloat16.

    Returns:
        Float32 [T, F].

    Raises:
        ShapeError: sizes or dtypes that do not fit.
        BackendUnavailable: the kernels were not built.
    """
    if x_TD.dtype != torch.float32 or weight_FD.dtype not in FORMATS or x_TD.shape[1:] != weight_FD.shape[1:]:
        raise ShapeError(
            f"thin_matmul takes float32 [T,D] and float [F,D]; got {x_TD.dtype} {tuple(x_TD.shape)} and "
            f"{weight_FD.dtype} {tuple(weight_FD.shape)}"
        )
    F, D = weight_FD.shape
    return _run(FORMATS[weight_FD.dtype], F, D, weight_FD, None, x_TD)


def _why_not(x_TD: Tensor, packed: Packed) -> str | None:
    if x_TD.device.type != "cpu" or packed.codes.device.type != "cpu":
        return f"it runs on the CPU and the tensors are on {x_TD.device.type} and {packed.codes.device.type}"
    return native_available()


@OP.register("native", priority=20, why_not=_why_not)
def lowbit_matmul_native(x_TD: Tensor, packed: Packed) -> Tensor:
    """See `sateen.ops.lowbit_matmul`; the integer sums are the reference's on every instruction set."""
    check_sizes(packed)
    kind = INT8 if isinstance(packed, PackedInt8) else INT4
    shape = packed.out_features, packed.in_features
    return _run(kind, *shape, packed.codes, packed.scales, x_TD.float()).to(x_TD.dtype)


def _run(kind: int, F: int, D: int, weight: Tensor, scales: Tensor | None, x_TD: Tensor) -> Tensor:
    out = torch.empty(x_TD.shape[0], F)
    if x_TD.shape[0]:
        x, num_threads = x_TD.detach().contiguous().numpy(), torch.get_num_threads()
        stored = (None if t is None else _bytes(t) for t in (weight, scales))
        native().linear_forward(kind, F, D, *stored, None, x, num_threads, out.numpy())
    return out


def _bytes(x: Tensor) -> NDArray[np.uint8]:
    """The same memory; NumPy has no bfloat16."""
    return x.detach().view(torch.uint8).view(-1).numpy()
