"""Small tasks whose answers a program can check: sums with steps, sorting, reversing, recall over a distance.

Pre-training mixes their examples in, post-training rewards answers to them and evaluation counts them. A task
draws examples from the generator it is given, so a seed decides everything.
"""

from __future__ import annotations

import hashlib
import math
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from sateen.errors import ConfigError, unknown_name


@dataclass(frozen=True)
class Example:
    """One question.

    Attributes:
        prompt: what the model is given.
        completion: what it should write: the steps, if the task has any, and the answer.
        answer: what a checker looks for.
    """

    prompt: str
    completion: str
    answer: str


class Task:
    """The base of every task; subclasses register under a name.

    Attributes:
        chance: accuracy of answering at random.
        is_chat: asked as a user's turn; otherwise as bare text.
        max_tokens: longest answer that is read.
    """

    registry: ClassVar[dict[str, type[Task]]] = {}
    name: ClassVar[str]
    is_chat: ClassVar[bool] = True
    max_tokens: ClassVar[int] = 48
    chance: float

    def __init_subclass__(cls, name: str | None = None, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            Task.registry[name] = cls

    def sample(self, rng: random.Random) -> Example:
        """The next example."""
        raise NotImplementedError

    def check(self, output_text: str, example: Example) -> bool:
        """Whether a completion, without its special tokens, gives the answer."""
        raise NotImplementedError


def task_class(name: str) -> type[Task]:
    """The task registered under a name.

    Raises:
        ConfigError: no such task; the message lists the known ones.
    """
    if name not in Task.registry:
        raise ConfigError(unknown_name("task", name, Task.registry))
    return Task.registry[name]


def is_held_out(key: str, share: float) -> bool:
    """Whether a question belongs to the `share` that training never sees; its hash decides, no list does."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _HeldOut(Task):
    """A task on digits, a share of whose questions training never sees.

    Attributes:
        questions: what is held out, for messages.
        least_digits: fewest digits that make a question.
        is_heldout: examples come from the held-out questions, instead of the others.
        num_digits: digits of a question's numbers.
        heldout_share: share of the questions that are held out.
    """

    questions: ClassVar[str]
    least_digits: ClassVar[int]

    def __init__(self, is_heldout: bool, num_digits: int, heldout_share: float):
        least = self.least_digits
        if num_digits < least or not 0 <= heldout_share < 1 or (is_heldout and heldout_share == 0):
            raise ConfigError(
                f"{self.name}: num_digits {num_digits} must be at least {least}, heldout_share "
                f"{heldout_share} below 1 and above 0 to draw held-out {self.questions}"
            )
        self.is_heldout = is_heldout
        self.num_digits = num_digits
        self.heldout_share = heldout_share


class Sums(_HeldOut, name="sums"):
    """Sums of two numbers, written column by column from the right: `47+85=` -> `7+5=12,4+8+1=13,132`.

    A column is written as its digits and the carry, so no token needs more than three earlier ones. The sums
    of all columns but the last have two digits, the carry first. A fifth of the operand pairs is held out.
    """

    chance = 0.0
    questions, least_digits = "pairs", 1

    def __init__(self, *, is_heldout: bool = False, num_digits: int = 2, heldout_share: float = 0.2):
        """A generator of sums.

        Args:
            is_heldout: draw from the pairs that training never sees, instead of the others.
            num_digits: digits of both operands.
            heldout_share: share of the pairs that are held out; a pair's order does not matter.
        """
        super().__init__(is_heldout, num_digits, heldout_share)

    def holds_out(self, a: int, b: int) -> bool:
        """Whether training never sees this pair of operands, in either order."""
        return is_held_out(f"{min(a, b)}+{max(a, b)}", self.heldout_share)

    def sample(self, rng: random.Random) -> Example:
        low, high = 10 ** (self.num_digits - 1), 10**self.num_digits
        while True:
            a, b = rng.randrange(low, high), rng.randrange(low, high)
            if self.holds_out(a, b) == self.is_heldout:
                return self.example(a, b)

    def example(self, a: int, b: int) -> Example:
        """The question and worked answer for these operands, of `num_digits` digits each."""
        steps = []
        carry = ""
        columns = list(zip(reversed(str(a)), reversed(str(b)), strict=True))
        for i, (x, y) in enumerate(columns):
            terms = [x, y] + ([carry] if i else [])
            column = sum(map(int, terms))
            written = f"{column:02d}" if i + 1 < len(columns) else str(column)
            steps.append(f"{'+'.join(terms)}={written}")
            carry = written[0]
        answer = str(a + b)
        return Example(f"{a}+{b}=", ",".join([*steps, answer]), answer)

    def check(self, output_text: str, example: Example) -> bool:
        """Whether the last of the comma-separated steps is the sum; the steps themselves are not judged."""
        return output_text.strip().split(",")[-1].strip() == example.answer


class _Digits(_HeldOut):
    """The task's name and a row of digits, `NAME 40317=`; the answer is those digits in another order.

    Attributes:
        chance: of writing the row's digits in a random order.
    """

    questions, least_digits = "rows", 2

    def __init__(self, *, is_heldout: bool = False, num_digits: int = 8, heldout_share: float = 0.2):
        super().__init__(is_heldout, num_digits, heldout_share)
        # A row's digits in a random order are any given order of it as often as a random row is ascending.
        self.chance = math.comb(num_digits + 9, 9) / 10**num_digits

    def arranged(self, digits: str) -> str:
        """The answer for these digits."""
        raise NotImplementedError

    def holds_out(self, digits: str) -> bool:
        """Whether training never sees this row."""
        return is_held_out(f"{self.name} {self.arranged(digits)}", self.heldout_share)

    def sample(self, rng: random.Random) -> Example:
        while True:
            digits = "".join(rng.choice(string.digits) for _ in range(self.num_digits))
            if self.holds_out(digits) == self.is_heldout:
                return self.example(digits)

    def example(self, digits: str) -> Example:
        """The question for these digits."""
        answer = self.arranged(digits)
        return Example(f"{self.name} {digits}=", answer, answer)

    def check(self, output_text: str, example: Example) -> bool:
        """Whether the whole completion is the answer."""
        return output_text.strip() == example.answer


class Sort(_Digits, name="sort"):
    """Digits in ascending order: `sort 40317=` -> `01347`.

    The hash is that of the answer, so that of a held-out row no other order is trained on either.
    """

    def arranged(self, digits: str) -> str:
        return "".join(sorted(digits))


class Reverse(_Digits, name="reverse"):
    """Digits from the last to the first: `reverse 40317=` -> `71304`."""

    def arranged(self, digits: str) -> str:
        return digits[::-1]


class Recall(Task, name="recall"):
    """A list of keys with their values, then other text, then one of the keys: the answer is its value.

    A key is a digit and its value the small letter behind it, as in `7q`: both are tokens of their own in a
    vocabulary that splits digits, no other digit appears, and the value directly follows the key, so that one
    step of looking back finds it.

    Attributes:
        chance: of a guess among all values, which knows nothing of the prompt.
        chance_among_listed: of a guess among the values in the prompt.
    """

    def __init__(
        self,
        *,
        count_tokens: Callable[[str], int],
        distance: int,
        num_pairs: int = 4,
        num_values: int = 16,
        num_queries: int = 1,
        filler: Sequence[str] | None = None,
    ):
        """A generator of recall questions; a curriculum raises `distance` and `num_pairs`.

        Args:
            count_tokens: length of a text in tokens; the distance is measured with it.
            distance: least number of tokens between the list and the query.
            num_pairs: entries of the list, at most 10.
            num_values: how many different values there are, from 16 to 26.
            num_queries: keys that the completion answers, at most `num_pairs`. Training learns faster from
                several; the checker reads the first alone.
            filler: texts to take the words between from; made-up words when None.
        """
        if not (1 <= num_queries <= num_pairs <= 10 and 16 <= num_values <= 26 and distance >= 0):
            raise ConfigError(
                f"recall: num_pairs {num_pairs} must be 1 to 10, num_queries {num_queries} 1 to num_pairs, "
                f"num_values {num_values} 16 to 26 and distance {distance} at least 0"
            )
        self._count_tokens = count_tokens
        self.distance = distance
        self.num_pairs = num_pairs
        self.num_values = num_values
        self.num_queries = num_queries
        self._costs: dict[str, int] = {}
        words = (word for text in filler or () for word in text.split())
        self._words = [word for word in words if not any(map(str.isdigit, word))]
        if filler is not None and not self._words:
            raise ConfigError(
                "recall: filler has no words without digits; give text, or None for made-up words"
            )
        self.chance = 1 / num_values
        self.chance_among_listed = 1 / num_pairs

    def sample(self, rng: random.Random) -> Example:
        keys = rng.sample(string.digits, self.num_pairs)
        table = {key: rng.choice(string.ascii_lowercase[: self.num_values]) for key in keys}
        first, *others = rng.sample(keys, self.num_queries)
        listed = " ".join(f"{key}{value}" for key, value in table.items())
        prompt = f"{listed}\n{self._between(rng)}\n{first}"
        completion = " ".join([table[first], *(f"{key}{table[key]}" for key in others)])
        return Example(prompt, completion, table[first])

    def check(self, output_text: str, example: Example) -> bool:
        """Whether the first word of the completion is the value."""
        return output_text.split()[:1] == [example.answer]

    def _between(self, rng: random.Random) -> str:
        """Words of at least `distance` tokens: a run of the filler's, or made-up ones."""
        words: list[str] = []
        length = 0
        cursor = rng.randrange(len(self._words)) if self._words else 0
        while True:
            while length < self.distance:
                if self._words:
                    words.append(self._words[cursor % len(self._words)])
                    cursor += 1
                else:
                    words.append("".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(2)))
                length += self._cost(words[-1])
            # Words are counted one by one, which some tokenizers do not bear out; the whole text decides.
            length = self._count_tokens(" ".join(words))
            if length >= self.distance:
                return " ".join(words)

    def _cost(self, word: str) -> int:
        if word not in self._costs:
            self._costs[word] = self._count_tokens(f" {word}")
        return self._costs[word]
