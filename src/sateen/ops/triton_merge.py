"""One attention output of several, each over its own part of the keys: the second step of split decoding.

Shape letters: P parts, T query tokens, N query heads, V value head size.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _merge(
    part_out, part_lse, sink, out, lse, T, N,
    PARTS: tl.constexpr, P_PAD: tl.constexpr, V: tl.constexpr, V_PAD: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    p, v = tl.arange(0, P_PAD), tl.arange(0, V_PAD)
    lses = tl.load(part_lse + (p * N + n) * T + t, mask=p < PARTS, other=float("-inf"))
    top = tl.max(lses, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # no part saw a key
    weight = tl.exp(lses - top)
    total = tl.sum(weight, 0)
    rows = tl.load(
        part_out + ((p[:, None] * T + t) * N + n) * V + v[None, :],
        mask=(p[:, None] < PARTS) & (v[None, :] < V),
        other=0.0,
    )
    mixed = tl.sum(rows * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    whole = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    if HAS_SINK:
        mixed = mixed / (1.0 + tl.exp(tl.load(sink + n).to(tl.float32) - whole))
    tl.store(lse + n * T + t, whole)
    tl.store(out + (t * N + n) * V + v, mixed.to(out.dtype.element_ty), mask=v < V)


def merge_parts(
    part_out_PTNV: Tensor, part_lse_PNT: Tensor, sink_N: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The output [T, N, V] in `dtype`, sinks included, and the log-sum-exp [N, T] of all parts."""
    P, T, N, V = part_out_PTNV.shape
    out = torch.empty(T, N, V, dtype=dtype, device=part_out_PTNV.device)
    lse = torch.empty(N, T, device=part_out_PTNV.device)
    _merge[(T, N)](
        part_out_PTNV, part_lse_PNT, part_lse_PNT if sink_N is None else sink_N, out, lse, T, N,
        PARTS=P, P_PAD=triton.next_power_of_2(P), V=V, V_PAD=triton.next_power_of_2(V),
        HAS_SINK=sink_N is not None, num_warps=4,
    )  # fmt: skip
    return out, lse
