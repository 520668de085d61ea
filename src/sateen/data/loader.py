"""Endless packed batches from weighted token files, resumable to the token.

Every document is cut into pieces of at most `seq_len` tokens; each epoch of a source visits its pieces in a
new seeded order, divided among the ranks. A piece is one sequence of a `PackedBatch`, so nothing attends or
predicts across documents. The next piece comes from the source furthest behind its weight, without chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sateen.data.packing import IGNORE, PackedBatch
from sateen.data.token_file import TokenFile
from sateen.errors import CheckpointError, ConfigError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """One token file in a mixture.

    Attributes:
        tokens: the opened file.
        weight: share of the batch's tokens, relative to the other sources.
        is_whole: never cut a document, for chats and tasks whose answer needs its prompt; what is left of a
            batch is then filled from sources that may be cut, or padded with tokens that train nothing.
    """

    tokens: TokenFile
    weight: float = 1.0
    is_whole: bool = False


class _Stream:
    """The pieces of one source in the order of its epochs, for one rank."""

    def __init__(self, source: Source, seq_len: int, seed: Sequence[int], rank: int, world_size: int):
        self.source = source
        self.seed = list(seed)
        self.rank, self.world_size = rank, world_size
        self.starts, self.ends, self.document_ends = _cut(source, seq_len)
        if self.starts.size < world_size:
            raise ConfigError(
                f"{source.tokens.path} has {self.starts.size} pieces of {seq_len} tokens, fewer than the "
                f"{world_size} ranks; give more text or use fewer ranks"
            )
        self.epoch = self.index = self.cursor = self.used = 0
        self._order = self._shuffled()

    def _shuffled(self) -> Ints:
        # Raw generator output is stable across numpy versions, which `permutation` does not promise.
        raw = np.random.PCG64(np.random.SeedSequence([*self.seed, self.epoch])).random_raw(self.starts.size)
        order: Ints = np.argsort(np.asarray(raw), kind="stable").astype(np.int64)
        return order[self.rank :: self.world_size]

    @property
    def available(self) -> int:
        """Tokens left in the current piece."""
        piece = self._order[self.index]
        return int(self.ends[piece] - self.starts[piece]) - self.cursor

    def take(self, count: int) -> tuple[int, int, int]:
        """Start, end and document end of the next `count` tokens, which stay inside one piece."""
        piece = self._order[self.index]
        start = int(self.starts[piece]) + self.cursor
        document_end = int(self.document_ends[piece])
        self.used += count
        self.cursor += count
        if start + count == self.ends[piece]:
            self.cursor = 0
            self.index += 1
            if self.index == self._order.size:
                self.index = 0
                self.epoch += 1
                self._order = self._shuffled()
        return start, start + count, document_end

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index, "cursor": self.cursor, "used": self.used}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        self.cursor, self.used = state["cursor"], state["used"]
        self._order = self._shuffled()


class Loader:
    """An endless iterator of `PackedBatch`es of exactly `tokens_per_batch` tokens.

    Each batch holds sequences of at most `seq_len` tokens. Over one epoch of a source, all ranks together use
    every token of it exactly once as an input.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        tokens_per_batch: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pad_id: int = 0,
    ):
        """Starts at the first batch.

        Args:
            sources: what to mix; all made with one tokenizer.
            tokens_per_batch: T of every batch, on this rank.
            seq_len: the longest sequence.
            seed: of the order of the pieces.
            rank: which share this process reads, below `world_size`.
            world_size: how many processes share the sources.
            pad_id: fills a batch whose next whole document does not fit; labels there are -100.

        Raises:
            ConfigError: no sources, unusable numbers, several tokenizers, a whole document above `seq_len`.
        """
        if not sources or any(source.weight <= 0 for source in sources):
            raise ConfigError("a loader needs at least one source, and weights above 0; drop the others")
        if not 1 <= seq_len <= tokens_per_batch:
            raise ConfigError(f"seq_len {seq_len} must be from 1 to tokens_per_batch {tokens_per_batch}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} must be from 0 to world_size {world_size} - 1")
        if len({source.tokens.tokenizer_sha256 for source in sources}) > 1:
            paths = ", ".join(str(source.tokens.path) for source in sources)
            raise ConfigError(f"token files of different tokenizers: {paths}; write them with one")
        self.tokens_per_batch = tokens_per_batch
        self.seq_len = seq_len
        self.pad_id = pad_id
        total = sum(source.weight for source in sources)
        self._shares = [source.weight / total for source in sources]
        self._streams = [
            _Stream(source, seq_len, [seed, i], rank, world_size) for i, source in enumerate(sources)
        ]
        self._identity = {
            "tokens_per_batch": tokens_per_batch,
            "seq_len": seq_len,
            "seed": seed,
            "rank": rank,
            "world_size": world_size,
            "sources": [
                [s.tokens.num_tokens, s.tokens.num_documents, s.tokens.tokenizer_sha256, s.weight, s.is_whole]
                for s in sources
            ],
        }

    @property
    def epochs(self) -> list[int]:
        """Finished passes over each source."""
        return [stream.epoch for stream in self._streams]

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        size = self.tokens_per_batch
        input_ids = np.full(size, self.pad_id, dtype=np.int64)
        labels = np.full(size, IGNORE, dtype=np.int64)
        offsets = [0]
        while (filled := offsets[-1]) < size:
            stream = self._choose(size - filled)
            if stream is None:
                offsets.extend(range(min(filled + self.seq_len, size), size, self.seq_len))
                offsets.append(size)
                break
            count = min(stream.available, size - filled)
            start, end, document_end = stream.take(count)
            tokens, targets = stream.source.tokens.tokens, stream.source.tokens.targets
            input_ids[filled : filled + count] = tokens[start:end]
            # The last token of a cut piece still predicts the document's next token.
            last = min(end + 1, document_end)
            following = labels[filled : filled + last - start - 1]
            following[:] = tokens[start + 1 : last]
            if targets is not None:
                following[targets[start + 1 : last] == 0] = IGNORE
            offsets.append(filled + count)
        cu_seqlens = np.asarray(offsets, dtype=np.int32)
        positions = np.arange(size) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        return PackedBatch(
            input_ids=torch.from_numpy(input_ids),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            labels=torch.from_numpy(labels),
        )

    def _choose(self, room: int) -> _Stream | None:
        """The stream furthest behind its share whose next piece may go into `room` tokens."""
        total = sum(stream.used for stream in self._streams)
        best, largest = None, -float("inf")
        for stream, share in zip(self._streams, self._shares, strict=True):
            behind = share * total - stream.used
            fits = not stream.source.is_whole or stream.available <= room
            if fits and behind > largest:
                best, largest = stream, behind
        return best

    def metrics(self) -> dict[str, float]:
        """Nothing: token files have no news beside their tokens."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, as plain numbers that JSON can hold."""
        return {"identity": self._identity, "streams": [stream.state_dict() for stream in self._streams]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state_dict` was taken.

        Raises:
            CheckpointError: the state is of a loader with other sources, sizes, seed or ranks.
        """
        for name, mine in self._identity.items():
            theirs = state["identity"].get(name)
            if theirs != mine:
                raise CheckpointError(
                    f"the loader's state has {name} {theirs}, this run has {mine}; resume with the same data"
                )
        for stream, saved in zip(self._streams, state["streams"], strict=True):
            stream.load_state_dict(saved)


def _cut(source: Source, seq_len: int) -> tuple[Ints, Ints, Ints]:
    """Start, end and document end of every piece of at most `seq_len` tokens."""
    offsets = np.asarray(source.tokens.offsets, dtype=np.int64)
    lengths = np.diff(offsets)
    if source.is_whole and lengths.max() > seq_len:
        longest = int(lengths.argmax())
        raise ConfigError(
            f"{source.tokens.path}: document {longest} has {int(lengths[longest])} tokens, may not be cut "
            f"and seq_len is {seq_len}; raise it or leave that document out"
        )
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(lengths.size), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[document] + within * seq_len
    document_ends = offsets[document + 1]
    return starts, np.minimum(starts + seq_len, document_ends), document_ends
