"""Attention written as its definition: dense scores per sequence. Slow, memory O(T S), and the truth.

It shares no code with the fast backends and runs in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from sateen.ops.op import Op


def attention_reference(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    sink_N: Tensor | None = None,
    return_lse: bool = False,
    block_max: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.attention`."""
    dtype = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    group = q_TNH.shape[1] // k_SKH.shape[1]
    lengths_k = [b - a for a, b in pairwise(starts_k)]
    num_blocks = -(-max(lengths_k, default=0) // block_max) if block_max else 0
    outs, lses, maxima = [], [], []
    for i, length_k in enumerate(lengths_k):
        q = q_TNH[starts_q[i] : starts_q[i + 1]].to(dtype).transpose(0, 1)
        k = k_SKH[starts_k[i] : starts_k[i + 1]].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        v = v_SKV[starts_k[i] : starts_k[i + 1]].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        length_q = q.shape[1]
        position = torch.arange(length_q, device=q.device)[:, None] + length_k - length_q
        key = torch.arange(length_k, device=q.device)[None, :]
        visible = key <= position
        if window is not None:
            visible &= key > position - window
        scores_NTS = (q @ k.transpose(1, 2) * scale).masked_fill(~visible, -torch.inf)
        lse_NT = (
            scores_NTS.logsumexp(-1) if length_k else scores_NTS.new_full(scores_NTS.shape[:2], -torch.inf)
        )
        total_NT = lse_NT if sink_N is None else torch.logaddexp(lse_NT, sink_N.to(dtype)[:, None])
        seen = visible.any(-1)
        # Rows without a key would give exp(-inf - -inf); a finite stand-in keeps their gradient at zero.
        total_NT = torch.where(seen, total_NT, torch.zeros_like(total_NT))
        outs.append(((scores_NTS - total_NT.unsqueeze(-1)).exp() @ v).transpose(0, 1))
        lses.append(lse_NT.detach().float())
        if block_max:
            padded = F.pad(
                scores_NTS.detach().float(), (0, num_blocks * block_max - length_k), value=-torch.inf
            )
            maxima.append(padded.unflatten(-1, (num_blocks, block_max)).amax(-1))
    out = torch.cat(outs).to(q_TNH.dtype) if outs else q_TNH.new_zeros(*q_TNH.shape[:2], v_SKV.shape[2])
    if not outs:
        lses = [q_TNH.new_zeros(q_TNH.shape[1], 0, dtype=torch.float32)]
        maxima = [lses[0].new_zeros(*lses[0].shape, 0)]
    extra = ([torch.cat(lses, 1)] if return_lse else []) + ([torch.cat(maxima, 1)] if block_max else [])
    return (out, *extra) if extra else out


OP = Op("attention", attention_reference)
