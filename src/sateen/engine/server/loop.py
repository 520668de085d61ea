"""The one thread that owns the engine.

Commands go in through a queue and are obeyed between steps. What a step brought goes out in one call,
however many jobs it concerns, so that the cost of crossing threads does not grow with the batch.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from sateen.engine.engine import LLM
from sateen.engine.server.job import Cancelled, Job, News
from sateen.engine.server.metrics import Metrics
from sateen.engine.server.problem import Problem
from sateen.engine.state import Request
from sateen.errors import RequestError

log = logging.getLogger("sateen.server")


@dataclass(eq=False)
class _Work:
    """A job's requests inside the engine.

    Attributes:
        firsts: one request per prompt; the completions of a prompt are its siblings.
        num_open: completions that are not finished.
        told_at: when each completion last got tokens, by the engine's request id.
    """

    job: Job
    firsts: list[Request] = field(default_factory=list)
    num_open: int = 0
    told_at: dict[int, float] = field(default_factory=dict)


class EngineLoop:
    """Runs jobs on an engine in a thread of its own.

    Attributes:
        llm: the engine; only the thread changes it.
        failure: what ended the thread, or None.
    """

    def __init__(self, llm: LLM, metrics: Metrics, *, deadline_s: float | None = None):
        self.llm = llm
        self.failure: Exception | None = None
        self._metrics = metrics
        self._deadline_s = deadline_s
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._work: dict[Job, _Work] = {}
        self._places: dict[int, tuple[_Work, int]] = {}  # by id() of a completion's request: job, prompt
        self._outbox: list[Callable[[], None]] = []
        self._is_stopping = False
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def start(self) -> None:
        """Starts the thread; its news go to the event loop that this is called in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def end_all(self) -> None:
        """Ends the thread after the step it is in, and the jobs with it."""
        self._commands.put(self._stop)

    def join(self) -> None:
        """Waits for the end of the thread."""
        self._thread.join()

    async def submit(self, job: Job) -> None:
        """Hands over a job; returns when the engine has queued it.

        Raises:
            RequestError: the engine refuses it.
            Problem: the engine has failed.
        """
        if not self.is_alive:
            raise self._closed()
        self._commands.put(partial(self._add, job))
        if not self._thread.is_alive():  # it ended just now and reads no command any more
            raise self._closed()
        try:
            await job.accepted()
        except asyncio.CancelledError:
            self.cancel(job)
            raise

    def cancel(self, job: Job) -> None:
        """Ends a job; nothing happens when it is over already. Its rows are free after the current step."""
        if not job.is_over:
            job.fail(Cancelled())
            self._commands.put(partial(self._abort, job))

    def _closed(self) -> Problem:
        if self.failure is None:
            return Problem(503, "the server is shutting down", code="shutting_down")
        return Problem(503, "the engine has failed and serves no request", code="engine_failed")

    # What follows runs in the engine's thread.

    def _main(self) -> None:
        try:
            while not self._is_stopping:
                self._obey()
                if self.llm.has_work:
                    self._step()
                self._send()
        except Exception as error:
            log.exception("the engine failed; no request is served any more")
            self.failure = error
            self._is_stopping = True
        while not self._commands.empty():
            self._commands.get()()
        for job, work in self._work.items():
            self._outbox.append(partial(job.fail, self._closed()))
            if self.failure is None:
                self._drop(work)
        self._send()

    def _obey(self) -> None:
        """All commands that are there; waits for one when there is nothing else to do."""
        if not self.llm.has_work:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _stop(self) -> None:
        self._is_stopping = True

    def _add(self, job: Job) -> None:
        if self._is_stopping:
            self._outbox.append(partial(job.fail, self._closed()))
        if self._is_stopping or job.is_over:  # its client left while it waited here
            return
        work = _Work(job)
        try:
            for index, prompt in enumerate(job.prompts):
                first = self.llm.add(prompt, job.params, deadline_s=self._deadline_s)
                work.firsts.append(first)
                for request in first.siblings:
                    self._places[id(request)] = work, index
                    work.num_open += 1
        except Exception as error:
            self._drop(work)
            if not isinstance(error, RequestError):
                log.exception("a request could not be queued")
                error = Problem(500, f"the request could not be queued: {type(error).__name__}")
            self._outbox.append(partial(job.fail, error))
            return
        self._work[job] = work
        self._metrics.prompt_tokens.inc(sum(len(prompt) for prompt in job.prompts))
        self._outbox.append(job.accept)

    def _abort(self, job: Job) -> None:
        if not self._is_stopping and (work := self._work.pop(job, None)) is not None:
            self._drop(work)

    def _drop(self, work: _Work) -> None:
        for first in work.firsts:
            for request in first.siblings:
                self._places.pop(id(request), None)
            self.llm.abort(first)

    def _step(self) -> None:
        touched = self.llm.step()
        now = time.monotonic()
        num_tokens = 0
        for request in touched:
            place = self._places.get(id(request))
            if place is None:
                continue
            work, index = place
            num_tokens += self._tell(work, index, request, now)
            if request.finish_reason is not None:
                del self._places[id(request)]
                work.num_open -= 1
                if work.num_open == 0:
                    del self._work[work.job]
                    outputs = [first.output() for first in work.firsts]
                    self._outbox.append(partial(work.job.finish, outputs))
        self._metrics.generated_tokens.inc(num_tokens)

    def _tell(self, work: _Work, index: int, request: Request, now: float) -> int:
        """Notes the news of one completion, and passes them on where somebody follows; returns its tokens."""
        is_first = request.request_id not in work.told_at
        news = self.llm.news(request)
        count = len(news.token_ids)
        if count and is_first:
            self._metrics.first_token_s.observe(now - work.job.submitted_at)
        elif count:
            self._metrics.inter_token_s.observe((now - work.told_at[request.request_id]) / count)
        work.told_at[request.request_id] = now
        if work.job.is_stream:
            told = News(
                prompt=index,
                choice=request.index,
                text=news.text,
                token_ids=news.token_ids,
                logprobs=request.logprobs[-count:] if count and request.logprobs else None,
                finish_reason=request.finish_reason,
                stop_reason=request.stop_reason,
                prompt_logprobs=request.siblings[0].prompt_logprobs if is_first else None,
            )
            self._outbox.append(partial(work.job.tell, told))
        return count

    def _send(self) -> None:
        if self._outbox and self._loop is not None:
            calls, self._outbox = self._outbox, []
            try:
                self._loop.call_soon_threadsafe(_call_all, calls)
            except RuntimeError:  # the event loop is closed: nobody is left to tell
                log.debug("news for a closed server were dropped")


def _call_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
