"""Questions over long contexts, after RULER (arXiv 2404.06654): needle, many keys, variables, common words.

The form of facts and questions, and how text goes around them, is in `facts.py`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from sateen.data.facts import Facts, LongExample, LongTask
from sateen.data.tasks import Example, is_held_out
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError


def single_token_words(tokenizer: Tokenizer) -> list[str]:
    """The lower-case words that are one token behind a space, by id: what keys and values are drawn from."""
    texts = (tokenizer.token_text(token) for token in range(tokenizer.vocab_size))
    return [text[1:].decode() for text in texts if re.fullmatch(rb" [a-z]{2,}", text)]


def long_task(
    cls: type[LongTask], tokenizer: Tokenizer, haystack: Sequence[str], **settings: Any
) -> LongTask:
    """A task in this tokenizer's tokens and words.

    Args:
        cls: which task.
        tokenizer: of the model that reads it.
        haystack: documents that the other text is taken from.
        settings: the other arguments of the class.
    """
    return cls(
        count_tokens=lambda text: len(tokenizer.encode(text)),
        words=single_token_words(tokenizer),
        haystack=haystack,
        **settings,
    )


class Needle(LongTask, name="needle"):
    """One key and its value in other text: `> moon river` ... `? moon` -> ` river`."""

    def __init__(self, *, num_keys: int = 1, key_words: Literal[1, 2] = 1, **settings: Any):
        """A generator of needles.

        Args:
            num_keys: facts in the text.
            key_words: words of a key. Keys of two are pairs of a few first and a few second words, so that
                many facts share a word with the asked one.
            settings: those of `LongTask`; more questions than keys ask for some again, from which a model
                learns faster.
        """
        super().__init__(**settings)
        if not 1 <= num_keys <= len(self.words):
            raise ConfigError(
                f"{self.name}: num_keys {num_keys} must be from 1 to the {len(self.words)} words there are"
            )
        if key_words not in (1, 2):
            raise ConfigError(f"{self.name}: key_words {key_words} must be 1 or 2")
        self.num_keys, self.key_words = num_keys, key_words
        self._side = math.isqrt(num_keys - 1) + 1  # of the square of first and second words

    @property
    def num_names(self) -> int:
        return self.num_keys if self.key_words == 1 else 2 * self._side

    def draw(self, rng: random.Random, words: list[str]) -> tuple[Facts, list[tuple[str, str]], float]:
        keys = self.keys(rng, words, self.num_names)
        if self.key_words == 2:
            pairs = [f"{a} {b}" for a in keys[: self._side] for b in keys[self._side :]]
            keys = rng.sample(pairs, self.num_keys)
        values = {key: self.value_of(rng, key, words) for key in keys}
        depths = self.depths(rng, len(keys))
        facts = [(f"> {key} {values[key]}", depth) for key, depth in zip(keys, depths, strict=True)]
        asked = list(keys)
        while len(asked) < self.num_queries:
            asked += rng.sample(keys, len(keys))
        return facts, [(f"? {key}", values[key]) for key in asked[: self.num_queries]], depths[0]


class MultiKey(Needle, name="multikey"):
    """The same among many other facts of the same form."""

    def __init__(self, *, num_keys: int = 64, **settings: Any):
        super().__init__(num_keys=num_keys, **settings)


class VariableTracking(LongTask, name="vt"):
    """Chains of names, to be followed to their value: `> a moon` ... `> b a` ... `? b` -> ` a moon`."""

    def __init__(
        self,
        *,
        num_hops: int = 2,
        num_chains: int = 4,
        answer: Literal["chain", "value"] = "chain",
        ask: Literal["last", "any"] = "last",
        **settings: Any,
    ):
        """A generator of chains.

        Args:
            num_hops: names of a chain.
            num_chains: chains in the text.
            answer: `chain`, every name on the way and the value, or `value` alone, for which a model has to
                look up as often as there are names on the way before it says anything.
            ask: for the `last` name of a chain, or for `any` name; no name is asked for twice.
            settings: those of `LongTask`; `depth` is that of the last name of the first chain.
        """
        super().__init__(**settings)
        asked = num_chains * (num_hops if ask == "any" else 1)
        if num_hops < 1 or asked < self.num_queries:
            raise ConfigError(
                f"vt: num_hops {num_hops} must be at least 1 and the {asked} names of {num_chains} chains "
                f"that may be asked for at least num_queries {self.num_queries}"
            )
        if answer not in ("chain", "value") or ask not in ("last", "any"):
            raise ConfigError(
                f"vt: answer {answer!r} must be 'chain' or 'value', ask {ask!r} 'last' or 'any'"
            )
        self.num_hops, self.num_chains, self.answer, self.ask = num_hops, num_chains, answer, ask
        self.chance = len(self.words) ** -float(num_hops if answer == "chain" else 1)

    @property
    def num_names(self) -> int:
        return self.num_chains * (self.num_hops + 1)

    def draw(self, rng: random.Random, words: list[str]) -> tuple[Facts, list[tuple[str, str]], float]:
        keys = self.keys(rng, words, self.num_names)
        facts, asked = [], []  # asked: question, answer, depth of the name
        for i in range(self.num_chains):
            chain = keys[i * (self.num_hops + 1) : (i + 1) * (self.num_hops + 1)]  # the value, then the names
            if is_held_out(f"{chain[1]} {chain[0]}", self.heldout_share) != self.is_heldout:
                chain[0] = self.value_of(rng, chain[1], [w for w in self.words if w not in keys])
            depths = sorted(rng.random() for _ in range(self.num_hops))  # a name is told after what it means
            if i == 0:
                depths[-1] = max(depths[-1] if self.depth is None else self.depth, depths[-1])
            for j in range(1, self.num_hops + 1):
                facts.append((f"> {chain[j]} {chain[j - 1]}", depths[j - 1]))
                if self.ask == "any" or j == self.num_hops:
                    answer = chain[:1] if self.answer == "value" else chain[j - 1 :: -1]
                    asked.append((f"? {chain[j]}", " ".join(answer), depths[j - 1]))
        if self.ask == "any":
            rng.shuffle(asked)
        asked = asked[: self.num_queries]
        return facts, [(question, answer) for question, answer, _ in asked], asked[0][2]


class CommonWords(LongTask, name="cwe"):
    """A list of words, some of which come more often than the others: `> a b a c a` ... `?` -> ` a`."""

    def __init__(self, *, num_common: int = 3, repeats: int = 30, other_repeats: int = 3, **settings: Any):
        """A generator of lists; the answer names the common words in alphabetical order, any order counts.

        Args:
            num_common: common words.
            repeats: how often each of them comes.
            other_repeats: how often another word comes, at most.
            settings: those of `LongTask`; one question, no depth and no other text.
        """
        super().__init__(**settings)
        if self.num_queries != 1 or self.depth is not None:
            raise ConfigError("cwe: a list has one question and no depth; leave out num_queries and depth")
        if not (1 <= num_common <= len(self.words) // 2 and 0 <= other_repeats < repeats):
            raise ConfigError(
                f"cwe: num_common {num_common} must be 1 to half of {len(self.words)} words, repeats "
                f"{repeats} above other_repeats {other_repeats}"
            )
        self.num_common, self.repeats, self.other_repeats = num_common, repeats, other_repeats

    def sample(self, rng: random.Random) -> LongExample:
        while True:
            common = sorted(rng.sample(self.words, self.num_common))
            if is_held_out(" ".join(common), self.heldout_share) == self.is_heldout:
                break
        others = [word for word in self.words if word not in common] * self.other_repeats
        rng.shuffle(others)
        answer = " ".join(common)

        def text(count: int) -> str:
            return "> " + " ".join(listed[:count]) + f"\n? {answer}"

        listed = common * self.repeats
        room = self.length - self._count(text(len(listed)))
        if room < 0:
            raise ConfigError(
                f"cwe: {self.num_common} words {self.repeats} times have length {self.length - room} and "
                f"{self.length} is allowed; raise length or lower repeats"
            )
        while others and (cost := self._count(f" {others[-1]}")) <= room:
            listed.append(others.pop())
            room -= cost
        rng.shuffle(listed)
        whole = text(len(listed))
        prompt = whole[: -len(answer) - 1]
        return LongExample(
            prompt, f" {answer}", answer, ((prompt, False), (f" {answer}", True)), self._count(whole), 0.0
        )

    def check(self, output_text: str, example: Example) -> bool:
        """Whether the first words of the completion are the common ones, in any order."""
        wanted = example.answer.split()
        return sorted(output_text.split("\n")[0].split()[: len(wanted)]) == wanted
