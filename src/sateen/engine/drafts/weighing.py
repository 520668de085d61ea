"""What a step says about drafts, told to the choice of their number, and what follows for requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sateen.engine.drafts.length import DraftLength
from sateen.engine.scheduler import Chunk
from sateen.engine.state import Request


def weigh_drafts(
    choice: DraftLength,
    chunks: Sequence[Chunk],
    emitted: Sequence[tuple[Request, int]],
    seconds: tuple[float, float],
    unfinished: Iterable[Request],
) -> None:
    """Tells the choice what a step of nothing but decoding took and brought; other steps say nothing.

    Args:
        choice: revised here; where it decides against drafts, requests stop drafting.
        chunks: of the step.
        emitted: per chunk, its request and the number of its new tokens.
        seconds: of the trunk with the choice of tokens, and of the heads.
        unfinished: requests that run or wait.
    """
    if any(not chunk.samples or chunk.count != 1 + len(chunk.drafts) for chunk in chunks):
        return
    trunk_s, heads_s = seconds
    fates = [
        (len(chunk.drafts), count - 1)
        for chunk, (request, count) in zip(chunks, emitted, strict=True)
        if chunk.drafts and request.finish_reason is None
    ]
    is_decided = choice.record(
        sequences=len(chunks), rows=sum(chunk.count for chunk in chunks), trunk_s=trunk_s,
        heads_s=heads_s if any(chunk.request.wants_drafts for chunk in chunks) else 0.0, drafts=fates,
    )  # fmt: skip
    if is_decided and choice.length == 0:
        for request in unfinished:
            if not request.params.is_repeatable:
                request.wants_drafts = False
                request.drafts, request.draft_probs = [], None
