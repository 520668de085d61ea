"""Products of rounded activations with weights of eight and four bits: integer sums, scaled in float32.

Shape letters: T tokens, F output rows, D input columns, G groups of 32 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sateen.ops.int8_attention.quantize import LEVELS, integer_matmul
from sateen.ops.lowbit_matmul.packing import GROUP, OFFSET, Packed, parts
from sateen.ops.op import Op

TINY = 2.0**-100  # groups of smaller activations count as zeros: 127 / x stays finite


def lowbit_matmul_reference(x_TD: Tensor, packed: Packed) -> Tensor:
    """See `sateen.ops.lowbit_matmul`."""
    codes_TGd, size_TG = activation_codes(x_TD)
    weights, size_FG, minimum_FG = parts(packed)
    weights_FGd = weights.unflatten(1, (-1, GROUP))
    bound = GROUP * LEVELS * OFFSET
    sums_GTF = integer_matmul(codes_TGd.transpose(0, 1), weights_FGd.permute(1, 2, 0), bound)
    out = torch.einsum("gtf,tg,fg->tf", sums_GTF.float(), size_TG, size_FG)
    if minimum_FG is not None:
        out = out + (codes_TGd.float().sum(2) * size_TG) @ minimum_FG.T
    return out.to(x_TD.dtype)


def activation_codes(x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Int8 codes [T, G, 32] of each group, and the float32 size [T, G] of one code; halves go to even.

    A group with a number that is not finite has codes of zero and the size NaN, so that its outputs are NaN.
    """
    x = functional.pad(x_TD.float(), (0, -x_TD.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    top = x.abs().amax(2)
    is_coded = (top >= TINY) & top.isfinite()
    levels = torch.where(is_coded, LEVELS / top, 0.0)
    codes = (x * levels.unsqueeze(2)).round().nan_to_num(0.0).to(torch.int8)
    return codes, torch.where(is_coded, top / LEVELS, torch.where(top.isfinite(), 0.0, torch.nan))


OP = Op("lowbit_matmul", lowbit_matmul_reference)
