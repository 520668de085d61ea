"""One HTTP request on its way through the engine, as the event loop sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Literal, NamedTuple

from sateen.engine.request import Logprob, RequestOutput, SamplingParams


class News(NamedTuple):
    """What one completion got.

    Attributes:
        prompt: its prompt's place in the job.
        choice: its place among the completions of the prompt.
        text: new text that no stop string takes back.
        token_ids: new tokens.
        logprobs: of the new tokens, where asked for.
        finish_reason: with the last news, as in `CompletionOutput`; so is `stop_reason`.
        prompt_logprobs: with the first news, where asked for; as in `RequestOutput`.
    """

    prompt: int
    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: Literal["stop", "length", "abort"] | None
    stop_reason: str | int | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None


class Cancelled(Exception):
    """Nobody waits for the job any more, or the server ends."""


class Job:
    """The prompts of one HTTP request.

    Attributes:
        prompts: token ids.
        params: the same for all prompts.
        is_stream: news are wanted as they come, not only the outputs at the end.
        submitted_at: of the monotonic clock.
        outputs: one per prompt; empty until the job is complete.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, is_stream: bool):
        self.prompts, self.params, self.is_stream = prompts, params, is_stream
        self.submitted_at = time.monotonic()
        self.outputs: list[RequestOutput] = []
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox: list[News] = []
        self._is_over = False
        self._error: Exception | None = None
        self._wake = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Complete, failed or cancelled."""
        return self._is_over

    def accept(self) -> None:
        """The engine has queued it."""
        if not self._accepted.done():
            self._accepted.set_result(None)

    def tell(self, news: News) -> None:
        """Something new."""
        self._inbox.append(news)
        self._wake.set()

    def finish(self, outputs: list[RequestOutput]) -> None:
        """All there is."""
        self.outputs, self._is_over = outputs, True
        self._wake.set()

    def fail(self, error: Exception) -> None:
        """It ends here; whoever waits gets the error."""
        if self._is_over:
            return
        self._error, self._is_over = error, True
        if not self._accepted.done():
            self._accepted.set_exception(error)
        self._wake.set()

    async def accepted(self) -> None:
        """Returns when the engine has queued it; raises why it did not."""
        await self._accepted

    async def batches(self) -> AsyncIterator[list[News]]:
        """News in the order they came, all that are there at once; `outputs` is set after the last.

        Raises:
            Cancelled: nobody is meant to listen any more.
            Problem: the engine ended it.
        """
        while True:
            if not self._inbox and not self._is_over:
                self._wake.clear()
                await self._wake.wait()
            if self._error is not None:
                raise self._error
            news, self._inbox = self._inbox, []
            if news:
                yield news
            elif self._is_over:
                return

    async def completed(self) -> list[RequestOutput]:
        """The outputs, when all are there; errors as for `batches`."""
        async for _ in self.batches():
            pass
        return self.outputs
