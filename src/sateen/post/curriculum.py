"""Which prompts are drawn: dynamic sampling and the easy pool.

Groups whose answers are all right or all wrong teach nothing and are left out of the batch. A prompt that was
answered in full moves to the easy pool and is drawn again with a small probability, so that it is neither
trained on forever nor forgotten. Source: MiMo-7B (arXiv 2505.07608 §3.3.2), probability 0.1; returning a
prompt at its first imperfect draw and drawing without replacement are ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any


def is_informative(
    rewards: Sequence[float], correct: Sequence[bool], *, metric: str, least_spread: float = 0.05
) -> bool:
    """Whether a group may enter the batch.

    Args:
        rewards: of the group's answers.
        correct: whether each passes in full.
        metric: `none` keeps every group, `acc` keeps groups with right and wrong answers, `reward` those
            whose rewards differ by at least `least_spread`, which with partial rewards also keeps groups that
            no answer solves.
    """
    if metric == "none":
        return True
    if metric == "acc":
        return any(correct) and not all(correct)
    assert metric == "reward", metric
    return max(rewards) - min(rewards) >= least_spread


class PromptSampler:
    """Draws prompt indices from the normal set and the easy pool.

    Attributes:
        easy_probability: of drawing from the easy pool.
    """

    def __init__(self, num_prompts: int, *, seed: int, easy_probability: float = 0.1):
        self.num_prompts = num_prompts
        self.easy_probability = easy_probability
        self._rng = random.Random(seed)
        self._easy: set[int] = set()
        self._queues: dict[str, list[int]] = {"normal": [], "easy": []}

    @property
    def num_easy(self) -> int:
        return len(self._easy)

    def draw(self) -> int:
        """The next prompt's index; each set is drawn without replacement until it is used up."""
        wants_easy = self._rng.random() < self.easy_probability
        name = "easy" if (wants_easy and self._easy) or len(self._easy) == self.num_prompts else "normal"
        return self._pop(name)

    def _pop(self, name: str) -> int:
        while True:
            queue = self._queues[name]
            if not queue:
                members = [i for i in range(self.num_prompts) if (i in self._easy) == (name == "easy")]
                self._rng.shuffle(members)
                self._queues[name] = queue = members
            index = queue.pop()
            if (index in self._easy) == (name == "easy"):
                return index

    def put_back(self, index: int) -> None:
        """Returns a prompt whose rollout was aborted to the head of its queue."""
        self._queues["easy" if index in self._easy else "normal"].append(index)

    def record(self, index: int, correct: Sequence[bool]) -> None:
        """Moves a prompt into the easy pool when all of its answers are right, and back when one is not."""
        if all(correct):
            self._easy.add(index)
        else:
            self._easy.discard(index)

    def state_dict(self) -> dict[str, Any]:
        """Where the sampler stands, as values that JSON can hold."""
        version, internal, gauss = self._rng.getstate()
        return {"rng": [version, list(internal), gauss], "easy": sorted(self._easy), "queues": self._queues}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly after the draw at which `state_dict` was taken."""
        version, internal, gauss = state["rng"]
        self._rng.setstate((version, tuple(internal), gauss))
        self._easy = set(state["easy"])
        self._queues = {name: list(queue) for name, queue in state["queues"].items()}
