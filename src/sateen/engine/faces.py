"""The `generate` and `chat` verbs: answers on stdout, talk on stderr."""

from __future__ import annotations

import json as json_module
import sys
from typing import Any

from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.int8_layers import BUDGET
from sateen.engine.request import SamplingParams
from sateen.errors import ConfigError, RequestError

HELP = "/reset begins a new conversation, /quit ends"


def generate(
    model: str,
    prompt: str,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    draft: str = "auto",
    weights: str = "auto",
    attention: str = "auto",
    kv_cache_dtype: str = "auto",
    int8_budget: float = BUDGET,
    json: bool = False,
) -> None:
    """Prints the continuation of a text as it comes, or one JSON object with `json`.

    Raises:
        ConfigError: the model has no tokenizer.
        RequestError: the prompt or a setting cannot be served.
    """
    llm, _ = _load(model, draft, weights, attention, kv_cache_dtype, int8_budget)
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    if json:
        output = llm.generate(prompt, params)[0]
        completion, stats = output.outputs[0], llm.stats()
        result = {
            "prompt": prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "prompt_tokens": len(output.prompt_token_ids),
            "finish_reason": completion.finish_reason,
            "draft": {key: stats[key] for key in ("acceptance_length", "acceptance_by_position")},
            "tokens_per_s": stats["tokens_per_s"],
            "int8_attention": stats["int8_attention"],
        }
        print(json_module.dumps(result, ensure_ascii=False))
        return
    for news in llm.generate_stream(prompt, params):
        print(news.text, end="", flush=True)
    print()
    _talk(_summary(llm))


def chat(
    model: str,
    max_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int | None = None,
    draft: str = "auto",
    weights: str = "auto",
    attention: str = "auto",
    kv_cache_dtype: str = "auto",
    int8_budget: float = BUDGET,
) -> None:
    """Answers the lines of stdin, one turn each, in the tokenizer's own chat template.

    Raises:
        ConfigError: the model has no tokenizer, or that has no chat template.
        RequestError: a setting cannot be served.
    """
    llm, tokenizer = _load(model, draft, weights, attention, kv_cache_dtype, int8_budget)
    _ = tokenizer.template  # a missing template is told before the first question
    params = SamplingParams(temperature=temperature, top_p=top_p, seed=seed, max_tokens=max_tokens)
    messages: list[dict[str, Any]] = []
    is_terminal = sys.stdin.isatty()
    _talk(HELP)
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input().strip()
        except EOFError:
            break
        if line == "/quit":
            break
        if line == "/reset":
            messages.clear()
            _talk("new conversation")
        elif line.startswith("/"):
            _talk(f"unknown command {line.split()[0]}; {HELP}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": _answer(llm, tokenizer, messages, params)})
            except RequestError as error:
                messages.pop()
                if not is_terminal:
                    raise
                _talk(f"{error}; /reset begins a new conversation")
    _talk(_summary(llm))


def _answer(llm: LLM, tokenizer: Tokenizer, messages: list[dict[str, Any]], params: SamplingParams) -> str:
    """Prints the next turn while it comes; Ctrl-C ends the turn and keeps what was said."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    stream = llm.generate_stream(ids, params)
    said = ""
    try:
        for news in stream:
            said += news.text
            print(news.text, end="", flush=True)
    except KeyboardInterrupt:
        _talk("\nstopped")
    print()
    return said


def _load(
    model: str, draft: str, weights: str, attention: str, kv_cache_dtype: str, int8_budget: float
) -> tuple[LLM, Tokenizer]:
    llm = LLM(
        model,
        draft=draft,
        weights=weights,
        attention=attention,
        kv_cache_dtype=kv_cache_dtype,
        int8_budget=int8_budget,
        max_num_seqs=1,
    )
    if llm.tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer.json to read text with; put one beside its config.json")
    return llm, llm.tokenizer


def _summary(llm: LLM) -> str:
    stats = llm.stats()
    parts = [f"{stats['generated_tokens']} tokens", f"{stats['tokens_per_s']:.1f} tokens/s"]
    if stats["int8_attention"] and stats["int8_attention"]["float_layers"]:
        parts.append(f"{len(stats['int8_attention']['float_layers'])} layers in floating point")
    if stats["acceptance_by_position"]:
        shares = ", ".join(f"{share:.0%}" for share in stats["acceptance_by_position"])
        parts.append(f"{stats['acceptance_length']:.2f} tokens per pass (drafts accepted: {shares})")
    return ", ".join(parts)


def _talk(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
