"""From logits to tokens: temperature, top-k, top-p, min-p, greedy choice.

The same processed distribution serves plain sampling, drafting and verification. Random numbers are uniforms
drawn from each request's own generator, so a request's tokens do not depend on its neighbours. Shape letters:
M rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.engine.request import SamplingParams
from sateen.engine.state import Request

FIRST_LOOK = 256  # tokens sorted for a top-p cut before more are
HOTTEST = 1e30  # every temperature from here on is uniform, and float32 still holds it


def mask_padding(logits: Tensor, num_tokens: int) -> Tensor:
    """The logits with the vocabulary's padding rows, those from `num_tokens` on, at -inf."""
    if num_tokens >= logits.shape[-1]:
        return logits
    masked = logits.clone()
    masked[..., num_tokens:] = -torch.inf
    return masked


def distribution(logits_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The probabilities [M, V], float32, that sampling row i with `params[i]` draws from."""
    return cut(logits_MV, params).softmax(-1)


def cut(logits_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The logits [M, V], float32, over their temperatures, with -inf for the tokens that the cuts remove.

    Order as in vLLM: temperature, min-p, top-k, top-p. Ties at a cut keep the lower index.
    """
    device = logits_MV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    scaled = logits_MV.float() / column([min(p.temperature, HOTTEST) for p in params])
    if any(p.min_p > 0 for p in params):
        floor = scaled.amax(-1, keepdim=True) + column([p.min_p for p in params]).log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        scaled = _keep_likeliest(scaled, params)
    return scaled


def _keep_likeliest(scaled_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The logits with -inf for all but the likeliest tokens that top-k and then top-p keep.

    Only as many logits are sorted as the cuts need: a vocabulary is a hundred times larger than most nuclei.
    """
    V, device = scaled_MV.shape[1], scaled_MV.device
    k_M = torch.tensor([min(p.top_k, V) if p.top_k > 0 else V for p in params], device=device)
    p_M = torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=torch.float64, device=device)
    is_open_M = (k_M == V) & (p_M < 1)  # nothing bounds how many are kept
    peak_M1 = scaled_MV.amax(-1, keepdim=True)
    # Sums of exp(logit - peak), through the softmax because exp alone is slow where it underflows.
    sums_M = 1 / scaled_MV.softmax(-1).amax(-1).double() if is_open_M.any() else None
    sizes = [p.top_k if p.top_k > 0 else FIRST_LOOK for p in params if p.top_k > 0 or p.top_p < 1]
    size = min(V, max(sizes) + 1)  # one more, to see whether the last one kept has equals
    while True:
        values_MS = (
            scaled_MV.sort(dim=-1, descending=True).values
            if size == V
            else scaled_MV.topk(size, dim=-1).values
        )
        weights_MS = (values_MS - peak_M1).double().exp()
        weights_MS[torch.arange(size, device=device) >= k_M[:, None]] = 0
        total_M = weights_MS.sum(-1) if sums_M is None else torch.where(is_open_M, sums_M, weights_MS.sum(-1))
        before_MS = weights_MS.cumsum(-1) - weights_MS
        # The likeliest token always stays: nothing is before it.
        kept_M = (before_MS < (p_M * total_M)[:, None]).sum(-1).minimum(k_M)
        if size == V or not ((kept_M == size) & is_open_M).any():
            break
        size = min(V, 16 * size)
    is_whole_M = (k_M == V) & (p_M > 1)
    least_M1 = values_MS.gather(-1, kept_M[:, None].clamp(max=size) - 1)
    least_M1 = least_M1.masked_fill(is_whole_M[:, None], -torch.inf)
    out_MV = scaled_MV.masked_fill(scaled_MV < least_M1, -torch.inf)
    following_M1 = values_MS.gather(-1, kept_M[:, None].clamp(max=size - 1))
    is_tied_M = (following_M1 == least_M1).squeeze(-1) & (kept_M < size) & ~is_whole_M
    for i in is_tied_M.nonzero().flatten().tolist():
        equal_V = scaled_MV[i] == least_M1[i]
        room = kept_M[i] - (scaled_MV[i] > least_M1[i]).sum()
        out_MV[i, equal_V & (equal_V.cumsum(0) > room)] = -torch.inf
    return out_MV


def draw(probs_MV: Tensor, uniforms_M: Tensor) -> Tensor:
    """A token [M] per row by inversion of its distribution, normalised or not; `uniforms` in [0, 1)."""
    cdf = probs_MV.double().cumsum(-1)
    total = cdf[:, -1:]
    # Below the total even after rounding, so that the token found has a positive probability.
    target = torch.minimum(
        uniforms_M.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


def best(logits_MV: Tensor) -> Tensor:
    """The first of the largest logits of each row, int64 [..., M]; numpy finds it several times faster."""
    if logits_MV.device.type == "cpu" and logits_MV.dtype == torch.float32:
        return torch.from_numpy(logits_MV.numpy().argmax(-1))
    return logits_MV.argmax(-1)


def uniforms(requests: Sequence[Request], count: int, device: torch.device) -> Tensor:
    """The next `count` random numbers of each request [requests, count], float64."""
    rows = [torch.rand(count, generator=request.generator, dtype=torch.float64) for request in requests]
    return torch.stack(rows).to(device)


def choose(logits_MV: Tensor, requests: Sequence[Request]) -> tuple[Tensor, Tensor | None, list[int]]:
    """One token per row, greedy or sampled as its request says.

    Returns:
        Tokens int64 [M]; the distributions of the sampled rows, or None; which rows those are.
    """
    sampled = [i for i, request in enumerate(requests) if not request.params.is_greedy]
    if not sampled:
        return best(logits_MV), None, sampled
    theirs = [requests[i] for i in sampled]
    rows = logits_MV if len(sampled) == len(requests) else logits_MV[sampled]
    probs = distribution(rows, [request.params for request in theirs])
    drawn = draw(probs, uniforms(theirs, 1, probs.device)[:, 0])
    if len(sampled) == len(requests):
        return drawn, probs, sampled
    tokens = best(logits_MV)
    tokens[sampled] = drawn
    return tokens, probs, sampled
