"""Our engine as a side of `engine.py`: loads, reads prompts and decodes; JSON lines in and out."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from _worker import serve, version

from sateen import LLM, SamplingParams
from sateen.data.text import Document
from sateen.engine.state import Request
from sateen.errors import RequestError
from sateen.eval.perplexity import perplexity
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder

ENGINE: LLM
RUNNING: list[Request] = []


def load(
    model: str | dict[str, Any], threads: int, *, prefix_cache: bool = False, **options: Any
) -> dict[str, Any]:
    """Loads a directory, or draws the weights of a config, in bfloat16, from seed 0.

    Without a prefix cache every round reads its prompt anew, as the peers do.
    """
    global ENGINE
    torch.set_num_threads(threads)
    began = time.perf_counter()
    source: str | Decoder = (
        model
        if isinstance(model, str)
        else Decoder(ModelConfig.from_hf(model)).init_weights(0).to(torch.bfloat16)
    )
    ENGINE = LLM(source, draft="none", prefix_cache=prefix_cache, **options)
    tensors = {t.data_ptr(): t for t in (*ENGINE.model.parameters(), *ENGINE.model.buffers())}
    return {
        "load_s": time.perf_counter() - began,
        "weight_bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "cache_bytes": sum(ENGINE.stats()["allocated_bytes"].values()),
        "version": version("sateen"),
        "threads": torch.get_num_threads(),
    }


def begin(prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Reads the prompts up to the first token of each; the seconds are of that."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens + 1, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    new = [ENGINE.add(prompt, params) for prompt in prompts]
    while not all(request.num_generated for request in new):
        ENGINE.step()
    RUNNING.extend(new)
    return {"seconds": time.perf_counter() - began, "tokens": [request.tokens[-1] for request in new]}


def decode(num_tokens: int) -> dict[str, Any]:
    """So many more greedy tokens of each sequence that has begun: the bare loop."""
    step = ENGINE.step
    before = sum(request.num_generated for request in RUNNING)
    began = time.perf_counter()
    for _ in range(num_tokens):
        step()
    seconds = time.perf_counter() - began
    made = sum(request.num_generated for request in RUNNING) - before
    if made != num_tokens * len(RUNNING):
        raise RequestError(f"{made} tokens from {num_tokens} steps of {len(RUNNING)} sequences")
    return {"seconds": seconds, "tokens": made, "last": [request.tokens[-1] for request in RUNNING]}


def end() -> None:
    """Drops what has begun."""
    for request in RUNNING:
        if request.finish_reason is None:
            ENGINE.abort(request)
    RUNNING.clear()


def generate(prompts: list[list[int]] | list[str], num_tokens: int) -> dict[str, Any]:
    """The call a user makes, prompts read and texts made."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    began = time.perf_counter()
    outputs = ENGINE.generate(prompts, params)
    seconds = time.perf_counter() - began
    ids = [output.outputs[0].token_ids for output in outputs]
    return {"seconds": seconds, "tokens": sum(map(len, ids)), "ids": ids, "text": outputs[0].outputs[0].text}


def measure_perplexity(texts: list[str], context: int | None) -> dict[str, Any]:
    """What the loaded model, in its form of weights, pays for the texts."""
    assert ENGINE.tokenizer is not None
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    context = context or ENGINE.model.config.max_position_embeddings
    found = perplexity(ENGINE.model, ENGINE.tokenizer, documents, context=context)
    return {"perplexity": found.perplexity, "tokens": found.num_tokens}


def step_perplexity(texts: list[str], context: int) -> dict[str, Any]:
    """The same of the beginnings of the texts, and its part of each token, one token a step.

    Small steps may have kernels of their own, which a forward over whole texts does not touch.
    """
    assert ENGINE.tokenizer is not None
    assert ENGINE.scheduler.max_num_batched_tokens == 1
    eos = ENGINE.tokenizer.eos_id
    prompts = [[eos, *ENGINE.tokenizer.encode(text)][:context] for text in texts]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    nats: list[float] = []
    for output in ENGINE.generate(prompts, params):
        assert output.prompt_logprobs is not None
        for token, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            assert row is not None
            nats.append(-row[token].logprob)
    return {"perplexity": math.exp(sum(nats) / len(nats)), "tokens": len(nats), "nats": nats}


if __name__ == "__main__":
    serve(
        {"load": load, "begin": begin, "decode": decode, "end": end, "generate": generate,
         "perplexity": measure_perplexity, "step_perplexity": step_perplexity}
    )  # fmt: skip
