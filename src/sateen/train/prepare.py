"""What the text stages of a run read: its tokenizer and token files, made once in the run folder.

Everything is written under a temporary name and renamed, so an interrupted preparation starts again where it
stopped. `train.text` calls `prepare`; the loader mixes what it returns.
"""

from __future__ import annotations

import inspect
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sateen.config import (
    ChatTaskSource,
    PythonDocsSource,
    RunConfig,
    SpeechSource,
    StageContext,
    TaskSource,
    TextDirSource,
)
from sateen.config import Source as SourceConfig
from sateen.data.chat import encode_chat
from sateen.data.facts import LongExample, LongTask
from sateen.data.loader import Source
from sateen.data.long_context import long_task
from sateen.data.tasks import Example, Task, task_class
from sateen.data.text import Document, python_docs, split_heldout, text_dir
from sateen.data.token_file import TokenDocument, TokenFile, write_texts, write_tokens
from sateen.data.tokenizer import CHATML_TOKENS, Tokenizer, check_vocab
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.mimo_audio_lm import TOKEN_STRINGS
from sateen.models.registry import preset
from sateen.train.speech_data import clips_of


@dataclass(frozen=True)
class RunData:
    """What a stage reads.

    Attributes:
        tokenizer: the run's tokenizer.
        folder: where its files are.
        sources: the stage's mixture.
        heldout: text that is never trained on, one token file per text source of the stage; may be empty.
    """

    tokenizer: Tokenizer
    folder: Path
    sources: tuple[Source, ...]
    heldout: tuple[TokenFile, ...]


def prepare(context: StageContext) -> RunData:
    """The stage's data, written on the first call and opened on later ones.

    Raises:
        ConfigError: a source has nothing to read or settings it does not accept.
    """
    config, folder = context.config, context.folder
    tokenizer = run_tokenizer(context)
    sources, heldout = [], []
    for name, weight in config.source_weights(context.stage).items():
        if weight == 0:
            continue
        source = config.data[name]
        train, kept_back = folder / "data" / name, folder / "data" / f"{name}-heldout"
        if not _is_ready(train, tokenizer):
            context.progress.note(f"preparing data source {name}")
            if isinstance(source, TaskSource):
                encode = _encoder(source)
                texts = run_texts(config) if wants_haystack(source) else []
                documents = (encode(tokenizer, e) for e in _examples(source, tokenizer, config.seed, texts))
                write_tokens(
                    train, documents, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.fingerprint
                )
            else:
                training, held = _split(source)
                if held:
                    write_texts(kept_back, held, tokenizer)
                # Last, because its presence says that the source is ready.
                write_texts(train, training, tokenizer)
        sources.append(Source(TokenFile(train), weight, is_whole=isinstance(source, TaskSource)))
        if kept_back.is_dir():
            heldout.append(TokenFile(kept_back))
    return RunData(tokenizer, folder / "tokenizer", tuple(sources), tuple(heldout))


def new_model(context: StageContext, tokenizer: Tokenizer) -> Decoder:
    """The run's model with fresh weights from the run's seed, in float32.

    Raises:
        ConfigError: the tokenizer has more tokens than the model has rows.
    """
    source = context.config.model
    if source.preset is not None:
        raw, origin = preset(source.preset), f"preset {source.preset}"
    else:
        assert source.config is not None
        raw, origin = json.loads(source.config.read_text(encoding="utf-8")), str(source.config)
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    model_config = ModelConfig.from_hf({**raw, **ends, **source.overrides}, origin=origin)
    check_vocab(tokenizer, model_config.vocab_size)
    return Decoder.build(model_config).to(context.config.device).init_weights(context.config.seed)


def run_tokenizer(context: StageContext) -> Tokenizer:
    """The run's tokenizer: the one in its folder, else one that the recipe names or that is trained now."""
    settings, folder = context.config.tokenizer, context.folder / "tokenizer"
    if folder.is_dir():
        return Tokenizer.load(folder)
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path if settings.path.is_dir() else settings.path.parent)
    else:
        assert settings.vocab_size is not None
        context.progress.note(f"training a tokenizer of {settings.vocab_size} tokens")
        # All text of the run, not of this stage: later stages read through the same tokenizer.
        sources = [s for s in context.config.data.values() if not isinstance(s, TaskSource)]
        if not sources:
            raise ConfigError(
                "a tokenizer is trained on text and this run has task sources only; give its path"
            )
        texts = (document.text for source in sources for document in _split(source)[0])
        listens = any(isinstance(source, SpeechSource) for source in sources)
        special_tokens = (*CHATML_TOKENS, *(TOKEN_STRINGS if listens else ()))
        tokenizer = Tokenizer.train(texts, settings.vocab_size, special_tokens)
    fresh = folder.with_name(f".{folder.name}.writing")
    tokenizer.save(fresh)
    fresh.rename(folder)
    return Tokenizer.load(folder)


def _is_ready(folder: Path, tokenizer: Tokenizer) -> bool:
    return folder.is_dir() and TokenFile(folder).tokenizer_sha256 == tokenizer.fingerprint


def _split(source: SourceConfig) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents of a text source."""
    if isinstance(source, PythonDocsSource):
        return split_heldout(python_docs(source.path), source.heldout_share)
    if isinstance(source, SpeechSource):
        train, heldout = clips_of(source)
        return [clip.document for clip in train], [clip.document for clip in heldout]
    assert isinstance(source, TextDirSource), f"no reader for data kind {source.kind}"
    documents = text_dir(source.path, suffixes=source.suffixes, field=source.field)
    return split_heldout(documents, source.heldout_share)


def run_texts(config: RunConfig) -> list[str]:
    """The training documents of the run's text sources: the other text of tasks over long contexts."""
    sources = [s for s in config.data.values() if not isinstance(s, TaskSource)]
    return [document.text for source in sources for document in _split(source)[0]]


def wants_haystack(source: TaskSource) -> bool:
    """Whether the task's questions stand in other text."""
    return issubclass(task_class(source.task), LongTask)


def build_task(source: TaskSource, tokenizer: Tokenizer, haystack: Sequence[str] = ()) -> Task:
    """The task of a source; one that measures lengths gets this tokenizer.

    Args:
        source: which task, with its parameters.
        tokenizer: of the run.
        haystack: documents around the questions of a task over long contexts.

    Raises:
        ConfigError: the task is unknown or does not take the source's parameters.
    """
    cls = task_class(source.task)
    parameters = dict(source.parameters)
    if "count_tokens" in inspect.signature(cls).parameters:
        parameters["count_tokens"] = lambda text: len(tokenizer.encode(text))
    try:
        if issubclass(cls, LongTask):
            return long_task(cls, tokenizer, haystack, **parameters)
        return cls(**parameters)
    except TypeError as error:
        raise ConfigError(
            f"data.*.parameters of task {source.task!r}: {error}; see the task's arguments"
        ) from None


def _examples(
    source: TaskSource, tokenizer: Tokenizer, seed: int, haystack: Sequence[str]
) -> Iterator[Example]:
    """The examples a task source trains on."""
    task = build_task(source, tokenizer, haystack)
    rng = random.Random(f"{seed}/{source.task}/{source.kind}/{sorted(source.parameters.items())}")
    return (task.sample(rng) for _ in range(source.num_examples))


def _as_chat(tokenizer: Tokenizer, example: Example) -> TokenDocument:
    user, assistant = (
        {"role": "user", "content": example.prompt},
        {"role": "assistant", "content": example.completion},
    )
    return encode_chat(tokenizer, [user, assistant])


def _encoder(source: TaskSource) -> Callable[[Tokenizer, Example], TokenDocument]:
    if isinstance(source, ChatTaskSource):
        return _as_chat
    return _as_text if source.loss == "all" else _as_answers


def _as_answers(tokenizer: Tokenizer, example: Example) -> TokenDocument:
    """The same text, of which the answers alone are trained: the completion where nothing marks them."""
    pieces = ((example.prompt, False), (example.completion, True))
    ids, is_target = [tokenizer.eos_id], [False]
    for text, is_answer in example.pieces if isinstance(example, LongExample) else pieces:
        tokens = tokenizer.encode(text)
        ids += tokens
        is_target += [is_answer] * len(tokens)
    return TokenDocument([*ids, tokenizer.eos_id], [*is_target, False])


def _as_text(tokenizer: Tokenizer, example: Example) -> TokenDocument:
    text = tokenizer.encode(example.prompt + example.completion)
    return TokenDocument([tokenizer.eos_id, *text, tokenizer.eos_id])
