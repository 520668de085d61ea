"""Every answer that is an error: OpenAI's error object with the status it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sateen.errors import RequestError


class Problem(Exception):
    """An answer with an error in it.

    Attributes:
        status: of HTTP.
        message: what was given, what is accepted, what to do.
        code: one word for programs.
        param: the field of the request that it is about.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def kind(self) -> str:
        """OpenAI's word for the family of the status."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, Any]:
        """The error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def as_json(self) -> bytes:
        # Escapes everything beyond ASCII: a message may quote half of a surrogate pair, which UTF-8 refuses.
        return json.dumps(self.body()).encode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """A refusal of what the client sent."""
    return Problem(400, message, param=param, code=code)


def from_engine(error: RequestError) -> Problem:
    """The answer to a request that the engine refuses."""
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        wait = str(max(1, round(retry_after_s)))
        return Problem(429, str(error), code="queue_full", headers={"Retry-After": wait})
    name, _, rest = str(error).partition(" ")
    is_field = name.isidentifier() and rest.startswith("is ")
    too_long = "but the context holds" in str(error)
    return bad_request(
        str(error), name if is_field else None, "context_length_exceeded" if too_long else None
    )
