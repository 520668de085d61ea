"""Tiny models for the engine's tests: random ones, and ones whose drafts are good by construction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"


@torch.inference_mode(False)  # which a test that asks for the fixture first may be in
def _random_model(name: str, *, heads: int | None = None, seed: int = 0, **changes: Any) -> Decoder:
    """Weights of standard deviation 0.1, so that attention matters.

    A router's choice is settled by its bias: among thousands of tokens some scores tie up to rounding, and a
    flipped expert would change greedy tokens without any fault of the engine.
    """
    raw = preset(name) | {"initializer_range": 0.1} | changes
    if heads is not None:
        raw["num_nextn_predict_layers"] = heads
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(seed).eval()
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias += 2.0 * torch.arange(moe.spec.num_experts)
    return model


def _drafting_model(
    name: str,
    *,
    heads: int = 3,
    noise: float = 0.0,
    strength: float = 0.02,
    successors: Mapping[int, int] | None = None,
    **changes: Any,
) -> Decoder:
    """A bigram model: the trunk maps each token to a fixed successor, 7 further on, as do the heads.

    Every block adds `strength`-sized random outputs and the heads get `noise`, so drafts are often right;
    with both 0 they always are.
    """
    model = _random_model(name, heads=heads, **changes)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if key.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                weight.normal_(0.0, strength, generator=generator) if strength else weight.zero_()
        table = model.model.embed_tokens.weight.normal_(0.0, 1.0, generator=generator)
        unit = table / table.norm(dim=-1, keepdim=True)
        model.lm_head.weight.copy_(unit.roll(7, 0))
        for token, successor in (successors or {}).items():
            model.lm_head.weight[successor] = unit[token]
        D = model.config.hidden_size
        spec = model.config.mtp
        assert spec is not None
        for head in model.mtp_heads():
            join = head.get_submodule(spec.names["join"]).weight
            join.normal_(0.0, 1.0, generator=generator).mul_(noise)
            first = D if spec.order == "hidden" else 0
            join[:, first : first + D] += torch.eye(D)
    return model


def _greedy_by_hand(model: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens from whole forwards, without the engine."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def _shaped_by_hand(
    logits: torch.Tensor, prompt: Sequence[int], output: Sequence[int], params: SamplingParams
) -> torch.Tensor:
    """Bias, repetition, frequency and presence penalties as their definitions say, in float64."""
    x = logits.double().numpy().copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    r = params.repetition_penalty
    for token in {*prompt, *output}:
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token, count in Counter(output).items():
        x[token] -= params.frequency_penalty * count + params.presence_penalty
    return torch.from_numpy(np.asarray(x))


def _prompts(lengths: Sequence[int], vocab_size: int = 512, seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _tokens(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


def _greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, **changes)


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Decoder]:
    return _random_model


@pytest.fixture(scope="session")
def drafting_model() -> Callable[..., Decoder]:
    return _drafting_model


@pytest.fixture(scope="session")
def greedy_by_hand() -> Callable[..., list[int]]:
    return _greedy_by_hand


@pytest.fixture(scope="session")
def shaped_by_hand() -> Callable[..., torch.Tensor]:
    return _shaped_by_hand


@pytest.fixture(scope="session")
def make_prompts() -> Callable[..., list[list[int]]]:
    return _prompts


@pytest.fixture(scope="session")
def tokens_of() -> Callable[..., list[list[int]]]:
    return _tokens


@pytest.fixture(scope="session")
def greedy() -> Callable[..., SamplingParams]:
    return _greedy


@pytest.fixture(scope="session")
def flash() -> Decoder:
    return _random_model(FLASH)


@pytest.fixture(scope="session")
def mimo() -> Decoder:
    return _random_model(MIMO)


@pytest.fixture(scope="session")
def hysparse() -> Decoder:
    return _random_model("hysparse-tiny", hidden_size=64, intermediate_size=96, sparse_topk_tokens=32)


@pytest.fixture(scope="session")
def hysparse2() -> Decoder:
    return _random_model("hysparse2-tiny")
