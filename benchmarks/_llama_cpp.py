"""llama.cpp's side of gguf_parity.py, run by the Python that has llama-cpp-python; JSON in and out.

In: {"model", "num_tokens", "threads", "prompts": [{"text", "ids", "ours"}]}. Out, per prompt: the ids of its
text, the greedy continuation of the given ids, and, with our continuation forced, the best token, the gap
between the two best logits and the log-probability of our token at every position.
"""

import json
import resource
import sys

import llama_cpp
import numpy as np

asked = json.load(sys.stdin)
began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
llm = llama_cpp.Llama(
    asked["model"], n_ctx=512, n_batch=512, n_threads=asked["threads"], n_threads_batch=asked["threads"],
    logits_all=True, verbose=False, flash_attn=False,
    type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
)  # fmt: skip
answers = []
for prompt in asked["prompts"]:
    ids, ours = prompt["ids"], prompt["ours"]
    llm.reset()
    greedy = []
    for token in llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        greedy.append(int(token))
        if len(greedy) == asked["num_tokens"]:
            break
    llm.reset()
    llm.eval(ids + ours[:-1])
    logits = np.asarray(llm.scores[len(ids) - 1 : len(ids) - 1 + len(ours)], dtype=np.float64)
    best = np.sort(logits, axis=-1)[:, -2:]
    logprobs = logits - np.log(np.exp(logits - best[:, -1:]).sum(-1, keepdims=True)) - best[:, -1:]
    answers.append(
        {
            "ids": llm.tokenize(prompt["text"].encode(), add_bos=False, special=True),
            "greedy": greedy,
            "forced_best": logits.argmax(-1).tolist(),
            "forced_gap": (best[:, 1] - best[:, 0]).tolist(),
            "forced_logprobs": [float(row[token]) for row, token in zip(logprobs, ours, strict=True)],
        }
    )
json.dump(
    {
        "version": llama_cpp.__version__,
        "cpu_s": resource.getrusage(resource.RUSAGE_SELF).ru_utime - began,
        "answers": answers,
    },
    sys.stdout,
)
