"""Block-sparse attention in plain torch by gathering: work follows the chosen keys, not the context.

Queries are taken a chunk at a time; the backward pass computes each chunk again. Where a chunk's queries
choose most of what they see, as in short sequences, the whole prefix is read once instead and masked.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sateen.ops.block_sparse_attention.reference import OP

CHUNK = 256  # queries of a chunk that reads the whole prefix
GATHERED = 2**22  # numbers of gathered keys that a chunk may hold
# A gathered row costs about as much as this many rows of a dense product: on one CPU core forward and
# backward together break even where 64 of 512 keys are chosen.
GATHER_COST = 8


def _spans(cu_q: list[int], cu_k: list[int], row: int, chosen: int) -> list[tuple[int, int, int, int, bool]]:
    """Queries [q0, q1) of one sequence, its key rows [k0, k1) up to the last of them, whether to gather."""
    spans = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        at = q0
        while at < q1:
            gathers = GATHER_COST * chosen < k1 - k0
            size = max(1, GATHERED // (row * chosen)) if gathers else CHUNK
            stop = min(at + size, q1)
            last = k1 - (q1 - stop)  # right-aligned: the last query sees the last key
            spans.append((at, stop, k0, max(last, k0), gathers))
            at = stop
    return spans


def _attend(
    q_tNH: Tensor, k_sKH: Tensor, v_sKV: Tensor, sink_N: Tensor | None, idx_Ktn: Tensor,
    block_size: int, scale: float, gathers: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [t, N, V] and log-sum-exp [N, t] of queries that stand at the last places of their keys."""
    t, N, _ = q_tNH.shape
    s, K, _ = k_sKH.shape
    position_t1 = torch.arange(s - t, s, device=q_tNH.device)[:, None]
    q_KGtH = q_tNH.float().unflatten(1, (K, N // K)).permute(1, 2, 0, 3)
    if gathers:
        inside = torch.arange(block_size, device=q_tNH.device)
        places_Ktm = (idx_Ktn.long()[..., None] * block_size + inside).flatten(2)
        visible_K1tm = ((places_Ktm >= 0) & (places_Ktm <= position_t1)).unsqueeze(1)
        rows_Ktm = places_Ktm.clamp(0, s - 1)
        head_K11 = torch.arange(K, device=q_tNH.device)[:, None, None]
        k_Ktm, v_Ktm = k_sKH[rows_Ktm, head_K11].float(), v_sKV[rows_Ktm, head_K11].float()
        scores = torch.einsum("kgth,ktmh->kgtm", q_KGtH, k_Ktm)
    else:
        key = torch.arange(s, device=q_tNH.device)
        num_blocks = -(-s // block_size)
        # One more place than there are blocks takes the padding and blocks that lie ahead.
        slots = torch.where((idx_Ktn < 0) | (idx_Ktn >= num_blocks), num_blocks, idx_Ktn).long()
        chosen = torch.zeros(K, t, num_blocks + 1, dtype=torch.bool, device=q_tNH.device)
        chosen.scatter_(2, slots, torch.ones_like(slots, dtype=torch.bool))
        visible_K1tm = (chosen[..., key // block_size] & (key <= position_t1)).unsqueeze(1)
        scores = q_KGtH @ k_sKH.permute(1, 2, 0).float().unsqueeze(1)
    scores = (scores * scale).masked_fill(~visible_K1tm, -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse if sink_N is None else torch.logaddexp(lse, sink_N.float().view(K, N // K, 1))
    total = torch.where(visible_K1tm.any(-1), total, torch.zeros_like(total))
    probs = (scores - total.unsqueeze(-1)).exp()
    if gathers:
        out = torch.einsum("kgtm,ktmv->kgtv", probs, v_Ktm)
    else:
        out = probs @ v_sKV.transpose(0, 1).float().unsqueeze(1)
    return out.permute(2, 0, 1, 3).flatten(1, 2), lse.flatten(0, 1)


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, idx: Tensor,
        block_size: int, cu_q: list[int], cu_k: list[int], scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = q.new_zeros(*q.shape[:2], v.shape[2])
        lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, device=q.device)
        spans = _spans(cu_q, cu_k, k.shape[1] * k.shape[2], idx.shape[2] * block_size)
        for q0, q1, k0, k1, gathers in spans:
            if k1 > k0:
                part, part_lse = _attend(
                    q[q0:q1], k[k0:k1], v[k0:k1], sink, idx[:, q0:q1], block_size, scale, gathers
                )
                out[q0:q1] = part.to(q.dtype)
                lse[:, q0:q1] = part_lse
        ctx.save_for_backward(q, k, v, sink, idx)
        ctx.settings = block_size, scale, spans
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, sink, idx = ctx.saved_tensors
        block_size, scale, spans = ctx.settings
        d_q, d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
        d_sink = None if sink is None else torch.zeros_like(sink, dtype=torch.float32)
        for q0, q1, k0, k1, gathers in spans:
            if k1 == k0:
                continue
            slices = (q[q0:q1], k[k0:k1], v[k0:k1])
            q_c, k_c, v_c = parts = [x.detach().float().requires_grad_() for x in slices]
            if sink is not None:
                parts.append(sink.detach().float().requires_grad_())
            with torch.enable_grad():
                last = parts[3] if sink is not None else None
                out, _ = _attend(q_c, k_c, v_c, last, idx[:, q0:q1], block_size, scale, gathers)
            found = torch.autograd.grad(out, parts, grads[0][q0:q1].float())
            d_q[q0:q1] = found[0]
            d_k[k0:k1] += found[1]
            d_v[k0:k1] += found[2]
            if d_sink is not None:
                d_sink += found[3]
        sunk = None if d_sink is None else d_sink.to(sink.dtype)
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), sunk, None, None, None, None, None


def _why_not(q_TNH: Tensor, *_: Tensor, **__: Any) -> str | None:
    return "it computes in float32 and the queries are float64" if q_TNH.dtype == torch.float64 else None


@OP.register("torch", priority=10, why_not=_why_not)
def block_sparse_attention_torch(
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
    """See `sateen.ops.block_sparse_attention`; scores and sums in float32."""
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.tolist()
    out, lse = _BlockSparse.apply(  # type: ignore[no-untyped-call]
        q_TNH, k_SKH, v_SKV, sink_N, idx_KTn, block_size, cu_q, cu_k, scale
    )
    return (out, lse) if return_lse else out
