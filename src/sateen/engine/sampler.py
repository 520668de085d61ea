"""From logits to tokens: temperature, top-k, top-p, min-p, greedy choice, raw log-probabilities.

The same processed distribution serves plain sampling, drafting and verification. Random numbers are uniforms
drawn from each request's own generator, so a request's tokens do not depend on its neighbours. Shape letters:
M rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sateen.engine.request import Logprob, SamplingParams
from sateen.engine.state import Request


def mask_padding(logits: Tensor, num_tokens: int) -> Tensor:
    """The logits with the vocabulary's padding rows, those from `num_tokens` on, at -inf."""
    if num_tokens >= logits.shape[-1]:
        return logits
    masked = logits.clone()
    masked[..., num_tokens:] = -torch.inf
    return masked


def distribution(logits_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """The probabilities [M, V], float32, that sampling row i with `params[i]` draws from.

    Order as in vLLM: temperature, min-p, top-k, top-p. Ties at a cut keep the lower index.
    """
    device = logits_MV.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

    scaled = logits_MV.float() / column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        floor = scaled.amax(-1, keepdim=True) + column([p.min_p for p in params]).log()
        scaled = scaled.masked_fill(scaled < floor, -torch.inf)
    V = logits_MV.shape[1]
    if any(p.top_k > 0 or p.top_p < 1 for p in params):
        values, order = scaled.sort(dim=-1, descending=True, stable=True)
        top_k = column([float(p.top_k if p.top_k > 0 else V) for p in params])
        values = values.masked_fill(torch.arange(V, device=device) >= top_k, -torch.inf)
        probs = values.softmax(-1)
        before = probs.cumsum(-1) - probs
        # The likeliest token always stays, whatever rounding does to the running sum.
        drop = before >= column([p.top_p if p.top_p < 1 else 2.0 for p in params])
        drop[:, 0] = False
        values = values.masked_fill(drop, -torch.inf)
        scaled = torch.empty_like(values).scatter_(-1, order, values)
    return scaled.softmax(-1)


def draw(probs_MV: Tensor, uniforms_M: Tensor) -> Tensor:
    """A token [M] per row by inversion of its distribution, normalised or not; `uniforms` in [0, 1)."""
    cdf = probs_MV.double().cumsum(-1)
    total = cdf[:, -1:]
    # Below the total even after rounding, so that the token found has a positive probability.
    target = torch.minimum(
        uniforms_M.double()[:, None] * total, torch.nextafter(total, torch.zeros_like(total))
    )
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)


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
        return logits_MV.argmax(-1), None, sampled  # the first of equal maxima
    theirs = [requests[i] for i in sampled]
    rows = logits_MV if len(sampled) == len(requests) else logits_MV[sampled]
    probs = distribution(rows, [request.params for request in theirs])
    drawn = draw(probs, uniforms(theirs, 1, probs.device)[:, 0])
    if len(sampled) == len(requests):
        return drawn, probs, sampled
    tokens = logits_MV.argmax(-1)
    tokens[sampled] = drawn
    return tokens, probs, sampled


def raw_logprobs(logits_MV: Tensor, tokens: Sequence[int], num_best: int) -> list[dict[int, Logprob]]:
    """For each row the raw log-probability and rank of its token, then of the `num_best` likeliest ones."""
    logprobs = logits_MV.float().log_softmax(-1)
    chosen_M1 = torch.tensor(list(tokens), device=logprobs.device)[:, None]
    value_M1 = logprobs.gather(-1, chosen_M1)
    ranks = ((logprobs > value_M1).sum(-1) + 1).tolist()
    values = value_M1.squeeze(-1).tolist()
    if num_best == 0:
        return [{t: Logprob(v, rank)} for t, v, rank in zip(tokens, values, ranks, strict=True)]
    best = logprobs.topk(min(num_best, logprobs.shape[-1]), dim=-1)
    rows = []
    for i, (ids, found) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
        row = {tokens[i]: Logprob(values[i], ranks[i])}
        for rank, (token, value) in enumerate(zip(ids, found, strict=True), 1):
            row.setdefault(token, Logprob(value, rank))
        rows.append(row)
    return rows
