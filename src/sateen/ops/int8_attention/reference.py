"""INT-FlashAttention as its algorithm: key blocks, integer products, an online softmax in float32.

Query rows do not influence each other, so all rows of a sequence go through a key block at once; the paper's
query blocks change no number. Shape letters: T queries and S keys of one sequence, K key/value heads, G query
heads per key/value head, H and V head sizes, J keys of a block, B sequences.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sateen.ops.int8_attention.quantize import LEVELS, Int8Rows, integer_matmul, quantize_int4, quantize_int8
from sateen.ops.op import Op

LOG2_E = math.log2(math.e)
P_LEVELS = {"u8": 255, "s8": 127}
INT4_CHANNELS = 16  # of queries and keys that share a scale with int4 (source: ours)


class Values(NamedTuple):
    """The values of one sequence: int8 with a scale [K,1,V], [K,1,1] or, by token, [K,S,1]; or floats."""

    v_KSV: Tensor
    scale: Tensor | None
    is_per_token: bool = False


class Codes(NamedTuple):
    """Queries or keys in C runs of channels: integers [..., C, L] and their float32 scales [..., C]."""

    codes: Tensor
    scale: Tensor


class Form(NamedTuple):
    """What a query may see, how P is cut into blocks, rounded and summed, and whether queries are int4."""

    causal: bool
    window: int | None
    levels: int
    row_sum: str
    block_size: int
    is_int4: bool = False


def int8_attention_reference(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKV: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool = True,
    scale: float,
    window: int | None = None,
    sink_N: Tensor | None = None,
    smooth_k: bool = True,
    pv: str = "int8",
    p_bits: str = "u8",
    v_granularity: str = "channel",
    row_sum: str = "float",
    block_size: int = 64,
    return_lse: bool = False,
    qk: str = "int8",
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_attention`."""
    how = Form(causal, window, P_LEVELS[p_bits], row_sum, block_size, qk == "int4")
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(
        pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        k_KSH = k_SKH[k0:k1].float().transpose(0, 1)
        v_KSV = v_SKV[k0:k1].float().transpose(0, 1)
        mean_KH = None
        if smooth_k and k1 > k0:
            mean_KH = k_KSH.mean(1)
            k_KSH = k_KSH - mean_KH.unsqueeze(1)
        keys = quantized(k_KSH, how)
        values = Values(v_KSV, None)
        if pv == "int8" and k1 > k0:
            values = Values(*quantize_int8(v_KSV, 1 if v_granularity == "channel" else (1, 2)))
        out, lse = attend(q_TNH[q0:q1], keys, mean_KH, values, scale, sink_N, how)
        outs.append(out)
        lses.append(lse)
    return gather(q_TNH, v_SKV, outs, lses, return_lse)


def rows_reference(
    q_TNH: Tensor,
    rows: Int8Rows,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    sink_N: Tensor | None = None,
    block_size: int = 64,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """See `sateen.ops.int8_rows_attention`."""
    how = Form(True, window, P_LEVELS["u8"], "float", block_size)
    outs, lses = [], []
    spans = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for b, ((q0, q1), (k0, k1)) in enumerate(spans):
        k8, k_scale = rows.k_SKH[k0:k1].transpose(0, 1), rows.k_scale_SK[k0:k1].T
        keys = Codes(k8.unsqueeze(-2), k_scale.unsqueeze(-1))
        v_scale = rows.v_scale_SK[k0:k1].T.unsqueeze(-1)
        values = Values(rows.v_SKV[k0:k1].transpose(0, 1), v_scale, is_per_token=True)
        mean_KH = rows.k_mean_BKH[b]
        out, lse = attend(q_TNH[q0:q1], keys, mean_KH, values, scale, sink_N, how)
        outs.append(out)
        lses.append(lse)
    return gather(q_TNH, rows.v_SKV, outs, lses, return_lse)


def attend(
    q_TNH: Tensor,
    keys: Codes,
    k_mean_KH: Tensor | None,
    values: Values,
    scale: float,
    sink_N: Tensor | None,
    how: Form,
) -> tuple[Tensor, Tensor]:
    """The output [T, N, V] in float32 and the log-sum-exp [N, T] of one sequence."""
    T, N, _ = q_TNH.shape
    K, S = keys.scale.shape[:2]
    q_KGTH = q_TNH.float().transpose(0, 1).unflatten(0, (K, N // K))
    queries = quantized(q_KGTH, how)
    queries = queries._replace(scale=queries.scale * (scale * LOG2_E))
    visible_TS = visible_keys(T, S, how.causal, how.window, q_TNH.device)
    top = q_KGTH.new_full((K, N // K, T), -torch.inf)  # running maximum of the base-2 scores
    total = torch.zeros_like(top)  # l of the paper
    out = q_KGTH.new_zeros(K, N // K, T, values.v_KSV.shape[-1])
    for start in range(0, S, how.block_size):
        block = slice(start, start + how.block_size)
        seen_TJ = visible_TS[:, block]
        if not bool(seen_TJ.any()):
            continue
        scores = _scores(queries, Codes(keys.codes[:, block], keys.scale[:, block]))
        scores = scores.masked_fill(~seen_TJ, -torch.inf)
        new_top = torch.maximum(top, scores.amax(-1))
        finite_top = torch.where(new_top == -torch.inf, 0.0, new_top)  # rows that have seen nothing yet
        P = (scores - finite_top.unsqueeze(-1)).exp2()
        decay = (top - finite_top).exp2()
        product, summed = _times_values(P, values, block, how)
        total = decay * total + summed.sum(-1)
        out = decay.unsqueeze(-1) * out + product
        top = new_top
    lse = top / LOG2_E + total.log()  # -inf where nothing is visible: log 0
    if k_mean_KH is not None:
        # The scores lack scale * q·mean in every column: nothing to the softmax, something to a sink.
        lse = lse + scale * (q_KGTH @ k_mean_KH[:, None, :, None]).squeeze(-1)
    out = out / torch.where(total > 0, total, 1.0).unsqueeze(-1)
    if sink_N is not None:
        # exp(lse) / (exp(lse) + exp(sink)); a row without keys has lse -inf and stays 0.
        out = out * (lse - sink_N.float().view(K, -1, 1)).sigmoid().unsqueeze(-1)
    return out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1)


def quantized(x: Tensor, how: Form) -> Codes:
    """Codes of queries or keys [..., H], in one run of channels but for int4."""
    if how.is_int4:
        codes, scale = quantize_int4(x, INT4_CHANNELS)
        return Codes(codes, scale.squeeze(-1))
    codes, scale = quantize_int8(x)
    return Codes(codes.unsqueeze(-2), scale)


def _scores(queries: Codes, keys: Codes) -> Tensor:
    """Of queries [K, G, T] and keys [K, J], [K, G, T, J]: exact products per run, scaled and summed."""
    scores = None
    for c in range(keys.codes.shape[-2]):
        run = keys.codes[:, None, :, c]
        products = integer_matmul(queries.codes[..., c, :], run.mT, run.shape[-1] * LEVELS**2)
        part = products.float() * queries.scale[..., c, None] * keys.scale[:, None, None, :, c]
        scores = part if scores is None else scores + part
    assert scores is not None
    return scores


def _times_values(P: Tensor, values: Values, keys: slice, how: Form) -> tuple[Tensor, Tensor]:
    """P times the block's values in float32, and what its row sum is taken of."""
    v = values.v_KSV[:, None, keys]
    if values.scale is None:
        return P @ v, P
    bound = how.block_size * how.levels * LEVELS
    if values.is_per_token:
        # A scale per token cannot leave the sum over tokens, so it joins P, which gets one per row and block.
        weighted = P * values.scale[:, None, keys].mT
        row_scale = weighted.amax(-1, keepdim=True) / how.levels
        P8 = (weighted / torch.where(row_scale > 0, row_scale, 1.0)).round().clamp(max=how.levels)
        return integer_matmul(P8, v, bound).float() * row_scale, P
    P8 = (P * how.levels).round()
    product = integer_matmul(P8, v, bound).float() * (values.scale[:, None] / how.levels)
    return product, P8 / how.levels if how.row_sum == "int8" else P


def visible_keys(T: int, S: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """Which keys each query sees, bool [T, S]; the last query stands at the last key."""
    if not causal:
        return torch.ones(T, S, dtype=torch.bool, device=device)
    place = torch.arange(T, device=device)[:, None] + S - T
    key = torch.arange(S, device=device)
    seen = key <= place
    return seen if window is None else seen & (key > place - window)


def gather(
    q_TNH: Tensor, v: Tensor, outs: list[Tensor], lses: list[Tensor], return_lse: bool
) -> Tensor | tuple[Tensor, ...]:
    """The packed output in q's dtype, with the log-sum-exp where asked for."""
    out = torch.cat(outs).to(q_TNH.dtype) if outs else q_TNH.new_zeros(*q_TNH.shape[:2], v.shape[-1])
    if not return_lse:
        return out
    lse = torch.cat(lses, 1) if lses else q_TNH.new_zeros(q_TNH.shape[1], 0, dtype=torch.float32)
    return out, lse


OP = Op("int8_attention", int8_attention_reference)
ROWS_OP = Op("int8_rows_attention", rows_reference)
