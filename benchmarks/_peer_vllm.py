"""vLLM on the CPU as a side of `engine.py`, run by the Python that has it; JSON lines in and out."""

from __future__ import annotations

import os
import time
from typing import Any

from _worker import serve

ENGINE: Any


def load(
    model: str, threads: int, max_num_seqs: int, max_model_len: int, *, is_compiled: bool
) -> dict[str, Any]:  # fmt: skip
    """In bfloat16 with its defaults, but no rows kept between calls: every round reads its prompts anew."""
    global ENGINE
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
    # Its `auto` keeps a core free of computing threads, which the other sides do not.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}" if threads > 1 else "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm

    began = time.perf_counter()
    ENGINE = vllm.LLM(
        model, dtype="bfloat16", max_num_seqs=max_num_seqs, max_model_len=max_model_len,
        enforce_eager=not is_compiled, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    return {"load_s": time.perf_counter() - began, "version": vllm.__version__, "compiled": is_compiled}


def generate(prompts: list[list[int]], num_tokens: int) -> dict[str, Any]:
    """The call a user makes."""
    import vllm

    params = vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    began = time.perf_counter()
    outputs = ENGINE.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    return {"seconds": seconds, "tokens": sum(map(len, ids)), "ids": ids}


if __name__ == "__main__":
    serve({"load": load, "generate": generate})
