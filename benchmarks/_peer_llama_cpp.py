"""llama.cpp as a side of `engine.py`, run by the Python that has llama-cpp-python; JSON lines in and out."""

from __future__ import annotations

import time
from typing import Any

import llama_cpp
import numpy as np
from _worker import serve

ENGINE: llama_cpp.Llama
NEWEST: int


def load(model: str, threads: int, context: int) -> dict[str, Any]:
    global ENGINE
    began = time.perf_counter()
    ENGINE = llama_cpp.Llama(
        model, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False
    )  # fmt: skip
    info = llama_cpp.llama_print_system_info().decode()
    return {"load_s": time.perf_counter() - began, "version": llama_cpp.__version__, "system": info}


def best() -> int:
    """The greedy token: what a bare loop over `eval` needs to go on."""
    logits = ENGINE._ctx.get_logits()
    return int(np.ctypeslib.as_array(logits, shape=(ENGINE.n_vocab(),)).argmax())


def begin(prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Reads the one prompt up to its first token."""
    global NEWEST
    (prompt,) = prompts
    ENGINE.reset()
    began = time.perf_counter()
    ENGINE.eval(prompt)
    NEWEST = best()
    return {"seconds": time.perf_counter() - began, "tokens": [NEWEST]}


def decode(num_tokens: int) -> dict[str, Any]:
    """So many more greedy tokens: `eval` of one token at a time."""
    global NEWEST
    token, step = NEWEST, ENGINE.eval
    began = time.perf_counter()
    for _ in range(num_tokens):
        step([token])
        token = best()
    seconds = time.perf_counter() - began
    NEWEST = token
    return {"seconds": seconds, "tokens": num_tokens, "last": [token]}


def end() -> None:
    ENGINE.reset()


def generate(prompts: list[str], num_tokens: int) -> dict[str, Any]:
    """`create_completion` of one text; it may end early, so the caller looks at the tokens."""
    (prompt,) = prompts
    ENGINE.reset()  # otherwise it would keep the rows of a prompt it has seen
    began = time.perf_counter()
    answer = ENGINE.create_completion(prompt, max_tokens=num_tokens, temperature=0.0)
    seconds = time.perf_counter() - began
    text = answer["choices"][0]["text"]
    return {"seconds": seconds, "tokens": answer["usage"]["completion_tokens"], "text": text}


if __name__ == "__main__":
    serve({"load": load, "begin": begin, "decode": decode, "end": end, "generate": generate})
