"""What a run reads: the model's shape, its tokenizer and its data sources.

A new kind of source is a class here and a row in `SOURCES`; the loader of the data room reads it.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sateen.config.base import Config, FilePath, Fraction, NonNegative, Positive, Rate, one_of, problem


class ModelSource(Config):
    """Where the model's shape comes from; `config.json` and the presets are the only dialect.

    Attributes:
        preset: name of a registered shape.
        config: path of a `config.json`.
        overrides: keys of `config.json` that replace those of the preset or file.
    """

    preset: str | None = None
    config: FilePath | None = None
    overrides: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_shape(self) -> ModelSource:
        if (self.preset is None) == (self.config is None):
            given = "neither preset nor" if self.preset is None else "both preset and"
            raise problem(f"has {given} config; give one of them")
        return self


class TokenizerConfig(Config):
    """The tokenizer: trained on the run's own data, or read from a file.

    Attributes:
        vocab_size: entries of a byte-level BPE trained at the start of the run.
        path: a `tokenizer.json`, or a directory that holds one.
    """

    vocab_size: Annotated[int, Field(ge=256)] | None = None
    path: FilePath | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if (self.vocab_size is None) == (self.path is None):
            given = "neither vocab_size nor" if self.path is None else "both vocab_size and"
            raise problem(f"has {given} path; give one of them")
        return self


class Source(Config):
    """What every data source has.

    Attributes:
        kind: which loader reads it.
        weight: share of the tokens relative to the other sources, where a stage does not say otherwise.
    """

    choice: ClassVar[str | None] = "kind"
    kind: str
    weight: NonNegative = 1.0


class PythonDocsSource(Source):
    """The help topics, docstrings and comments of a Python's standard library.

    Attributes:
        path: folder of the library's sources; those of the Python that runs when not given.
        heldout_share: share of the documents kept for evaluation (source: ours).
    """

    kind: Literal["python_docs"] = "python_docs"
    path: FilePath | None = None
    heldout_share: Fraction = 0.05


class TextDirSource(Source):
    """Text files under a directory: one document per file, or per line of a `.jsonl` file.

    Attributes:
        path: the directory, or a single file.
        suffixes: which files of the directory are read.
        field: the key of a `.jsonl` line's text.
        heldout_share: share of the documents kept for evaluation (source: ours).
    """

    kind: Literal["text_dir"] = "text_dir"
    path: FilePath
    suffixes: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = (".txt", ".md", ".py", ".jsonl")
    field: str = "text"
    heldout_share: Fraction = 0.05


class TaskSource(Source):
    """Generated examples of a verifiable task, as plain text.

    Attributes:
        task: name of the task.
        parameters: what that task's generator accepts.
        num_examples: examples to generate.
        loss: on every token, or on those that answer; a `chat_task` always trains the assistant's.
    """

    kind: Literal["task"] = "task"
    task: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    num_examples: Positive = 10_000
    loss: Literal["all", "answers"] = "all"


class ChatTaskSource(TaskSource):
    """The same examples as conversations, with the loss on the assistant's tokens only."""

    kind: Literal["chat_task"] = "chat_task"  # type: ignore[assignment]


class SpeechSource(Source):
    """Recorded speech with transcripts; text stages read the transcripts.

    Attributes:
        path: a corpus as `sateen data speech` makes it.
        languages: which languages are used; all when empty.
        max_seconds: longer clips are left out.
        heldout_share: share of the prompts kept for evaluation, in every language (source: ours).
    """

    kind: Literal["speech"] = "speech"
    path: FilePath
    languages: Annotated[tuple[str, ...], Field(strict=False)] = ()
    max_seconds: Rate = 30.0
    heldout_share: Fraction = 0.1


SOURCES: dict[str, type[Source]] = {
    "chat_task": ChatTaskSource,
    "python_docs": PythonDocsSource,
    "speech": SpeechSource,
    "task": TaskSource,
    "text_dir": TextDirSource,
}
AnySource = Annotated[Source, one_of("data kind", lambda: SOURCES)]
