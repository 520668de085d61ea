"""`/v1/chat/completions`: the answer, with its reasoning and tool calls apart, whole or as a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from sateen.data.dialogue import ReplyParser, ReplyPart
from sateen.engine.request import CompletionOutput, RequestOutput
from sateen.engine.server.chat import ChatPrompt, call_object
from sateen.engine.server.job import Job, News
from sateen.engine.server.schema import ChatBody
from sateen.engine.server.stream import DONE, event
from sateen.engine.server.token_names import TokenNames
from sateen.engine.server.usage import aborted, usage


class ChatAnswer:
    """The answer to one chat."""

    def __init__(self, body: ChatBody, prompt: ChatPrompt, job: Job, names: TokenNames, model: str):
        self._body, self._prompt, self._job, self._names = body, prompt, job, names
        self._id, self._created, self._model = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model
        self._best = body.top_logprobs or 0

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The body of the answer.

        Raises:
            Problem: a completion was given up.
        """
        (output,) = outputs
        choices, reasoning = [], ""
        for one in output.outputs:
            if one.finish_reason == "abort":
                raise aborted(one.stop_reason)
            parser = self._prompt.parser()
            parts = [*parser.feed(one.text), *parser.finish()]
            reasoning += "".join(part.reasoning for part in parts)
            choices.append(self._choice(one, parts))
        told = usage(outputs, num_reasoning=self._count(reasoning))
        return self._head("chat.completion") | {"choices": choices, "usage": told}

    def _choice(self, one: CompletionOutput, parts: Sequence[ReplyPart]) -> dict[str, Any]:
        calls = [call_object(part.call) for part in parts if part.call is not None]
        content = "".join(part.content for part in parts)
        reasoning = "".join(part.reasoning for part in parts)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message |= {"content": content or None, "tool_calls": calls}
        told = None
        if one.logprobs is not None:
            told = {"content": self._names.chat(one.token_ids, one.logprobs, self._best), "refusal": None}
        return {
            "index": one.index, "message": message, "logprobs": told,
            "finish_reason": _end(one.finish_reason, bool(calls)),
        }  # fmt: skip

    def _count(self, reasoning: str) -> int:
        """Tokens of the reasoning's text, encoded again: generated ones may have been cut differently."""
        tokenizer = self._names.tokenizer
        return len(tokenizer.encode(reasoning)) if reasoning and tokenizer is not None else 0

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer as events; several at once where several are there.

        Raises:
            Problem: a completion was given up.
            Cancelled: the client left.
        """
        head = f'data: {json.dumps(self._head("chat.completion.chunk"))[:-1]}, "choices": [{{"index": '
        tail = '}], "usage": null}\n\n' if self._body.includes_usage else "}]}\n\n"
        choices = [
            _Choice(f"{head}{index}", tail, self._prompt.parser(), self._told)
            for index in range(self._job.params.n)
        ]
        yield "".join(one.chunk({"role": "assistant", "content": ""}) for one in choices).encode()
        async for batch in self._job.batches():
            chunks = [chunk for news in batch for chunk in choices[news.choice].chunks(news)]
            if chunks:
                yield "".join(chunks).encode()
        if self._body.includes_usage:
            num_reasoning = self._count("".join(one.reasoning for one in choices))
            told = usage(self._job.outputs, num_reasoning=num_reasoning)
            yield event(self._head("chat.completion.chunk") | {"choices": [], "usage": told})
        yield DONE

    def _told(self, news: News) -> list[dict[str, Any]]:
        return self._names.chat(news.token_ids, news.logprobs, self._best) if news.logprobs else []


class _Choice:
    """One completion of a stream: what is parsed so far, and what waits for the next chunk."""

    def __init__(
        self, head: str, tail: str, parser: ReplyParser, told: Callable[[News], list[dict[str, Any]]]
    ):
        self._head, self._tail, self._parser, self._told = head, tail, parser, told
        self._num_calls = 0
        self._logprobs: list[dict[str, Any]] = []  # of tokens whose text is still held back
        self.reasoning = ""

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        """One event; it takes the log-probabilities that wait along."""
        told = json.dumps({"content": self._logprobs, "refusal": None}) if self._logprobs else "null"
        self._logprobs = []
        return (
            f'{self._head}, "delta": {json.dumps(delta)}, "logprobs": {told}, '
            f'"finish_reason": {json.dumps(finish_reason)}{self._tail}'
        )

    def chunks(self, news: News) -> list[str]:
        """The events that some news give."""
        if news.finish_reason == "abort":
            raise aborted(news.stop_reason)
        self._logprobs += self._told(news)
        parts = self._parser.feed(news.text) if news.text else []
        if news.finish_reason is not None:
            parts += self._parser.finish()
        told = [self.chunk(self._delta(part)) for part in parts]
        if news.finish_reason is not None:
            told.append(self.chunk({}, _end(news.finish_reason, self._num_calls > 0)))
        return told

    def _delta(self, part: ReplyPart) -> dict[str, Any]:
        if part.call is not None:
            self._num_calls += 1
            return {"tool_calls": [{"index": self._num_calls - 1, **call_object(part.call)}]}
        if part.reasoning:
            self.reasoning += part.reasoning
            return {"reasoning_content": part.reasoning}
        return {"content": part.content}


def _end(finish_reason: str | None, has_calls: bool) -> str | None:
    """OpenAI's word for the end of a completion."""
    return "tool_calls" if has_calls and finish_reason == "stop" else finish_reason
