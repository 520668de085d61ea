"""Questions about facts in a long text: the base of the tasks in `long_context.py`.

A fact is a line `> key value`, a question the line `? key`, to be continued with the value. Around the facts
stands other text. Training documents may ask many questions and mark which words answer them; an evaluation
asks one. The wording is ours: words of one token each, so that a small model can learn it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from sateen.data.tasks import Example, Task, is_held_out
from sateen.errors import ConfigError

_TRIES = 50

Facts = Sequence[tuple[str, float]]
"""Lines of facts, each with its depth: the share of the other text that stands before it."""


class _NoPairError(ConfigError):
    """No word on this side of the held-out split goes with a key; other keys may have one."""


@dataclass(frozen=True)
class LongExample(Example):
    """A question over a long text.

    Attributes:
        pieces: prompt and completion cut where answers begin and end, each with whether it is an answer.
        length: tokens or characters of prompt and completion.
        depth: share of the other text before the fact that the first question asks for.
    """

    pieces: tuple[tuple[str, bool], ...]
    length: int
    depth: float


class LongTask(Task):
    """The base of the four tasks.

    Attributes:
        words: keys and values.
        length: of prompt and completion at most, in `unit`s.
        chance: of answering with random words of the list.
    """

    is_chat = False
    max_tokens = 16

    def __init__(
        self,
        *,
        count_tokens: Callable[[str], int],
        words: Sequence[str],
        num_words: int | None = None,
        haystack: Sequence[str] = (),
        length: int = 1024,
        unit: Literal["tokens", "characters"] = "tokens",
        num_queries: int = 1,
        depth: float | None = None,
        is_heldout: bool = False,
        heldout_share: float = 0.2,
    ):
        """A generator of questions.

        Args:
            count_tokens: length of a text in tokens.
            words: what keys and values are drawn from, without repeats.
            num_words: of which the last so many are used; the fewer, the sooner a small model learns to look
                one up, and the last tokens of a vocabulary are its rarest. All when None.
            haystack: documents that the other text is taken from; made-up words when empty.
            length: of prompt and completion together.
            unit: what `length` counts.
            num_queries: questions per document; the prompt ends in the first, the completion has the others.
            depth: where the asked fact stands, 0 the beginning and 1 the end; anywhere when None.
            is_heldout: draw from the pairs of key and value that training never sees, instead of the others.
            heldout_share: share of the pairs that are held out.

        Raises:
            ConfigError: a number is out of its range or there are too few words.
        """
        if length < 1 or num_queries < 1 or not 0 <= heldout_share < 1 or (is_heldout and not heldout_share):
            raise ConfigError(
                f"{self.name}: length {length} and num_queries {num_queries} must be at least 1, "
                f"heldout_share {heldout_share} below 1 and above 0 to draw held-out pairs"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise ConfigError(f"{self.name}: depth {depth} must be from 0, the beginning, to 1, the end")
        if unit not in ("tokens", "characters"):
            raise ConfigError(f"{self.name}: unit {unit!r} must be 'tokens' or 'characters'")
        if len(set(words)) < max(8, num_words or 0) or len(set(words)) != len(words):
            raise ConfigError(
                f"{self.name}: {len(set(words))} different words in a list of {len(words)} are too few or "
                "repeat; a larger vocabulary has more words of one token"
            )
        if num_words is not None and num_words < 8:
            raise ConfigError(f"{self.name}: num_words {num_words} must be at least 8")
        self.words = list(words) if num_words is None else list(words)[-num_words:]
        self.length, self.num_queries, self.depth = length, num_queries, depth
        self.is_heldout, self.heldout_share = is_heldout, heldout_share
        self._count = count_tokens if unit == "tokens" else len
        self._haystack = [word for text in haystack for word in text.split()]
        self._costs: dict[str, int] = {}
        self.chance = 1 / len(self.words)

    @property
    def num_names(self) -> int:
        """Words that may not stand in the other text."""
        raise NotImplementedError

    def sample(self, rng: random.Random) -> LongExample:
        for left in reversed(range(_TRIES)):
            filler = self._filler(rng)
            words = self._unused(filler)
            if left and len(words) < self.num_names:
                continue  # another stretch of the text leaves enough words
            try:
                facts, questions, depth = self.draw(rng, words)
                break
            except _NoPairError:
                if not left:
                    raise
        return self._fitted(filler, facts, questions, depth)

    def draw(self, rng: random.Random, words: list[str]) -> tuple[Facts, list[tuple[str, str]], float]:
        """Facts, `(question, answer)` pairs and the depth of the first one's fact.

        Args:
            rng: decides everything.
            words: those that the other text does not contain, so that no key has two meanings.
        """
        raise NotImplementedError

    def check(self, output_text: str, example: Example) -> bool:
        """Whether the first line of the completion begins with the words of the answer."""
        wanted = example.answer.split()
        return output_text.split("\n")[0].split()[: len(wanted)] == wanted

    def value_of(self, rng: random.Random, key: str, words: Sequence[str]) -> str:
        """A value that may go with the key on this side of the held-out split.

        Raises:
            ConfigError: there is none among so few words.
        """
        for _ in range(_TRIES * len(words)):
            value = rng.choice(words)
            if value != key and is_held_out(f"{key} {value}", self.heldout_share) == self.is_heldout:
                return value
        raise _NoPairError(
            f"{self.name}: none of {len(words)} words may be the value of {key!r}, as the hash of both "
            "decides which pairs are held out; use more words"
        )

    def depths(self, rng: random.Random, count: int) -> list[float]:
        """Places of facts; the first is the asked one's."""
        return [rng.random() if self.depth is None or i else self.depth for i in range(count)]

    def keys(self, rng: random.Random, words: list[str], count: int) -> list[str]:
        """Different keys.

        Raises:
            ConfigError: the other text leaves too few words.
        """
        if count > len(words):
            raise ConfigError(
                f"{self.name}: {count} keys, but only {len(words)} of {len(self.words)} words are not in the "
                "text between; ask for fewer keys, a shorter length or a larger vocabulary"
            )
        return rng.sample(words, count)

    def _filler(self, rng: random.Random) -> list[str]:
        """Words whose text alone would be as long as the example may be."""
        words: list[str] = []
        size, cursor = 0, rng.randrange(len(self._haystack)) if self._haystack else 0
        while size < self.length:
            if self._haystack:
                word = self._haystack[cursor % len(self._haystack)]
                cursor += 1
            else:
                word = "".join(rng.choice("BDFGKLMNPRST") + rng.choice("aeiou") for _ in range(2))
            words.append(word)
            if word not in self._costs:
                self._costs[word] = max(1, self._count(f" {word}"))
            size += self._costs[word]
        return words

    def _unused(self, filler: list[str]) -> list[str]:
        text = " " + " ".join(filler)
        return [word for word in self.words if f" {word}" not in text]

    def _fitted(
        self, filler: list[str], facts: Facts, questions: list[tuple[str, str]], depth: float
    ) -> LongExample:
        """The example with as much of the other text as fits.

        Raises:
            ConfigError: facts and questions alone are longer than allowed.
        """
        (first, answer), *others = questions
        asked = [(first, False), (f" {answer}", True)]
        for question, other in others:
            asked += [(f"\n{question}", False), (f" {other}", True)]
        ending = "".join(text for text, _ in asked)
        room = self.length - self._count("\n".join(["", *(fact for fact, _ in facts), ending]))
        kept = 0
        while kept < len(filler) and (room := room - self._costs[filler[kept]]) >= 0:
            kept += 1
        while True:
            context = "\n".join(_lines(filler[:kept], facts))
            length = self._count(f"{context}\n{ending}")
            if length <= self.length:
                break
            if kept == 0:
                raise ConfigError(
                    f"{self.name}: facts and questions alone have length {length} and {self.length} is "
                    "allowed; raise length or ask for fewer"
                )
            kept -= 1  # a word that begins a line may cost a token more
        prompt = f"{context}\n{first}"
        pieces = ((prompt, False), *asked[1:])
        completion = "".join(text for text, _ in asked[1:])
        return LongExample(prompt, completion, answer, pieces, length, depth)


def _lines(words: list[str], facts: Facts) -> list[str]:
    """The words with the facts as lines between them."""
    lines, start = [], 0
    for fact, depth in sorted(facts, key=lambda pair: pair[1]):
        stop = int(depth * len(words))
        lines += [" ".join(words[start:stop]), fact]
        start = stop
    return [line for line in [*lines, " ".join(words[start:])] if line]
