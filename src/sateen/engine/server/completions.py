"""`/v1/completions`: prompts in any of the four forms, and their answer whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sateen.engine.request import CompletionOutput, RequestOutput
from sateen.engine.server.job import Job, News
from sateen.engine.server.problem import bad_request
from sateen.engine.server.schema import CompletionBody
from sateen.engine.server.stream import DONE, event
from sateen.engine.server.token_names import CompletionLogprobs, TokenNames
from sateen.engine.server.usage import aborted, usage

LONG_TEXT = 4096  # characters from which encoding leaves the event loop


async def token_ids(body: CompletionBody, names: TokenNames) -> list[list[int]]:
    """The prompts as token ids.

    Raises:
        Problem: a text for a model without tokenizer, or a text that is not Unicode.
    """
    prompt = body.prompt
    if isinstance(prompt, list) and not isinstance(prompt[0], str):
        return [prompt] if isinstance(prompt[0], int) else prompt
    texts = [prompt] if isinstance(prompt, str) else prompt
    tokenizer = names.tokenizer
    if tokenizer is None:
        raise bad_request("this model has no tokenizer, so it takes token ids only", "prompt")
    if sum(map(len, texts)) < LONG_TEXT:
        return [tokenizer.encode(text) for text in texts]
    return await asyncio.to_thread(tokenizer.encode_batch, texts)


class CompletionAnswer:
    """The answer to one request for text completions."""

    def __init__(self, body: CompletionBody, job: Job, names: TokenNames, model: str):
        self._body, self._job, self._names = body, job, names
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": model,
        }  # fmt: skip
        self._is_prompt_only = bool(body.echo) and body.max_tokens == 0

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of the answer.

        Raises:
            Problem: a completion was given up.
        """
        n = self._job.params.n
        choices = [
            self._choice(index * n + one.index, index, output, one)
            for index, output in enumerate(outputs)
            for one in output.outputs
        ]
        return self._head | {"choices": choices, "usage": self._usage(outputs)}

    def _choice(
        self, number: int, index: int, output: RequestOutput, one: CompletionOutput
    ) -> dict[str, Any]:
        if one.finish_reason == "abort":
            raise aborted(one.stop_reason)
        text = "" if self._is_prompt_only else one.text
        told = None
        if one.logprobs is not None:
            writer = CompletionLogprobs(self._names)
            pieces = []
            if output.prompt_logprobs is not None:
                pieces.append(writer.piece(output.prompt_token_ids, output.prompt_logprobs, is_prompt=True))
            if not self._is_prompt_only:
                pieces.append(writer.piece(one.token_ids, one.logprobs))
            told = {key: [value for piece in pieces for value in piece[key]] for key in pieces[0]}
        return {
            "index": number, "text": self._echo(index) + text, "logprobs": told,
            "finish_reason": one.finish_reason,
        }  # fmt: skip

    def _usage(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return usage(outputs, is_prompt_only=self._is_prompt_only)

    def _echo(self, index: int) -> str:
        """The prompt's text where the answer repeats it."""
        prompt = self._body.prompt
        if not self._body.echo:
            return ""
        if isinstance(prompt, str):
            return prompt
        if isinstance(prompt[index], str):
            return str(prompt[index])
        tokenizer = self._names.tokenizer
        return tokenizer.decode(self._job.prompts[index]) if tokenizer is not None else ""

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events; several at once where several are there.

        Raises:
            Problem: a completion was given up.
            Cancelled: the client left.
        """
        head = json.dumps(self._head)[:-1]
        tail = ', "usage": null}\n\n' if self._body.includes_usage else "}\n\n"
        writers: dict[int, CompletionLogprobs] = {}
        async for batch in self._job.batches():
            chunks = []
            for news in batch:
                if news.finish_reason == "abort":
                    raise aborted(news.stop_reason)
                number = news.prompt * self._job.params.n + news.choice
                is_first = number not in writers
                writer = writers.setdefault(number, CompletionLogprobs(self._names))
                text = self._echo(news.prompt) if is_first else ""
                if not self._is_prompt_only:
                    text += news.text
                told = self._told(news, writer, is_first)
                if not text and told is None and news.finish_reason is None:
                    continue
                chunks.append(
                    f'data: {head}, "choices": [{{"index": {number}, "text": {json.dumps(text)}, "logprobs": '
                    f'{json.dumps(told)}, "finish_reason": {json.dumps(news.finish_reason)}}}]{tail}'
                )
            if chunks:
                yield "".join(chunks).encode()
        if self._body.includes_usage:
            yield event(self._head | {"choices": [], "usage": self._usage(self._job.outputs)})
        yield DONE

    def _told(self, news: News, writer: CompletionLogprobs, is_first: bool) -> dict[str, list[Any]] | None:
        if self._job.params.logprobs is None:
            return None
        pieces = []
        if is_first and self._job.params.prompt_logprobs is not None and news.prompt_logprobs:
            pieces.append(writer.piece(self._job.prompts[news.prompt], news.prompt_logprobs, is_prompt=True))
        if news.logprobs and not self._is_prompt_only:
            pieces.append(writer.piece(news.token_ids, news.logprobs))
        return (
            {key: [value for piece in pieces for value in piece[key]] for key in pieces[0]}
            if pieces
            else None
        )
