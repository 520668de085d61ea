"""transformers as a side of `engine.py`, run by the Python that has it; JSON lines in and out."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from _worker import serve

MODEL: Any
STATE: tuple[Any, torch.Tensor]


def load(model: str, threads: int) -> dict[str, Any]:
    """In bfloat16 with its own choice of attention."""
    global MODEL
    torch.set_num_threads(threads)
    began = time.perf_counter()
    MODEL = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    return {
        "load_s": time.perf_counter() - began,
        "version": transformers.__version__,
        "torch": torch.__version__,
        "attention": MODEL.config._attn_implementation,
    }


@torch.inference_mode()
def begin(prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Reads prompts of one length up to their first tokens; logits of the last position alone."""
    global STATE
    ids = torch.tensor(prompts)
    began = time.perf_counter()
    out = MODEL(ids, use_cache=True, logits_to_keep=1)
    newest = out.logits[:, -1].argmax(-1, keepdim=True)
    tokens = newest[:, 0].tolist()
    seconds = time.perf_counter() - began
    STATE = out.past_key_values, newest
    return {"seconds": seconds, "tokens": tokens}


@torch.inference_mode()
def decode(num_tokens: int) -> dict[str, Any]:
    """So many more greedy tokens of each: the bare loop over the model's forward."""
    global STATE
    cache, newest = STATE
    began = time.perf_counter()
    for _ in range(num_tokens):
        out = MODEL(newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
        newest = out.logits[:, -1].argmax(-1, keepdim=True)
        last = newest[:, 0].tolist()
    seconds = time.perf_counter() - began
    STATE = cache, newest
    return {"seconds": seconds, "tokens": num_tokens * len(newest), "last": last}


def end() -> None:
    global STATE
    STATE = None, torch.empty(0)


@torch.inference_mode()
def generate(prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """Greedy `generate` of prompts of one length, as many tokens each."""
    ids = torch.tensor(prompts)
    began = time.perf_counter()
    out = MODEL.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
        max_new_tokens=num_tokens, min_new_tokens=num_tokens,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    new = out[:, ids.shape[1] :]
    return {"seconds": seconds, "tokens": new.numel(), "ids": new.tolist()}


if __name__ == "__main__":
    serve({"load": load, "begin": begin, "decode": decode, "end": end, "generate": generate})
