"""A server in a thread on a free port, over tiny models whose answers are known."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RawTokenizer

from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.server.app import Service
from sateen.engine.server.gate import Doors
from sateen.engine.server.run import Server, bind, url

THINK, THOUGHT, THINK_END, SAID = "<think>", "Two and two.", "</think>", "It is four."
CALL = "<tool_call>\n<function=weather>\n<parameter=city>", "Paris", "</parameter>\n</function>\n</tool_call>"
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name + call.function.arguments.city }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' + (begin or '\\n') }}{% endif %}"
)


@dataclass
class Running:
    """A server that answers.

    Attributes:
        url: of the page; the API is under /v1.
        llm: its engine.
        client: OpenAI's.
    """

    url: str
    llm: LLM
    service: Service
    server: Server
    client: Any
    thread: threading.Thread


@contextmanager
def _running(
    llm: LLM,
    *,
    api_key: str | None = None,
    max_body_bytes: int = 1 << 20,
    drain_s: float = 20.0,
    only_local_names: bool = False,
    **settings: Any,
) -> Iterator[Running]:
    import openai

    listener = bind("127.0.0.1", 0)
    service = Service(llm, name="tiny", doors=Doors(api_key, max_body_bytes, only_local_names), **settings)
    ready = threading.Event()
    server = Server(service, drain_s=drain_s, on_ready=ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert ready.wait(60)
        base = url(listener)
        with openai.OpenAI(
            base_url=f"{base}/v1", api_key=api_key or "none", max_retries=0, timeout=60
        ) as client:
            yield Running(base, llm, service, server, client, thread)
    finally:
        server.drain()
        server.drain()  # a test that failed may have left work behind
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def running() -> Callable[..., Any]:
    return _running


@pytest.fixture(scope="session")
def story(drafting_model) -> Callable[..., LLM]:
    """An engine that says the alphabet, or reasons, speaks or calls a tool, by the last token of the prompt.

    `begin` of the chat template sets that token; without it a chat begins the alphabet.
    """
    tokenizer = Tokenizer.train(["assistant user system "] * 20, 262)
    tokenizer._raw.add_tokens([THINK, THOUGHT, THINK_END, SAID, *CALL])
    tokenizer.config["chat_template"] = TEMPLATE
    # A token follows one other only. The end of a text ends a turn too.
    lines = [
        ["Ċ", *"abcdefghijklmnopqrstuvwxyz"],
        ["!", THINK, THOUGHT, THINK_END, SAID, "<|im_end|>"],
        ["?", *CALL, "<|endoftext|>"],
    ]
    pairs = [pair for line in lines for pair in itertools.pairwise(line)]
    successors = {tokenizer.token_id(first): tokenizer.token_id(second) for first, second in pairs}
    model = drafting_model("mimo-v2-flash-tiny", strength=0.0, vocab_size=272, successors=successors)
    with torch.no_grad():  # the fixed successors win over those that the fixture gives every token
        model.lm_head.weight[list(successors.values())] *= 2

    with_specials = json.loads(tokenizer.to_json())
    for token in with_specials["added_tokens"]:
        token["special"] |= token["content"] in (THINK, THINK_END, *CALL)
    special = Tokenizer(RawTokenizer.from_str(json.dumps(with_specials)), tokenizer.config)

    def make(*, pause_s: float = 0.0, has_special_tags: bool = False, **settings: Any) -> LLM:
        llm = LLM(model, tokenizer=special if has_special_tags else tokenizer, draft="mtp", **settings)
        if pause_s:  # a test has to come in between
            step = llm.step
            llm.step = lambda: (time.sleep(pause_s), step())[1]  # type: ignore[method-assign]
        return llm

    return make


@pytest.fixture(scope="session")
def noise(random_model) -> LLM:
    """An engine that says bytes at random, many of which are no whole characters.

    It always drafts: whether drafts pay is measured, and how many there are decides which random numbers a
    sampled token gets.
    """
    tokenizer = Tokenizer.train(["The quick brown fox. Ein Übermaß, 日本語, 🦜. "] * 20, 300)
    return LLM(random_model("mimo-v2-flash-tiny", vocab_size=304), tokenizer=tokenizer, draft="mtp")
