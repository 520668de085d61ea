"""How `engine.py` opens engines and compares them; what it compares is in `_engine_sections.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from _engine_inputs import Files, Prompts
from _pairs import interleave, line, missing, row
from _worker import Worker, WorkerError

HERE = Path(__file__).resolve().parent
SCRIPTS = {
    "sateen": "_peer_sateen.py",
    "llama.cpp": "_peer_llama_cpp.py",
    "transformers": "_peer_transformers.py",
    "vLLM": "_peer_vllm.py",
    "sateen serve": "_peer_http.py",
}

IDLE_S = 0.5
BUSY = 0.04  # of a core
# Our name of a form of the weights -> the engine's.
FORMS = {"bf16": "auto", "int8": "int8", "int4": "int4"}


@dataclass(frozen=True)
class Side:
    """An engine and how it is loaded.

    Attributes:
        name: in tables, such as `llama.cpp F16`.
        kind: a key of `SCRIPTS`.
        options: of the worker's `load`.
        bar: least ratio of ours over this one, or None.
        target: ratio that is aimed at.
    """

    name: str
    kind: str
    options: dict[str, Any]
    bar: float | None = None
    target: float | None = None


Measure = Callable[[Worker, int], float]


@dataclass
class Bench:
    """Settings of a run, and the rows that were measured.

    Attributes:
        files: the model.
        prompts: text to read.
        pythons: kind of engine -> its Python; None where it was not given.
        threads: computing threads of every engine.
        pairs: rounds of a comparison.
        is_quick: less of everything, to see that it runs.
        logs: folder for what the engines say.
        demo: another model for the perplexity, or None.
        rows: of the section at work.
        versions: of the engines that were loaded.
    """

    files: Files
    prompts: Prompts
    pythons: dict[str, str | None]
    threads: int
    pairs: int
    is_quick: bool
    logs: Path
    demo: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)

    def size(self, full: int, quick: int) -> int:
        """One of the two, as the run is."""
        return quick if self.is_quick else full

    def add(self, found: dict[str, Any]) -> None:
        """Keeps a row and shows it."""
        self.rows.append(found)
        talk(line(found))

    @contextmanager
    def open(self, side: Side) -> Iterator[tuple[Worker, dict[str, Any]]]:
        """A loaded engine and what it said of itself; ended afterwards.

        Raises:
            WorkerError: it is not there or does not load; `kind` is `Missing` without a Python for it.
        """
        python = self.pythons.get(side.kind)
        if python is None:
            flag = side.kind.lower().replace(".", "-")
            why = f"no Python with {side.kind} was given; use --{flag} PYTHON"
            raise WorkerError("Missing", why, side.name)
        log = self.logs / f"{side.name.replace(' ', '-').replace('/', '-')}.log"
        environment = {"OMP_NUM_THREADS": str(self.threads)}
        worker = Worker(side.name, [python, HERE / SCRIPTS[side.kind]], log=log, environment=environment)
        try:
            talk(f"loading {side.name}")
            said = worker.ask("load", threads=self.threads, **side.options)
            self.versions[side.kind] = said.get("version")
            yield worker, said
        finally:
            worker.close()

    def compare(
        self, ours: Side, peers: Sequence[Side], measures: dict[str, tuple[str, Measure]], **notes: Any
    ) -> None:
        """Interleaved rounds of ours and all peers that load; one row per peer and measure.

        Args:
            ours: our side.
            peers: the others; one that does not load gets a row that says why.
            measures: what is measured -> its unit and the measurement of one round, larger is better.
            notes: kept in every row.
        """
        workers, reasons = {}, {}
        with ExitStack() as stack:
            for side in (ours, *peers):
                try:
                    workers[side.name], _ = stack.enter_context(self.open(side))
                except WorkerError as error:
                    reasons[side.name] = state(error), str(error)
                    if side is ours:
                        break
            for what, (unit, measure) in measures.items():
                found = self._rounds(workers, measure, reasons) if ours.name in workers else {}
                notes |= self.usage(workers.values())
                for peer in peers:
                    if ours.name in found and peer.name in found:
                        self.add(
                            row(
                                what, (ours.name, found[ours.name]), (peer.name, found[peer.name]),
                                unit=unit, bar=peer.bar, target=peer.target, **notes,
                            )
                        )  # fmt: skip
                    else:
                        why = reasons.get(ours.name) or reasons[peer.name]
                        self.add(missing(what, ours.name, peer.name, *why, bar=peer.bar))

    def usage(self, workers: Collection[Worker]) -> dict[str, Any]:
        """Notes for a row: peak memory, and shares of a core that engines take while none of them works.

        What an engine takes while it waits is taken from whoever has the turn.
        """
        before = {worker.name: worker.ask("usage") for worker in workers}
        time.sleep(IDLE_S)
        after = {worker.name: worker.ask("usage") for worker in workers}
        shares = {name: (found["cpu_s"] - before[name]["cpu_s"]) / IDLE_S for name, found in after.items()}
        for name, share in shares.items():
            if share > BUSY:
                talk(f"{name} takes {share:.0%} of a core while it waits: the others' figures are too low")
        return {
            "idle_cpu_share": {name: round(share, 3) for name, share in shares.items()},
            "peak_rss_mb": {name: round(found["peak_rss_bytes"] / 1e6) for name, found in after.items()},
        }

    def _rounds(
        self, workers: dict[str, Worker], measure: Measure, reasons: dict[str, tuple[str, str]]
    ) -> dict[str, list[float]]:
        """Rounds over the workers; one that fails is left out and the others begin again."""
        while workers:
            sides = {name: partial(measure, worker) for name, worker in workers.items()}
            try:
                return interleave(sides, self.pairs)
            except WorkerError as error:
                reasons[error.worker] = state(error), str(error)
                del workers[error.worker]
        return {}


def ours(bench: Bench, form: str, **options: Any) -> Side:
    """Our engine with one form of the weights."""
    return Side(
        f"sateen {form}", "sateen", {"model": str(bench.files.folder), "weights": FORMS[form], **options}
    )


def state(error: WorkerError) -> str:
    """What a row says of an engine that did not do its part."""
    return {"Missing": "not measured", "BackendUnavailable": "not built"}.get(error.kind, "failed")


def talk(text: str) -> None:
    """A line for the person who waits."""
    print(text, file=sys.stderr, flush=True)
