"""Retrieval in one forward, against models whose answers are known and the engine's greedy decoding."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sateen.data.facts import LongExample
from sateen.data.long_context import MultiKey, VariableTracking, long_task
from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.eval.long_context import retrieval
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

TEXT = (
    "warp weft loom thread satin weave silk cotton shuttle reed heddle bobbin spindle yarn twill felt wool "
    * 30
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 320)


class Reader:
    """Continues every token as it was continued the first time; knows nothing of tokens in `blind`."""

    device = torch.device("cpu")

    def __init__(self, blind=()):
        self.blind = blind

    def trunk(self, ids_T, seq):
        first = {}
        ids = ids_T.tolist()
        for token, following in pairwise(ids):
            first.setdefault(token, following)
        return torch.tensor([0 if token in self.blind else first.get(token, 0) for token in ids])[:, None]

    def head_input(self, hidden_TD):
        return hidden_TD

    def logits(self, hidden_TD):
        return torch.nn.functional.one_hot(hidden_TD[:, 0], 400).float()


def test_a_reader_that_looks_keys_up_is_right_and_one_that_sees_half_of_them_is_half_right(tokenizer):
    task = long_task(MultiKey, tokenizer, ["OH MY 12."], num_keys=4, num_queries=4, length=80)
    assert retrieval(Reader(), tokenizer, task, documents=6, seed=1).accuracy == 1.0
    blind = {tokenizer.encode(f" {word}")[0] for word in task.words[::2]}
    rng, seen = random.Random(1), []
    for _ in range(6):
        text = "".join(piece for piece, _ in task.sample(rng).pieces)
        keys = [line.split()[1] for line in text.split("\n") if line.startswith("? ")]
        seen.append([tokenizer.encode(f" {key}")[0] not in blind for key in keys])
    shares = [sum(row) / 4 for row in seen]
    found = retrieval(Reader(blind), tokenizer, task, documents=6, seed=1)
    assert (found.n, found.documents, found.chance) == (24, 6, task.chance)
    assert found.accuracy == found.token_accuracy == pytest.approx(sum(shares) / 6)
    assert 0 < found.accuracy < 1
    deviation = torch.tensor(shares, dtype=torch.float64).std().item()
    assert found.standard_error == pytest.approx(deviation / 6**0.5)


def test_a_chain_counts_only_when_all_of_it_is_right(tokenizer):
    task = long_task(VariableTracking, tokenizer, ["OH MY 12."], num_chains=2, num_queries=2, length=80)
    assert retrieval(Reader(), tokenizer, task, documents=4, seed=2).accuracy == 1.0
    # Values are right where the name is known: of an answer of two words the first then stands alone.
    example = task.sample(random.Random(2))
    chains = [text.split() for text, is_answer in example.pieces if is_answer]
    blind = {tokenizer.encode(f" {chain[0]}")[0] for chain in chains}
    found = retrieval(Reader(blind), tokenizer, task, documents=1, seed=2)
    assert (found.accuracy, found.token_accuracy) == (0.0, 0.5)


@torch.no_grad()
def test_the_first_question_is_judged_as_greedy_decoding_answers_it(tokenizer):
    raw = preset("hysparse-tiny") | {"vocab_size": 320, "initializer_range": 0.2}
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0)
    llm = LLM(model, tokenizer=tokenizer, draft="none")
    generator = random.Random(5)
    examples = []
    for i in range(8):
        prompt = " ".join(generator.choices(TEXT.split(), k=40))
        ids = [tokenizer.eos_id, *tokenizer.encode(prompt)]
        out = llm.generate([ids], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))[0]
        answer = out.outputs[0].token_ids if i % 2 else [7, 9]
        examples.append((prompt, answer))

    class Written:
        """Pieces that are token ids already: text would not come back token by token."""

        chance = 0.0

        def __init__(self):
            self.left = iter(examples)

        def sample(self, rng):
            prompt, answer = next(self.left)
            pieces = ((prompt, False), (answer, True))
            return LongExample("", "", "", pieces, 0, 0.0)  # type: ignore[arg-type]

    encode = SimpleNamespace(
        eos_id=tokenizer.eos_id,
        encode=lambda text: tokenizer.encode(text) if isinstance(text, str) else list(text),
    )
    found = retrieval(model, encode, Written(), documents=8, seed=0)
    assert found.accuracy == 0.5
