"""One operator, several backends: what `ops.attention(..., backend=...)` resolves to.

An `Op` owns its reference (plain torch, the truth) and the backends that registered themselves. `auto`
takes the first backend that can run the call, in the order of their priority, and logs each decision
once. A backend asked for by name runs or raises `BackendUnavailable`; nothing is swapped behind the
caller's back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sateen.errors import BackendUnavailable, unknown_name

log = logging.getLogger("sateen.ops")

Unsupported = Callable[..., str | None]


@dataclass(frozen=True)
class Backend:
    """A way to compute an op.

    Attributes:
        name: what users write in `backend=`.
        function: takes the op's arguments.
        why_not: takes the same arguments; returns the reason it cannot run them, or None.
        priority: higher is tried first by `auto`; the reference has 0.
    """

    name: str
    function: Callable[..., Any]
    why_not: Unsupported
    priority: int


class Op:
    """A named operator with a reference and any number of faster backends."""

    def __init__(self, name: str, reference: Callable[..., Any]):
        self.name = name
        self.backends: dict[str, Backend] = {
            "reference": Backend("reference", reference, lambda *_, **__: None, 0)
        }
        self._logged: set[str] = set()

    def register(
        self, name: str, *, priority: int, why_not: Unsupported
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """A decorator that adds a backend; see `Backend` for the arguments."""

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            assert name not in self.backends, f"{self.name}: backend {name} registered twice"
            self.backends[name] = Backend(name, function, why_not, priority)
            return function

        return add

    def choose(self, backend: str, *args: Any, **kwargs: Any) -> Backend:
        """The backend that will run these arguments.

        Raises:
            BackendUnavailable: `backend` is unknown, or was named and cannot run this call.
        """
        if backend != "auto":
            chosen = self.backends.get(backend)
            if chosen is None:
                raise BackendUnavailable(
                    unknown_name(f"{self.name} backend", backend, ["auto", *self.backends])
                )
            reason = chosen.why_not(*args, **kwargs)
            if reason is not None:
                raise BackendUnavailable(f"{self.name}: backend {backend!r} cannot run this call: {reason}")
            return chosen
        for candidate in sorted(self.backends.values(), key=lambda b: -b.priority):
            if candidate.why_not(*args, **kwargs) is None:
                if candidate.name not in self._logged:
                    self._logged.add(candidate.name)
                    log.info("%s: auto chose backend %s", self.name, candidate.name)
                return candidate
        raise AssertionError("the reference accepts every call")

    def explain(self, *args: Any, **kwargs: Any) -> dict[str, str]:
        """For each backend `"ok"` or the reason it cannot run these arguments, best first."""
        ordered = sorted(self.backends.values(), key=lambda b: -b.priority)
        return {b.name: b.why_not(*args, **kwargs) or "ok" for b in ordered}

    def __call__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> Any:
        return self.choose(backend, *args, **kwargs).function(*args, **kwargs)
