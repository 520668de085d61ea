"""`sateen eval`: its task arguments, its lines and its refusals. The measures have tests of their own."""

import random
from pathlib import Path

import pytest

from sateen.data.tasks import Recall, Sums
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError
from sateen.eval.faces import lines, main, make_task


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some words to learn a tokenizer from"] * 4, 270)


def test_tasks_are_held_out_and_measured_in_tokens(tokenizer: Tokenizer) -> None:
    sums = make_task(Sums, tokenizer, 40)
    assert isinstance(sums, Sums)
    assert sums.is_heldout
    recall = make_task(Recall, tokenizer, 40)
    example = recall.sample(random.Random(0))
    between = example.prompt.split("\n")[1]
    assert len(tokenizer.encode(between)) >= 40


def test_lines_are_for_people() -> None:
    quality = {
        "bits_per_byte": 1.98767,
        "perplexity": 12.0,
        "tasks": {"sums": {"accuracy": 0.125, "n": 8, "chance": 0.0}},
    }
    assert lines(quality) == [
        "bits per byte  1.9877",
        "perplexity     12.0000",
        "sums           12.5% of 8 (chance 0.0%)",
    ]


def test_an_unknown_task_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    known = r"\(known: cwe, multikey, needle, recall, reverse, sort, sums, vt\)"
    with pytest.raises(ConfigError, match=rf"unknown task 'sum'; did you mean sums\? {known}"):
        main(str(tmp_path / "no model here"), tasks=["sum"])


def test_a_text_without_characters_is_refused(tmp_path: Path) -> None:
    from sateen.models.base import ModelConfig
    from sateen.models.decoder import Decoder
    from sateen.models.registry import preset

    tokenizer = Tokenizer.train(["some words to learn a tokenizer from"] * 4, 270)
    model = Decoder(ModelConfig.from_hf(preset("mimo-v2-flash-tiny") | {"vocab_size": 300})).init_weights(0)
    model.save(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.txt has no text to measure perplexity on"):
        main(str(tmp_path / "model"), text=str(tmp_path / "empty.txt"))
