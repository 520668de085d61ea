"""The routes, and every error put into OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sateen import __version__
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.engine.server.chat import hidden_tags, render
from sateen.engine.server.chats import ChatAnswer
from sateen.engine.server.completions import CompletionAnswer, token_ids
from sateen.engine.server.gate import Doors, Gate
from sateen.engine.server.job import Cancelled, Job
from sateen.engine.server.loop import EngineLoop
from sateen.engine.server.metrics import Metrics
from sateen.engine.server.page import page
from sateen.engine.server.params import chat_params, completion_params
from sateen.engine.server.problem import Problem, bad_request, from_engine
from sateen.engine.server.schema import Body, ChatBody, CompletionBody
from sateen.engine.server.stream import EventStream, tied_to_client
from sateen.engine.server.token_names import TokenNames
from sateen.errors import RequestError

log = logging.getLogger("sateen.server")


class Service:
    """One engine behind HTTP.

    Attributes:
        app: the ASGI application; its lifespan starts and stops the engine's thread.
        engine: that thread.
        doors: who is let in.
    """

    def __init__(
        self, llm: LLM, *, name: str, doors: Doors, deadline_s: float | None = None, max_choices: int = 1024
    ):
        """
        Args:
            llm: the engine; from now on nobody else may use it.
            name: what the model is called by clients.
            doors: the key, and the size of bodies.
            deadline_s: seconds that a request may take.
            max_choices: most completions of one request, over all of its prompts.
        """
        self.metrics = Metrics(llm)
        self.engine = EngineLoop(llm, self.metrics, deadline_s=deadline_s)
        self.doors = doors
        self._llm, self._name, self._max_choices = llm, name, max_choices
        self._names = TokenNames(llm.tokenizer)
        # Where the tags of calls and reasoning are special tokens, texts must keep special tokens.
        self._chat_keeps_specials = llm.tokenizer is not None and hidden_tags(llm.tokenizer)
        self._created = int(time.time())
        self.app = FastAPI(
            title="sateen", version=__version__, docs_url=None, redoc_url=None, lifespan=self._lifespan
        )
        self._add_routes()
        self.app.add_middleware(Gate, doors=doors, metrics=self.metrics)

    def _add_routes(self) -> None:
        get, post = (
            partial(self.app.get, response_class=Response),
            partial(self.app.post, response_class=Response),
        )
        get("/")(self._page)
        get("/health")(self._health)
        get("/metrics")(self._scrape)
        get("/stats")(self._stats)
        get("/v1/models")(self._models)
        get("/v1/models/{model:path}")(self._model)
        post("/v1/completions")(self._completions)
        post("/v1/chat/completions")(self._chat)
        for kind in (Problem, RequestError, RequestValidationError, HTTPException, Cancelled, Exception):
            self.app.add_exception_handler(kind, _told)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            self.engine.end_all()
            await asyncio.to_thread(self.engine.join)

    async def _completions(self, body: CompletionBody, request: Request) -> Response:
        """Continues texts."""
        self._check_model(body)
        params = completion_params(body)
        if body.stream and body.echo and params.n > 1 and params.logprobs is not None:
            raise bad_request("a stream with echo and logprobs has n = 1", "n")
        prompts = await token_ids(body, self._names)
        job = self._job(body, prompts, params)
        answer = CompletionAnswer(body, job, self._names, self._name)
        return await self._serve(job, answer, request)

    async def _chat(self, body: ChatBody, request: Request) -> Response:
        """Says the next turn of a conversation."""
        self._check_model(body)
        if self._names.tokenizer is None:
            raise bad_request(
                "this model has no tokenizer, so it cannot chat; use /v1/completions", "messages"
            )
        params = chat_params(body, self._llm.max_model_len, skip_special_tokens=not self._chat_keeps_specials)
        prompt = await asyncio.to_thread(render, body, self._names.tokenizer)
        job = self._job(body, [prompt.token_ids], params)
        answer = ChatAnswer(body, prompt, job, self._names, self._name)
        return await self._serve(job, answer, request)

    def _job(self, body: Body, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Job:
        if (count := len(prompts) * params.n) > self._max_choices:
            raise bad_request(
                f"the request asks for {count} completions; accepted: up to {self._max_choices}", "n"
            )
        return Job(prompts, params, is_stream=bool(body.stream))

    async def _serve(self, job: Job, answer: CompletionAnswer | ChatAnswer, request: Request) -> Response:
        if job.is_stream:
            await self.engine.submit(job)
            return EventStream(self.engine, job, answer.stream())
        async with tied_to_client(self.engine, job, request.receive):
            await self.engine.submit(job)
            return _json(answer.whole(await job.completed()))

    def _check_model(self, body: Body) -> None:
        if body.model is not None and body.model != self._name:
            raise _unknown_model(body.model, self._name)

    async def _models(self) -> Response:
        """The model that is served."""
        return _json({"object": "list", "data": [self._card()]})

    async def _model(self, model: str) -> Response:
        """The model of this name."""
        if model != self._name:
            raise _unknown_model(model, self._name)
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._name, "object": "model", "created": self._created, "owned_by": "sateen",
            "max_model_len": self._llm.max_model_len,
        }  # fmt: skip

    async def _health(self) -> Response:
        """Whether work is taken."""
        if not self.engine.is_alive:
            raise Problem(503, "the engine has failed", code="engine_failed")
        if self.doors.is_draining:
            raise Problem(503, "the server is shutting down", code="shutting_down")
        return _json({"status": "ok"})

    async def _scrape(self) -> Response:
        """Counters in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _stats(self) -> Response:
        """What the chat page shows, as JSON."""
        return _json({"model": self._name, **self.metrics.live()})

    async def _page(self) -> Response:
        """The chat page."""
        return page()


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _unknown_model(given: str, name: str) -> Problem:
    return Problem(
        404,
        f"there is no model {given!r:.200}; this server has {name!r}",
        param="model",
        code="model_not_found",
    )


async def _told(_: Request, error: Exception) -> Response:
    problem = _problem(error)
    return Response(problem.as_json(), problem.status, headers=problem.headers, media_type="application/json")


def _problem(error: Exception) -> Problem:
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestError):
        return from_engine(error)
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        return Problem(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, Cancelled):
        return Problem(499, "the client left")  # nobody reads it; metrics count it under nginx's number
    return Problem(500, f"the server failed: {type(error).__name__}; its log says where")


def _invalid(error: RequestValidationError) -> Problem:
    """What the schema has against a body: the first field that is wrong."""
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}")
    if "param" in (context := first.get("ctx") or {}):
        return bad_request(context["message"], context["param"])
    place = [str(part) for part in first["loc"][1:]]
    same = [one["msg"] for one in found if one["loc"][1:2] == first["loc"][1:2]]
    what = "; ".join(dict.fromkeys(same[:4]))
    return bad_request(f"{'.'.join(place) or 'the body'}: {what}", place[0] if place else None)
