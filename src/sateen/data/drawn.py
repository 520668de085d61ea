"""Where a source of random batches stands, when each batch has a generator of its own."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from sateen.errors import ConfigError


class DrawnBatches:
    """Batches drawn one by one from (seed, number of the batch); the loop's state of such a source.

    Attributes:
        what: what is drawn, for the error of another seed.
        seed: of the choice.
        index: batches drawn so far.
    """

    what: ClassVar[str]

    def __init__(self, seed: int):
        self.seed, self.index = seed, 0

    def next_generator(self) -> np.random.Generator:
        """The generator of the next batch, which counts as drawn from here on."""
        rng = np.random.default_rng((self.seed, self.index))
        self.index += 1
        return rng

    def metrics(self) -> dict[str, float]:
        """Nothing: what is drawn has no values of its own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index, "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues behind the batches that the state has counted.

        Raises:
            ConfigError: the state is of another seed.
        """
        if state["seed"] != self.seed:
            raise ConfigError(f"the {self.what} were drawn with seed {state['seed']}, not {self.seed}")
        self.index = int(state["index"])
