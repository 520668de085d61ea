"""Matrix products of row groups, each group with its own matrix: the experts of an MoE layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ShapeError
from sateen.ops.op import Op


def grouped_matmul_reference(x_TD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Each row times its own matrix, summed in float32 at least; see `grouped_matmul`."""
    kind = x_TD.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x_TD.dtype
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    owner_T = torch.repeat_interleave(torch.arange(len(counts_E), device=x_TD.device), counts_E)
    with torch.autocast(kind, enabled=False):
        return torch.einsum("td,tdf->tf", x_TD.to(wide), w_EDF.to(wide)[owner_T]).to(dtype)


OP = Op("grouped_matmul", grouped_matmul_reference)


@OP.register("split", priority=10, why_not=lambda *_, **__: None)
def grouped_matmul_split(x_TD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """A loop over the experts' row ranges, one matrix product each."""
    # split and unbind, not slices: the backward of a slice fills a zero tensor of the whole stack per expert.
    rows = x_TD.split(counts_E.tolist())
    return torch.cat([x @ w for x, w in zip(rows, w_EDF.unbind(0), strict=True)])


def grouped_matmul(x_TD: Tensor, w_EDF: Tensor, counts_E: Tensor, *, backend: str = "auto") -> Tensor:
    """`x` times the matrix of each row's group.

    Args:
        x_TD: rows sorted by group.
        w_EDF: one matrix per group.
        counts_E: int64 [E], rows of each group; adds up to T.

    Returns:
        [T, F] in x's dtype (the autocast dtype under autocast).

    Raises:
        ShapeError: the counts do not add up to T, or the sizes do not fit.
    """
    if x_TD.shape[-1] != w_EDF.shape[1] or counts_E.shape != w_EDF.shape[:1]:
        raise ShapeError(
            f"grouped_matmul takes x [T,D], w [E,D,F], counts [E]; got {tuple(x_TD.shape)}, "
            f"{tuple(w_EDF.shape)}, {tuple(counts_E.shape)}"
        )
    if counts_E.device.type == "cpu" and int(counts_E.sum()) != x_TD.shape[0]:
        raise ShapeError(f"grouped_matmul counts add up to {int(counts_E.sum())} for {x_TD.shape[0]} rows")
    out: Tensor = OP(x_TD, w_EDF, counts_E, backend=backend)
    return out
