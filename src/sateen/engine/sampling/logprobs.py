"""Log-probabilities beside the tokens: of completions, raw or as they were sampled, and of prompts.

Shape letters: M rows, V vocabulary, T rows of a chunk, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice

import torch
from torch import Tensor

from sateen.engine.request import Logprob, SamplingParams
from sateen.engine.sampling.sampler import cut
from sateen.engine.state import Request
from sateen.models.decoder import Decoder

SLICE_NUMBERS = 1 << 22  # logits of a prompt held at once


def ranked_logprobs(logits_MV: Tensor, tokens: Sequence[int], num_best: int) -> list[dict[int, Logprob]]:
    """For each row the log-probability and rank of its token, then of the `num_best` likeliest ones."""
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


def processed_logits(logits_MV: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """What `distribution` takes the softmax of; greedy rows have no temperature and no cuts."""
    sampled = [i for i, p in enumerate(params) if not p.is_greedy]
    if not sampled:
        return logits_MV
    out = logits_MV.to(torch.float32, copy=True)
    out[sampled] = cut(out[sampled], [params[i] for i in sampled])
    return out


def completion_logprobs(
    raw_MV: Tensor,
    shaped_MV: Tensor,
    requests: Sequence[Request],
    drafts: Sequence[list[int]],
    tokens: Sequence[list[int]],
) -> list[list[dict[int, Logprob]]]:
    """For each request what `ranked_logprobs` says of its new tokens; nothing where it did not ask.

    Args:
        raw_MV: the model's logits, for each request at its newest token and then at each of its drafts.
        shaped_MV: the same after penalties, bias and grammar.
        drafts: the drafts that this pass carried.
        tokens: what each request emits.
    """
    found: list[list[dict[int, Logprob]]] = [[] for _ in requests]
    firsts = list(accumulate((len(d) + 1 for d in drafts), initial=0))
    wanted: dict[tuple[int, str], list[int]] = {}
    for i, request in enumerate(requests):
        if request.params.logprobs is not None:
            wanted.setdefault((request.params.logprobs, request.params.logprobs_mode), []).append(i)
    for (num_best, mode), members in wanted.items():
        rows = [firsts[i] + j for i in members for j in range(len(tokens[i]))]
        logits_MV = raw_MV if mode == "raw" else shaped_MV
        if len(rows) != len(logits_MV):
            logits_MV = logits_MV[torch.tensor(rows, device=logits_MV.device)]
        if mode == "processed":
            params = [requests[i].params for i in members for _ in tokens[i]]
            logits_MV = processed_logits(logits_MV, params)
        flat = iter(ranked_logprobs(logits_MV, [token for i in members for token in tokens[i]], num_best))
        for i in members:
            found[i] = list(islice(flat, len(tokens[i])))
    return found


def score_prompt(model: Decoder, request: Request, start: int, hidden_TD: Tensor) -> None:
    """Adds the log-probabilities of the prompt's tokens behind those that the request has already.

    Few logits exist at once, however long the prompt is. What was found before a preemption stays.

    Args:
        start: position of the first row of `hidden_TD`; no row between it and the last one used is missing.
    """
    scored = request.prompt_logprobs
    stop = min(start + len(hidden_TD), request.num_prompt - 1)  # the row before a token scores it
    assert start < len(scored), "rows of the prompt were skipped"
    num_best = request.params.prompt_logprobs
    assert num_best is not None
    size = max(1, SLICE_NUMBERS // model.config.vocab_size)
    for first in range(len(scored) - 1, stop, size):
        end = min(first + size, stop)
        logits_MV = model.logits(model.head_input(hidden_TD[first - start : end - start]))
        scored += ranked_logprobs(logits_MV, request.tokens[first + 1 : end + 1], num_best)
