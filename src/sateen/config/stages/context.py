"""What a stage's function is given: its settings, the run folder and where to report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sateen.config.stages.base import StageConfig

if TYPE_CHECKING:
    from sateen.config.run import RunConfig


class Progress(Protocol):
    """Where a stage tells a person how far it is; results go into the run folder, never through here."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Opens a bar of `total` tokens, `done` of them from an earlier process."""

    def update(self, done: int, **values: float) -> None:
        """Moves the bar to `done` tokens and shows the newest values, for example `loss=2.31`."""

    def note(self, text: str) -> None:
        """One line of talk."""

    def stop(self) -> None:
        """Closes the bar."""


class Silent:
    """A `Progress` that says nothing, for tests and library use."""

    def start(self, what: str, total: int, done: int = 0) -> None: ...

    def update(self, done: int, **values: float) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """What a stage's function is given.

    Attributes:
        config: the whole run.
        stage: this stage's settings, an instance of the class in `STAGES`.
        stage_index: its position in `config.stages`.
        folder: the run folder; exists and belongs to this process.
        progress: where to report to the person who waits.
    """

    config: RunConfig
    stage: StageConfig
    stage_index: int
    folder: Path
    progress: Progress
