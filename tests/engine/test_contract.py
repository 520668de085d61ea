"""What every engine behind `Engine` must do; ours always, vLLM and SGLang where they are installed.

With another engine: `pytest tests/engine/test_contract.py` in an environment that has it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sateen.checkpoint.hf import save
from sateen.data.tokenizer import Tokenizer
from sateen.engine.contract import Engine, WeightUpdate
from sateen.engine.engine import LLM
from sateen.engine.external import SGLangEngine, VLLMEngine
from sateen.engine.request import SamplingParams
from sateen.errors import BackendUnavailable, RequestError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder

# Heads of a size that other engines have kernels for, and no padding rows, which each treats in its way.
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 288,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "initializer_range": 0.1,
}


def write_model(folder: Path, seed: int) -> Decoder:
    tokenizer = Tokenizer.train(["the cat sat on the mat and rain falls from the clouds " * 40], 288)
    model = Decoder(ModelConfig.from_hf(CONFIG)).init_weights(seed).eval()
    save(model, folder)
    tokenizer.save(folder)
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Decoder]:
    folders = [tmp_path_factory.mktemp("models") / name for name in ("first", "second")]
    return {folder: write_model(folder, seed) for seed, folder in enumerate(folders)}


@pytest.fixture(scope="module", params=["sateen", "vllm", "sglang"])
def engine(request: pytest.FixtureRequest, models: dict[Path, Decoder]) -> Iterator[Engine]:
    first = str(next(iter(models)))
    if request.param == "sateen":
        yield LLM(first, draft="none")
        return
    if importlib.util.find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "vllm":
        yield VLLMEngine(
            first, dtype="float32", max_model_len=128, enforce_eager=True, seed=0, gpu_memory_utilization=0.2
        )
    else:
        yield SGLangEngine(first, dtype="float32", context_length=128)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [100, 3, 250], list(range(40, 80))]


def logprobs(model: Decoder, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logprobs(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | changes))


def test_greedy_tokens_are_the_models(engine: Engine, models: dict[Path, Decoder]) -> None:
    model = next(iter(models.values()))
    outputs = engine.generate(PROMPTS, params())
    assert [out.outputs[0].token_ids for out in outputs] == [greedy(model, p, 8) for p in PROMPTS]
    assert [out.prompt_token_ids for out in outputs] == PROMPTS
    assert {out.outputs[0].finish_reason for out in outputs} == {"length"}


def test_scores_are_the_models_log_probabilities(engine: Engine, models: dict[Path, Decoder]) -> None:
    model = next(iter(models.values()))
    for prompt, scores in zip(PROMPTS, engine.score(PROMPTS), strict=True):
        truth = logprobs(model, prompt)[:-1].gather(1, torch.tensor(prompt)[1:, None]).squeeze(1)
        assert scores == pytest.approx(truth.tolist(), abs=1e-4)


def test_logprobs_are_raw_and_belong_to_the_tokens(engine: Engine) -> None:
    out = engine.generate(PROMPTS, params(temperature=1.5, seed=3, logprobs=2))
    for prompt, output in zip(PROMPTS, out, strict=True):
        completion = output.outputs[0]
        scores = engine.score([prompt + completion.token_ids])[0][len(prompt) - 1 :]
        assert completion.token_logprobs == pytest.approx(scores, abs=1e-4)
        assert completion.logprobs is not None
        assert all({1, 2} <= {entry.rank for entry in row.values()} for row in completion.logprobs)


def test_a_stop_token_ends_the_text(engine: Engine, models: dict[Path, Decoder]) -> None:
    truth = greedy(next(iter(models.values())), PROMPTS[0], 8)
    stop = next(token for i, token in enumerate(truth) if i >= 2)
    out = engine.generate([PROMPTS[0]], params(stop_token_ids=[stop]))[0].outputs[0]
    assert out.token_ids == truth[: truth.index(stop) + 1]
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_seeds_repeat(engine: Engine) -> None:
    once, again = (
        [out.outputs[0].token_ids for out in engine.generate(PROMPTS, params(temperature=1.0, seed=7))]
        for _ in range(2)
    )
    assert once == again


def test_one_setting_per_prompt(engine: Engine) -> None:
    outputs = engine.generate(PROMPTS, [params(max_tokens=n) for n in (1, 2, 3)])
    assert [len(out.outputs[0].token_ids) for out in outputs] == [1, 2, 3]
    with pytest.raises(RequestError):
        engine.generate(PROMPTS, [params()])


def test_new_weights_count_from_the_next_token(engine: Engine, models: dict[Path, Decoder]) -> None:
    (first, _), (second, model) = models.items()
    engine.update_weights(WeightUpdate(4, second))
    try:
        outputs = engine.generate(PROMPTS, params())
        assert [out.outputs[0].token_ids for out in outputs] == [greedy(model, p, 8) for p in PROMPTS]
        assert {out.weights_version for out in outputs} == {4}
    finally:
        engine.update_weights(WeightUpdate(5, first))


@pytest.mark.parametrize(("kind", "name"), [(VLLMEngine, "vllm"), (SGLangEngine, "sglang")])
def test_an_engine_that_is_missing_is_named(kind: Any, name: str) -> None:
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    with pytest.raises(BackendUnavailable, match=f"pip install {name}"):
        kind("nowhere")
