"""Answers over long contexts, judged in one forward: every question of a document, without an engine.

An answer counts when each of its tokens is the likeliest one behind the true text before it. For the first
question of a document that is greedy decoding; later ones stand behind the right answers to the earlier ones.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass

import torch

from sateen.data.facts import LongTask
from sateen.data.packing import pack
from sateen.data.tokenizer import Tokenizer
from sateen.models.decoder import Decoder
from sateen.nn.attention import Sequences


@dataclass(frozen=True)
class Retrieval:
    """How many questions a model answers.

    Attributes:
        accuracy: share of answers that are right as a whole.
        token_accuracy: share of right tokens in answers.
        standard_error: of the accuracy, from documents as the independent units.
        n: questions.
        documents: how many they stand in.
        chance: accuracy of random words.
    """

    accuracy: float
    token_accuracy: float
    standard_error: float
    n: int
    documents: int
    chance: float

    def as_dict(self) -> dict[str, float | int]:
        """For a JSON file."""
        return asdict(self)


@torch.inference_mode()
def retrieval(
    model: Decoder, tokenizer: Tokenizer, task: LongTask, *, documents: int, seed: int
) -> Retrieval:
    """The model's answers to all questions of `documents` examples drawn with `seed`.

    Args:
        model: any decoder, trained or not.
        tokenizer: what the model reads.
        task: draws the examples; `num_queries` above 1 makes the most of a document.
    """
    rng = random.Random(seed)
    shares, answers, tokens, right_answers, right_tokens = [], 0, 0, 0, 0
    for _ in range(documents):
        ids, spans = [tokenizer.eos_id], []
        for text, is_answer in task.sample(rng).pieces:
            piece = tokenizer.encode(text)
            if is_answer:
                spans.append((len(ids), len(ids) + len(piece)))
            ids += piece
        batch = pack([ids]).to(model.device)
        hidden_TD = model.trunk(batch.input_ids, Sequences(batch.cu_seqlens, batch.position_ids))
        first = spans[0][0] - 1
        likeliest = [0] * first + model.logits(model.head_input(hidden_TD[first:])).argmax(-1).tolist()
        verdicts = [[likeliest[i - 1] == ids[i] for i in range(start, stop)] for start, stop in spans]
        right = sum(all(verdict) for verdict in verdicts)
        shares.append(right / len(spans))
        answers, right_answers = answers + len(spans), right_answers + right
        tokens, right_tokens = tokens + sum(map(len, verdicts)), right_tokens + sum(map(sum, verdicts))
    mean = sum(shares) / documents
    spread = sum((share - mean) ** 2 for share in shares) / max(documents - 1, 1)
    return Retrieval(
        accuracy=right_answers / answers,
        token_accuracy=right_tokens / tokens,
        standard_error=math.sqrt(spread / documents),
        n=answers,
        documents=documents,
        chance=task.chance,
    )
