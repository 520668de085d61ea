"""The gate of attention with int4 queries and keys: every call is measured against float attention.

Such codes err too much on most inputs, so a call gives its result only where a sample of its queries is
accurate. Source of form and gate: ours; the paper (arXiv 2409.16997) says that its scheme extends to INT4 and
gives no numbers. Shape letters as in `reference.py`.
"""

from __future__ import annotations

import sys
from itertools import pairwise

import torch
from torch import Tensor

from sateen.errors import AccuracyError
from sateen.ops.int8_attention.reference import visible_keys

SAMPLE = 64  # queries per sequence that are also computed in float64
MAX_ERROR = 0.025  # the gate of int8 on normal numbers


def check_error(
    out_TNV: Tensor,
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    sink_N: Tensor | None,
    causal: bool,
    window: int | None,
    max_error: float,
) -> None:
    """Compares up to 64 queries of every sequence, evenly spread, with float64 attention.

    Raises:
        AccuracyError: their relative L2 error is above `max_error`.
    """
    wrong = right = 0.0
    group = q_TNH.shape[1] // k_SKH.shape[1]
    for (q0, q1), (k0, k1) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        T, S = q1 - q0, k1 - k0
        if not T or not S:
            continue
        rows = torch.linspace(0, T - 1, min(T, SAMPLE), device=q_TNH.device).long()
        k, v = (x[k0:k1].double().repeat_interleave(group, 1) for x in (k_SKH, v_SKV))
        scores = torch.einsum("tnh,snh->nts", q_TNH[q0:q1][rows].double(), k) * scale
        scores = scores.masked_fill(~visible_keys(T, S, causal, window, q_TNH.device)[rows], -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        total = lse if sink_N is None else torch.logaddexp(lse, sink_N.double().view(-1, 1, 1))
        exact = torch.einsum("nts,snv->tnv", (scores - total).exp().nan_to_num(0.0), v)
        wrong += float((out_TNV[q0:q1][rows].double() - exact).square().sum())
        right += float(exact.square().sum())
    error = (wrong / max(right, sys.float_info.min)) ** 0.5  # NaN stays NaN, and is refused
    if not error <= max_error:
        raise AccuracyError(
            f"int8_attention qk='int4': the relative L2 error of sampled queries is {error:.2%}, accepted is "
            f"{max_error:.2%}; use qk='int8', or a larger max_error if that is good enough"
        )
