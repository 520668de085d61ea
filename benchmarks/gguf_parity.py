"""Greedy tokens of a GGUF model beside llama.cpp's, from the same weights.

    sateen bench gguf-parity MODEL.gguf --peer PEER/bin/python

The file's blocks are dequantised and written to an F16 file, so that both engines read the same numbers:
llama.cpp computes products of quantised blocks with rounded activations, which is another model. Ours runs in
float32. A mismatch counts as a tie where the two best logits are closer than --tie; behind a mismatch the
texts differ, so it ends the comparison of its prompt. Exits with 1 when a mismatch is no tie. --peer is a
Python with llama-cpp-python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _gguf import rewrite
from _results import ROOT, is_dirty, publish, revision

from sateen import LLM, SamplingParams
from sateen.receipt.machine import hardware, versions

PLAIN = (
    "The capital of France is",
    "Once upon a time, there was a little girl who",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "1, 2, 3, 4, 5,",
    "The three primary colours are",
    "import numpy as np\n\ndef mean(",
    "In 1969, Neil Armstrong",
    "A haiku about the sea:\n",
    "Zwei plus zwei ist",
)
QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Explain photosynthesis in one sentence.",
    "Write a Python function that adds two numbers.",
    "What is 12 + 30?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "Give me a short recipe for pancakes.",
    "Why is the sky blue?",
    "What does the word 'naïve' mean?",
)


def run_ours(model: Path, num_tokens: int) -> list[dict[str, Any]]:
    """Prompts with our ids, greedy tokens, their log-probabilities and the gaps between the two best."""
    llm = LLM(str(model), dtype="float32")
    assert llm.tokenizer is not None
    prompts: list[dict[str, Any]] = [{"text": text, "ids": llm.tokenizer.encode(text)} for text in PLAIN]
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = llm.tokenizer.render_chat(messages, add_generation_prompt=True)
        ids = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        prompts.append({"text": text, "ids": ids})
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=2)
    for prompt, output in zip(prompts, llm.generate([p["ids"] for p in prompts], params), strict=True):
        said = output.outputs[0]
        assert said.logprobs is not None
        best = [sorted((entry.logprob for entry in row.values()), reverse=True)[:2] for row in said.logprobs]
        prompt["ours"] = said.token_ids
        prompt["gaps"] = [first - second for first, second in best]
        prompt["logprobs"] = [
            row[token].logprob for row, token in zip(said.logprobs, said.token_ids, strict=True)
        ]
    return prompts


def compare(prompts: list[dict[str, Any]], answers: list[dict[str, Any]], tie: float) -> dict[str, Any]:
    """Counts over all prompts, and each mismatch."""
    mismatches, compared, forced, largest, equal_ids = [], 0, [], 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        equal_ids += prompt["ids"] == answer["ids"]
        pairs = list(zip(prompt["ours"], answer["greedy"], strict=True))
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        compared += len(pairs) if first is None else first + 1
        if first is not None:
            gap = prompt["gaps"][first]
            mismatches.append({"prompt": prompt["text"], "position": first, "gap": gap, "is_tie": gap < tie})
        for i, (token, best) in enumerate(zip(prompt["ours"], answer["forced_best"], strict=True)):
            if token != best:
                gaps = {"our_gap": prompt["gaps"][i], "their_gap": answer["forced_gap"][i]}
                forced.append({"prompt": prompt["text"], "position": i, **gaps})
        apart = (abs(a - b) for a, b in zip(prompt["logprobs"], answer["forced_logprobs"], strict=True))
        largest = max(largest, *apart)
    return {
        "prompts": len(prompts),
        "prompts_with_equal_ids": equal_ids,
        "greedy_tokens_compared": compared,
        "greedy_mismatches": len(mismatches),
        "greedy_mismatches_that_are_ties": sum(found["is_tie"] for found in mismatches),
        "mismatches": mismatches,
        "forced_positions": sum(len(prompt["ours"]) for prompt in prompts),
        "forced_mismatches": forced,
        "largest_logprob_difference": largest,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--peer", type=Path, required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=32, help="per prompt (default: %(default)s)")
    parser.add_argument("--tie", type=float, default=0.05, help="gap of logits (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gguf-parity.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "f16.gguf"
        rewrite(options.model, plain, "F16")
        began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        prompts = run_ours(plain, options.tokens)
        ours_s = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
        asked = {
            "model": str(plain), "num_tokens": options.tokens, "threads": torch.get_num_threads(),
            "prompts": [{key: prompt[key] for key in ("text", "ids", "ours")} for prompt in prompts],
        }  # fmt: skip
        peer = [str(options.peer), str(Path(__file__).with_name("_llama_cpp.py"))]
        done = subprocess.run(peer, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{options.peer}: llama.cpp failed:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    found = compare(prompts, answer["answers"], options.tie)
    document = {
        "what": "greedy tokens of one F16 GGUF file: ours in float32, llama.cpp with a float32 cache; "
        "forced: llama.cpp's best token after each prefix of our text",
        "command": "sateen bench gguf-parity MODEL.gguf --peer PYTHON",
        "model": {
            "file": options.model.name,
            "sha256": hashlib.sha256(options.model.read_bytes()).hexdigest(),
        },
        "hardware": {**hardware(), "threads": torch.get_num_threads()},
        "versions": versions() | {"llama-cpp-python": answer["version"]},
        "revision": revision(),
        "is_dirty": is_dirty("src/sateen", "benchmarks/gguf_parity.py"),
        "tie": options.tie,
        **found,
        "cpu_s": {"ours": round(ours_s, 1), "llama.cpp": round(answer["cpu_s"], 1)},
    }
    publish(document, options.out)
    return 0 if found["greedy_mismatches"] == found["greedy_mismatches_that_are_ties"] else 1


if __name__ == "__main__":
    sys.exit(main())
