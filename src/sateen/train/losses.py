"""Log-probabilities of tokens under `softmax(h W^T)` without a lasting [T, V] tensor of logits.

`train.objective` calls these; the engine scores with its own sampler. Logits exist for a few hundred rows at
a time, small enough to stay in the processor's cache; the softmax is float32 whatever the matmuls use. Shape
letters: T tokens, D hidden size, V vocabulary, K candidate tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sateen.data.packing import IGNORE
from sateen.errors import ShapeError
from sateen.train.precision import has_bfloat16_matmul

CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 256 * 2**20}
"""Bytes of float32 logits alive at once; 8 MiB (256 rows at V = 8192) stays in cache and measured fastest."""

KEEP_BYTES = 256 * 2**20
"""Softmax values kept for the backward pass up to this many bytes; beyond it the backward recomputes them."""


class TokenLogprobs(NamedTuple):
    """Attributes: `logprobs_T`, differentiable; `entropy_T` of each row's distribution in nats, or None."""

    logprobs_T: Tensor
    entropy_T: Tensor | None


def token_logprobs(
    h_TD: Tensor,
    w_VD: Tensor,
    ids_T: Tensor,
    *,
    with_entropy: bool = False,
    chunk_rows: int | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> TokenLogprobs:
    """Log-probability of each id under softmax(h W^T), in float32.

    Args:
        h_TD: normed hidden states.
        w_VD: the output head's weight.
        ids_T: int64 ids; a row of -100 gives 0, costs nothing and passes no gradient.
        with_entropy: also return the entropy of each row, without gradient.
        chunk_rows: rows of logits computed at once; None derives them from `CHUNK_BYTES`.
        keep_bytes: keep softmax values for the backward pass up to this size, else recompute them there.

    Returns:
        `TokenLogprobs`; gradients flow to `h_TD` and `w_VD` in their own dtypes.

    Raises:
        ShapeError: the shapes do not fit together.

    Numerics: matmuls run in the autocast dtype where autocast is on, else in `h_TD`'s dtype; maximum,
    exponentials, sums and `softmax - onehot` are float32 (float64 for float64 inputs).
    """
    _check(h_TD, w_VD, ids_T, (h_TD.shape[0],))
    h_TD, w_VD = _matmul_dtype(h_TD, w_VD)
    chunk = chunk_rows or _chunk_rows(w_VD)
    logprobs_T, entropy_T = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        h_TD, w_VD, ids_T, with_entropy, chunk, keep_bytes if torch.is_grad_enabled() else -1
    )
    return TokenLogprobs(logprobs_T, entropy_T)


def soft_cross_entropy(
    h_TD: Tensor,
    w_VD: Tensor,
    target_ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """The scalar `-sum_tk weights_tk * log softmax(h_t W^T)[target_ids_tk]`, in float32.

    The weights are known before the pass, so each chunk's gradients are formed while its logits are in cache
    and nothing of size [T, V] is kept. With K = 1 it is cross-entropy; rows whose weights are all 0 cost
    nothing.

    Args:
        h_TD: normed hidden states.
        w_VD: the output head's weight.
        target_ids_TK: int64 candidate ids, distinct within a row or not; -100 marks an empty place.
        weights_TK: float weights without gradient, for example target probabilities divided by a token count.
        chunk_rows: rows of logits computed at once; None derives them from `CHUNK_BYTES`.

    Raises:
        ShapeError: the shapes do not fit together.
    """
    _check(h_TD, w_VD, target_ids_TK, (h_TD.shape[0], target_ids_TK.shape[-1]))
    if weights_TK.shape != target_ids_TK.shape:
        raise ShapeError(
            f"weights {list(weights_TK.shape)} and target ids {list(target_ids_TK.shape)} differ"
        )
    weights_TK = weights_TK.detach().masked_fill(target_ids_TK == IGNORE, 0)
    rows = weights_TK.any(-1).nonzero()[:, 0]
    if len(rows) < len(h_TD):
        h_TD, target_ids_TK, weights_TK = h_TD[rows], target_ids_TK[rows], weights_TK[rows]
    h_TD, w_VD = _matmul_dtype(h_TD, w_VD)
    chunk = chunk_rows or _chunk_rows(w_VD)
    loss: Tensor = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_TD, w_VD, target_ids_TK.clamp(min=0), weights_TK, chunk, torch.is_grad_enabled()
    )
    return loss


def _check(h_TD: Tensor, w_VD: Tensor, ids: Tensor, ids_shape: tuple[int, ...]) -> None:
    if h_TD.dim() != 2 or w_VD.dim() != 2 or h_TD.shape[1] != w_VD.shape[1] or ids.shape != ids_shape:
        raise ShapeError(
            f"hidden states {list(h_TD.shape)}, head weight {list(w_VD.shape)} and ids {list(ids.shape)} do "
            "not fit; expected [T, D], [V, D] and [T] or [T, K]"
        )


def _matmul_dtype(h_TD: Tensor, w_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Both operands in the dtype autocast uses for a linear layer; the casts carry the gradients back."""
    device = h_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h_TD.dtype
    h_TD, w_VD = h_TD.to(dtype), w_VD.to(dtype)
    if dtype == torch.bfloat16 and device == "cpu" and not has_bfloat16_matmul():
        return h_TD.float(), w_VD.float()  # rounded, but multiplied in float32; see `train.precision`
    return h_TD, w_VD


def _chunk_rows(w_VD: Tensor) -> int:
    return max(64, CHUNK_BYTES.get(w_VD.device.type, CHUNK_BYTES["cuda"]) // (4 * len(w_VD)))


def _softmax_chunk(h_cD: Tensor, w_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and probabilities of a chunk of rows, float32 or wider."""
    logits_cV = torch.mm(h_cD, w_VD.T)
    if logits_cV.dtype not in (torch.float32, torch.float64):
        logits_cV = logits_cV.float()
    return logits_cV, torch.softmax(logits_cV, dim=-1)


def _log_sum_exp(logits_cV: Tensor, probs_cV: Tensor) -> Tensor:
    """Each row's log-sum-exp from its softmax: `p_max = exp(0) / sum` spares a pass of logarithms."""
    return logits_cV.amax(-1) - probs_cV.amax(-1).log()


def _minus_residual(probs_cV: Tensor, ids_c: Tensor) -> Tensor:
    """`softmax - onehot` in place: minus the gradient of a log-probability with respect to its logits.

    Subtracting in float32, before any cast to bfloat16, keeps the gradient of confident tokens accurate.
    """
    probs_cV[torch.arange(len(ids_c), device=ids_c.device), ids_c] -= 1
    return probs_cV


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, ids_T: Tensor, with_entropy: bool, chunk: int, keep_bytes: int
    ) -> tuple[Tensor, Tensor | None]:
        rows = (ids_T != IGNORE).nonzero()[:, 0]
        is_full = len(rows) == len(ids_T)
        h_RD, ids_R = (h_TD, ids_T) if is_full else (h_TD[rows], ids_T[rows])
        wide = torch.float64 if h_TD.dtype == torch.float64 else torch.float32
        logprobs_R = torch.empty(len(rows), dtype=wide, device=h_TD.device)
        entropy_R = torch.empty_like(logprobs_R) if with_entropy else None
        kept = None
        if any(ctx.needs_input_grad) and len(rows) * len(w_VD) * h_TD.element_size() <= keep_bytes:
            kept = torch.empty(len(rows), len(w_VD), dtype=h_TD.dtype, device=h_TD.device)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits_cV, probs_cV = _softmax_chunk(h_RD[part], w_VD)
            lse_c = _log_sum_exp(logits_cV, probs_cV)
            logprobs_R[part] = logits_cV.gather(1, ids_R[part, None])[:, 0] - lse_c
            if entropy_R is not None:
                entropy_R[part] = lse_c - torch.linalg.vecdot(probs_cV, logits_cV)
            if kept is not None:
                kept[part] = _minus_residual(probs_cV, ids_R[part])
        ctx.save_for_backward(h_RD, w_VD, ids_R, rows, kept)
        ctx.chunk, ctx.num_rows, ctx.is_full = chunk, len(ids_T), is_full
        if entropy_R is not None:
            entropy_R = _spread(entropy_R, rows, ctx)
            ctx.mark_non_differentiable(entropy_R)
        return _spread(logprobs_R, rows, ctx), entropy_R

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        h_RD, w_VD, ids_R, rows, kept = ctx.saved_tensors
        wants_h, wants_w = ctx.needs_input_grad[:2]
        minus_grad_R1 = -(grad_T if ctx.is_full else grad_T[rows])[:, None].to(h_RD.dtype)
        dh_RD = torch.empty_like(h_RD) if wants_h else None
        dw_VD = None
        if kept is not None:
            # The upstream gradient scales rows, so it goes on the [T, D] operand instead of the [T, V] one.
            if dh_RD is not None:
                torch.mm(kept, w_VD, out=dh_RD).mul_(minus_grad_R1)
            if wants_w:
                dw_VD = kept.T @ (h_RD * minus_grad_R1)
        else:
            wide = torch.promote_types(h_RD.dtype, torch.float32)
            dw_VD = w_VD.new_zeros(w_VD.shape, dtype=wide) if wants_w else None
            for start in range(0, len(h_RD), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                h_cD = h_RD[part]
                residual_cV = _minus_residual(_softmax_chunk(h_cD, w_VD)[1], ids_R[part]).to(h_RD.dtype)
                if dh_RD is not None:
                    torch.mm(residual_cV, w_VD, out=dh_RD[part]).mul_(minus_grad_R1[part])
                if dw_VD is not None:
                    _add_matmul(dw_VD, residual_cV.T, h_cD * minus_grad_R1[part])
            dw_VD = None if dw_VD is None else dw_VD.to(w_VD.dtype)
        return None if dh_RD is None else _spread(dh_RD, rows, ctx), dw_VD, None, None, None, None


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, w_VD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chunk: int, with_grad: bool
    ) -> Tensor:
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        weights_TK = weights_TK.to(wide)
        loss = torch.zeros((), dtype=wide, device=h_TD.device)
        dh_TD = torch.empty_like(h_TD) if with_grad and ctx.needs_input_grad[0] else None
        dw_VD = w_VD.new_zeros(w_VD.shape, dtype=wide) if with_grad and ctx.needs_input_grad[1] else None
        for start in range(0, len(h_TD), chunk):
            part = slice(start, start + chunk)
            logits_cV, probs_cV = _softmax_chunk(h_TD[part], w_VD)
            weights_cK, ids_cK = weights_TK[part], ids_TK[part]
            logprobs_cK = logits_cV.gather(1, ids_cK) - _log_sum_exp(logits_cV, probs_cV)[:, None]
            loss -= (weights_cK * logprobs_cK).sum()
            if dh_TD is None and dw_VD is None:
                continue
            dlogits_cV = probs_cV.mul_(weights_cK.sum(-1, keepdim=True)).scatter_add_(1, ids_cK, -weights_cK)
            dlogits_cV = dlogits_cV.to(h_TD.dtype)
            if dh_TD is not None:
                torch.mm(dlogits_cV, w_VD, out=dh_TD[part])
            if dw_VD is not None:
                _add_matmul(dw_VD, dlogits_cV.T, h_TD[part])
        ctx.save_for_backward(dh_TD, None if dw_VD is None else dw_VD.to(w_VD.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dh_TD, dw_VD = ctx.saved_tensors
        scaled = (None if d is None else d * grad.to(d.dtype) for d in (dh_TD, dw_VD))
        return *scaled, None, None, None, None


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, the running sum kept in its own, wider dtype."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _spread(values_R: Tensor, rows: Tensor, ctx: Any) -> Tensor:
    """The values of the labelled rows at their places among all rows, zeros elsewhere."""
    if ctx.is_full:
        return values_R
    out = values_R.new_zeros(ctx.num_rows, *values_R.shape[1:])
    out[rows] = values_R
    return out
