"""Attention in plain torch with memory O(T): the fast path where no compiled kernel fits.

Whole causal sequences on the CPU go to torch's own flash kernel; the rest is computed in blocks of
queries, each against the keys it can see, and recomputed in the backward pass. Sinks cost nothing extra:
with the sink inside the row's normaliser the usual flash backward holds, and its own gradient is minus
the probability it takes times the row's `dO . O`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sateen.ops.attention.reference import OP

CHUNK = 256  # queries per block; the scores of a block are N * CHUNK * (CHUNK + window) numbers


class Span(NamedTuple):
    """Queries [q0, q1) of a sequence against keys [k0, k1); query q0 stands `shift` places after key k0."""

    q0: int
    q1: int
    k0: int
    k1: int
    shift: int


def _spans(cu_q: list[int], cu_k: list[int], window: int | None) -> list[Span]:
    spans = []
    for i in range(len(cu_q) - 1):
        length_q, length_k = cu_q[i + 1] - cu_q[i], cu_k[i + 1] - cu_k[i]
        offset = length_k - length_q  # right-aligned: query row r stands at key position r + offset
        for start in range(0, length_q, CHUNK):
            stop = min(start + CHUNK, length_q)
            last = stop + offset
            first = 0 if window is None else max(0, start + offset - window + 1)
            if last > first:
                shift = start + offset - first
                spans.append(Span(cu_q[i] + start, cu_q[i] + stop, cu_k[i] + first, cu_k[i] + last, shift))
    return spans


def _scores(q: Tensor, k: Tensor, span: Span, scale: float, window: int | None) -> Tensor:
    """Masked scores [K, G, t, s] in float32."""
    K, group = k.shape[1], q.shape[1] // k.shape[1]
    rows = q[span.q0 : span.q1].unflatten(1, (K, group)).permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(rows.float(), k[span.k0 : span.k1].permute(1, 2, 0).float())
    scores = scores.mul_(scale).view(K, group, span.q1 - span.q0, -1)
    position = torch.arange(span.q1 - span.q0, device=q.device)[:, None] + span.shift
    key = torch.arange(span.k1 - span.k0, device=q.device)[None, :]
    hidden = key > position
    if window is not None:
        hidden |= key <= position - window
    return scores.masked_fill_(hidden, -torch.inf)


def _grouped(x_TNC: Tensor, span: Span, K: int) -> Tensor:
    """The rows of a span as [K, G * t, C] in float32."""
    group = x_TNC.shape[1] // K
    rows: Tensor = x_TNC[span.q0 : span.q1].unflatten(1, (K, group)).permute(1, 2, 0, 3).flatten(1, 2)
    return rows.float()


def _ungrouped(x: Tensor, span: Span) -> Tensor:
    """The inverse of `_grouped`: [t, N, C]."""
    rows: Tensor = x.unflatten(1, (-1, span.q1 - span.q0)).permute(2, 0, 1, 3).flatten(1, 2)
    return rows


def _flash_batch(
    q: Tensor, k: Tensor, v: Tensor, cu_q: list[int], cu_k: list[int], window: int | None
) -> int:
    """The number of equally long whole sequences that torch's CPU flash kernel can take at once, or 0."""
    batch = len(cu_q) - 1
    if q.device.type != "cpu" or cu_q != cu_k or not batch or q.shape[-1] != v.shape[-1] or not len(q):
        return 0
    length = cu_q[1]
    equal = all(cu_q[i] == i * length for i in range(batch + 1))
    return batch if equal and (window is None or window >= length) else 0


def _batched(x: Tensor, batch: int, heads: int) -> Tensor:
    """[B, heads, t, C] with key/value heads repeated for their group."""
    x = x.unflatten(0, (batch, -1)).transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
        cu_q: list[int], cu_k: list[int], scale: float, window: int | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        T, N = q.shape[:2]
        batch = _flash_batch(q, k, v, cu_q, cu_k, window)
        if batch:
            out_b, lse_b = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_batched(x, batch, N) for x in (q, k, v)), 0.0, True, scale=scale
            )
            out = out_b.transpose(1, 2).reshape(T, N, -1)
            lse = lse_b.transpose(0, 1).reshape(N, T)
            if sink is not None:
                keep = torch.sigmoid(lse - sink.float()[:, None])
                out = (out * keep.t().unsqueeze(-1)).to(q.dtype)
        else:
            out = q.new_zeros(T, N, v.shape[-1])
            lse = torch.full((N, T), -torch.inf, device=q.device)
            for span in _spans(cu_q, cu_k, window):
                scores = _scores(q, k, span, scale, window)
                row_lse = scores.logsumexp(-1)
                lse[:, span.q0 : span.q1] = row_lse.flatten(0, 1)
                total = row_lse if sink is None else torch.logaddexp(row_lse, _per_head(sink, row_lse))
                total = torch.nan_to_num(total, neginf=0.0)
                probs = scores.sub_(total.unsqueeze(-1)).exp_().flatten(1, 2)
                out[span.q0 : span.q1] = _ungrouped(
                    torch.bmm(probs, v[span.k0 : span.k1].transpose(0, 1).float()), span
                ).to(q.dtype)
        ctx.save_for_backward(q, k, v, sink, out, lse)
        ctx.settings = (cu_q, cu_k, scale, window, batch)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, sink, out, lse = ctx.saved_tensors
        cu_q, cu_k, scale, window, batch = ctx.settings
        d_out = grads[0].contiguous()
        T, N = q.shape[:2]
        K = k.shape[1]
        total = lse if sink is None else torch.logaddexp(lse, sink.float()[:, None])
        delta = (d_out.float() * out.float()).sum(-1).t()  # [N, T]
        d_sink = None
        if sink is not None:
            # As a sigmoid, because exp(sink - total) is NaN at infinite sinks; -inf twice is an empty row.
            taken = torch.sigmoid(sink.float()[:, None] - lse).nan_to_num(0.0)
            d_sink = -(taken * delta).sum(-1).to(sink.dtype)
        if batch:
            t = T // batch
            stats = total.unflatten(1, (batch, t)).transpose(0, 1).contiguous()
            d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _batched(d_out, batch, N), *(_batched(x, batch, N) for x in (q, k, v)),
                _batched(out, batch, N), stats, 0.0, True, scale=scale,
            )  # fmt: skip
            d_q, d_k, d_v = (x.transpose(1, 2).flatten(0, 1) for x in (d_q, d_k, d_v))
            if K != N:
                d_k, d_v = (x.unflatten(1, (K, N // K)).sum(2) for x in (d_k, d_v))
            return d_q, d_k, d_v, d_sink, None, None, None, None
        d_q = torch.zeros_like(q)
        d_k, d_v = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (k, v))
        total = torch.nan_to_num(total, neginf=0.0)
        for span in _spans(cu_q, cu_k, window):
            scores = _scores(q, k, span, scale, window)
            rows = (K, N // K, span.q1 - span.q0)
            probs = scores.sub_(total[:, span.q0 : span.q1].reshape(*rows, 1)).exp_().flatten(1, 2)
            g = _grouped(d_out, span, K)
            values = v[span.k0 : span.k1].transpose(0, 1).float()
            d_v[span.k0 : span.k1] += torch.bmm(probs.transpose(1, 2), g).transpose(0, 1)
            d_probs = torch.bmm(g, values.transpose(1, 2))
            row_delta = delta[:, span.q0 : span.q1].reshape(K, -1, 1)
            d_scores = d_probs.sub_(row_delta).mul_(probs).mul_(scale)
            keys = k[span.k0 : span.k1].transpose(0, 1).float()
            d_q[span.q0 : span.q1] = _ungrouped(torch.bmm(d_scores, keys), span).to(q.dtype)
            d_k[span.k0 : span.k1] += torch.bmm(d_scores.transpose(1, 2), _grouped(q, span, K)).transpose(
                0, 1
            )
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sink, None, None, None, None


def _per_head(sink: Tensor, like_KGt: Tensor) -> Tensor:
    return sink.float().view(*like_KGt.shape[:2], 1).expand_as(like_KGt)


def _why_not(*_: Tensor, block_max: int | None = None, **__: Any) -> str | None:
    return None if block_max is None else "it does not return tile maxima"


@OP.register("torch", priority=10, why_not=_why_not)
def attention_torch(
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
    """See `sateen.ops.attention`; scores and sums in float32."""
    assert block_max is None
    cu_q = cu_seqlens_q.tolist()
    cu_k = cu_q if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k.tolist()
    out, lse = _Attention.apply(  # type: ignore[no-untyped-call]
        q_TNH, k_SKH, v_SKV, sink_N, cu_q, cu_k, scale, window
    )
    return (out, lse) if return_lse else out
