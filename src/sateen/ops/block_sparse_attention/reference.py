"""Block-sparse attention as its definition: dense scores under a mask. Slow, memory O(T S), the truth.

It shares no code with the fast backends and runs in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sateen.ops.op import Op


def block_sparse_attention_reference(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    idx_KTn: Tensor,
    *,
    block_size: int,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    sink_N: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `sateen.ops.block_sparse_attention`."""
    dtype = torch.float64 if q_TNH.dtype == torch.float64 else torch.float32
    spans = list(zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True))
    group = q_TNH.shape[1] // k_SKH.shape[1]
    outs = [q_TNH.new_zeros(0, q_TNH.shape[1], v_SKV.shape[2], dtype=dtype)]
    lses = [q_TNH.new_zeros(q_TNH.shape[1], 0, dtype=torch.float32)]
    for (q0, q1), (k0, k1) in spans:
        q = q_TNH[q0:q1].to(dtype).transpose(0, 1)
        k = k_SKH[k0:k1].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        v = v_SKV[k0:k1].to(dtype).repeat_interleave(group, dim=1).transpose(0, 1)
        key = torch.arange(k1 - k0, device=q.device)
        position = torch.arange(q1 - q0, device=q.device)[:, None] + (k1 - k0) - (q1 - q0)
        chosen_KTS = (idx_KTn[:, q0:q1, :, None] == key // block_size).any(2)
        visible_NTS = (chosen_KTS & (key <= position)).repeat_interleave(group, dim=0)
        scores_NTS = (q @ k.transpose(1, 2) * scale).masked_fill(~visible_NTS, -torch.inf)
        shape = scores_NTS.shape[:2]
        lse_NT = scores_NTS.logsumexp(-1) if k1 > k0 else scores_NTS.new_full(shape, -torch.inf)
        total_NT = lse_NT if sink_N is None else torch.logaddexp(lse_NT, sink_N.to(dtype)[:, None])
        # Rows without a key would give exp(-inf - -inf); a finite stand-in keeps their gradient at zero.
        total_NT = torch.where(visible_NTS.any(-1), total_NT, torch.zeros_like(total_NT))
        outs.append(((scores_NTS - total_NT.unsqueeze(-1)).exp() @ v).transpose(0, 1))
        lses.append(lse_NT.detach().float())
    out = torch.cat(outs).to(q_TNH.dtype)
    return (out, torch.cat(lses, 1)) if return_lse else out


OP = Op("block_sparse_attention", block_sparse_attention_reference)
