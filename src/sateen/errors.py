"""The exceptions Sateen raises for its users' mistakes and its machine's limits.

Every message says what was given, what is accepted and what to do next, in one line. `assert` is kept for
our own invariants; the command line turns each of these into that one line and an exit code.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SateenError(Exception):
    """The base of every error that Sateen raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(SateenError, ValueError):
    """A recipe, flag or model config has a key or value that is not accepted."""

    exit_code = 2


class ShapeError(SateenError, ValueError):
    """Tensors whose shapes do not fit together; the message prints the shapes."""

    exit_code = 2


class CheckpointError(SateenError):
    """A checkpoint that is incomplete, damaged or does not belong to the model that reads it."""

    exit_code = 2


class RequestError(SateenError, ValueError):
    """A generation request that the engine cannot serve: too long, empty or with unusable sampling values."""

    exit_code = 2


class QueueFull(RequestError):
    """The engine's waiting queue is full; nothing is wrong with the request.

    Attributes:
        retry_after_s: seconds after which a place should be free, from the pace measured so far.
    """

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class BackendUnavailable(SateenError, RuntimeError):
    """A kernel backend was asked for by name and cannot run here; the message lists the reasons."""


class AccuracyError(SateenError):
    """A cheaper form of a computation missed its bound of accuracy on what it was given."""

    exit_code = 3


class TrainingError(SateenError):
    """Training cannot go on: a loss or gradient is not finite; the last checkpoint is still good."""


class RewardError(SateenError):
    """A reward could not be computed; a wrong answer is not an error."""


def nearest(given: str, known: Iterable[str]) -> str:
    """A hint `; did you mean X?` for the known name nearest to `given`, or an empty string."""
    close = get_close_matches(given, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """The message for a registry miss: what was given, the nearest name and all known names."""
    names = sorted(known)
    return f"unknown {kind} {given!r}{nearest(given, names)} (known: {', '.join(names) or 'none'})"
