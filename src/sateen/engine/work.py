"""Requests in work: queued, stepped forward, ended. `LLM` is the face of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from sateen.engine.drafts.length import DraftLength
from sateen.engine.drafts.weighing import weigh_drafts
from sateen.engine.limits import Limits
from sateen.engine.runner import Runner
from sateen.engine.scheduler import Scheduler
from sateen.engine.state import Request
from sateen.engine.stats import EngineStats
from sateen.engine.weights import WeightWatch
from sateen.models.decoder import Decoder


class Work:
    """What an engine has to do, one `step` at a time.

    Attributes:
        draft_length: how many drafts pay; None for all there are.
        stats: counts since the engine was made.
        weights_version: given to requests with their first token.
    """

    def __init__(
        self,
        model: Decoder,
        scheduler: Scheduler,
        runner: Runner,
        limits: Limits,
        draft_length: DraftLength | None,
    ):
        self.scheduler, self.runner, self.limits = scheduler, runner, limits
        self.draft_length = draft_length
        self.stats = EngineStats()
        self.weights_version = 0
        self._watch = WeightWatch(model)
        self._ended: list[Request] = []  # aborted since the last step, which reports them

    def queue(self, request: Request) -> None:
        """Lets a request wait for its turn."""
        self.stats.prompt_tokens += request.num_prompt if request.index == 0 else 0
        choice = self.draft_length
        request.wants_drafts = choice is None or request.params.is_repeatable or choice.wants_drafts()
        self.scheduler.add(request)

    def run(self, firsts: Sequence[Request]) -> Iterator[Request]:
        """Steps until all completions of these are finished; yields each whenever it got new tokens."""
        requests = [request for first in firsts for request in first.siblings]
        mine = {id(request) for request in requests}
        try:
            for request in requests:
                self.queue(request)
            while mine:
                for request in self.step():
                    if id(request) in mine:
                        if request.finish_reason is not None:
                            mine.discard(id(request))
                        yield request
        finally:
            for request in requests:
                if id(request) in mine:
                    self._abort(request)

    def abort(self, request: Request) -> None:
        """See `LLM.abort`."""
        for sibling in request.siblings:
            if sibling.finish_reason is None:
                self._abort(sibling)
                self._ended.append(sibling)

    def _abort(self, request: Request, reason: str | None = None) -> None:
        request.abort(reason)
        self.stats.aborted += 1
        self._finish(request)

    def _finish(self, request: Request) -> None:
        self.limits.ended(request)
        self.stats.draft.add(request.draft)
        self.scheduler.remove(request)

    def step(self) -> list[Request]:
        """See `LLM.step`."""
        start = time.perf_counter()
        for request in self.limits.expired():
            self._abort(request, "deadline")
            self._ended.append(request)
        self.limits.sweep()
        ended, self._ended = self._ended, []
        scheduler, prefix = self.scheduler, self.scheduler.prefix
        # A trainer changes weights between calls, when nothing runs.
        is_idle = not scheduler.running and bool(scheduler.waiting)
        if prefix is not None and is_idle and self._watch.has_changed():
            prefix.clear()
        if self.draft_length is not None:
            scheduler.max_drafts = self.draft_length.verify_length()
        chunks = scheduler.plan()
        if not chunks:
            return ended
        emitted = self.runner.step(chunks)
        scheduler.advance(chunks)
        if self.draft_length is not None:
            unfinished = (*scheduler.running, *scheduler.waiting)
            weigh_drafts(self.draft_length, chunks, emitted, self.runner.seconds, unfinished)
        for request, count in emitted:
            self.stats.generated_tokens += count
            if request.num_generated == count:
                request.weights_version = self.weights_version
            if request.finish_reason is not None:
                self._finish(request)
        self.stats.steps += 1
        self.stats.seconds += time.perf_counter() - start
        return ended + [request for request, _ in emitted]
