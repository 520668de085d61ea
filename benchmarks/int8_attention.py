"""INT8 attention: errors against float64 attention, and speed against torch's attention and a bfloat16 cache.

    sateen bench int8-attention --model DIR
    sateen bench int8-attention --only prefill --tokens 16384 --channels 128 --seconds 60

Errors are of random queries, keys and values [1, 4, 1024, 64] without a mask, as in the INT-FlashAttention
paper (arXiv 2409.16997), of two inputs that are closer to language models, and, with `--model`, of what a
model's own attention gets when it reads Python's documentation, causal. The FP8 rows are simulations in
torch: what is cast rounds as FP8 does, sums are float32. The speed parts are `_int8_prefill.py` and
`_int8_speed.py`; the kernels' tests run before them. All prompts take about 25 minutes on an idle core,
those of 16,384 tokens most of it: rounds are kept, and a run that was ended goes on when it is started
again. With `--only` the other parts of the result file stay as they are, and so do rows of other
prompts and contexts.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _int8_prefill
import _int8_quality
import _int8_speed
import torch
from _int8_inputs import CAPTURED_LAYERS, CHANNELS, HEADS, INPUTS, QKV, TOKENS, captured
from _pairs import limit, line
from _results import ROOT, is_dirty, publish, result_file, revision
from torch import Tensor
from torch.nn import functional as F

from sateen import ops
from sateen.ops.native import native
from sateen.receipt.machine import hardware, versions

TESTS = [ROOT / "tests" / "ops" / f"test_int8_attention{part}.py" for part in ("", "_native")]
TESTS += [ROOT / "tests" / "engine" / "native" / "test_step.py"]
PARTS = ("errors", "prefill", "decode", "steps", "quality")
SCRIPTS = [
    f"benchmarks/{name}.py" for name in ("int8_attention", "_int8_prefill", "_int8_speed", "_int8_quality")
]
ROUNDS = ROOT / "build" / "int8-attention-rounds.json"
HEADER = {
    "what": "errors against float64 attention, mean over seeds or layers; MRE = mean |o - o_ref| / "
    "(|o_ref| + 1e-5) over the whole output; speed in processor milliseconds, quantisation included; "
    "ratio = peer / ours",
}
# INT-FlashAttention's abstract and section 4: how much smaller its mean relative error is than its baseline's
SMALLER = {"uniform": 0.82, "normal": 0.46}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).float()


def weights(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Unnormalised probabilities, at most 1."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return (scores - scores.amax(-1, keepdim=True)).exp()


def fp8_e5m2(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The published FP8 baseline: unscaled casts of q, k, v and P; the row sum is of the uncast P."""
    q, k, v = (cast(x, torch.float8_e5m2) for x in (q, k, v))
    P = weights(q, k, causal)
    return cast(P, torch.float8_e5m2) @ v / P.sum(-1, keepdim=True)


def fp8_e4m3(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """A scale per head for q, k and v; P, at most 1, is cast times 256, away from the subnormal numbers."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scales = [x.abs().amax((-1, -2), keepdim=True) / largest for x in (q, k, v)]
    q, k, v = (cast(x / s, torch.float8_e4m3fn) * s for x, s in zip((q, k, v), scales, strict=True))
    P = weights(q, k, causal)
    return cast(P * 256, torch.float8_e4m3fn) / 256 @ v / P.sum(-1, keepdim=True)


def int8_rows(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The form of the engine's cache: values with a scale per token."""
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    mean = k.mean(0)
    (k8, k_scale), (v8, v_scale) = ops.quantize_int8(k - mean), ops.quantize_int8(v)
    rows = ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean[None])
    cu_k = torch.tensor([0, len(k)])
    if causal:
        out = ops.int8_rows_attention(q, rows, cu_seqlens_q=cu_k, cu_seqlens_k=cu_k)
        return out.transpose(0, 1)[None]  # type: ignore[union-attr]
    # This form is causal; a lone query at the end sees all keys. Every 16th query is enough for an average.
    steps = [
        ops.int8_rows_attention(q[t : t + 1], rows, cu_seqlens_q=torch.tensor([0, 1]), cu_seqlens_k=cu_k)
        for t in range(0, len(q), 16)
    ]
    return torch.cat(steps).transpose(0, 1)[None]  # type: ignore[arg-type]


Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def int8(**options: object) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return ops.int8_sdpa(q, k, v, causal=causal, **options)  # type: ignore[arg-type, return-value]

    return attend


def sdpa(dtype: torch.dtype) -> Attend:
    return lambda q, k, v, causal: F.scaled_dot_product_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), is_causal=causal
    ).float()


PAPER = {"smooth_k": False, "p_bits": "s8", "v_granularity": "head", "row_sum": "int8"}
VARIANTS: dict[str, Attend] = {
    "float32": sdpa(torch.float32),
    "bfloat16": sdpa(torch.bfloat16),
    "FP8 e5m2, unscaled cast (simulated)": fp8_e5m2,
    "FP8 e4m3, a scale per head (simulated)": fp8_e4m3,
    "half INT8, paper": int8(smooth_k=False, pv="float"),
    "half INT8, ours": int8(pv="float"),
    "full INT8, paper": int8(**PAPER),
    "full INT8, paper with K smoothing": int8(**PAPER | {"smooth_k": True}),
    "full INT8, ours without K smoothing": int8(smooth_k=False),
    "full INT8, ours": int8(),
    "full INT8, cached rows": int8_rows,
    "INT4 queries and keys, INT8 values": int8(qk="int4", max_error=math.inf),
}


def errors(got: Tensor, want: Tensor) -> dict[str, float]:
    """Percent, and the cosine; `got` may hold every n-th query only."""
    if got.shape != want.shape:
        want = want[:, :, :: want.shape[2] // got.shape[2]]
    got, gap = got.double(), (got.double() - want).abs()
    return {
        "mre_percent": 100 * float((gap / (want.abs() + 1e-5)).mean()),
        "relative_l1_percent": 100 * float(gap.sum() / want.abs().sum()),
        "relative_l2_percent": 100 * float(gap.norm() / want.norm()),
        "cosine": float(F.cosine_similarity(got.flatten(), want.flatten(), dim=0)),
    }


def truth(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    P = weights(q, k, causal)
    return P / P.sum(-1, keepdim=True) @ v


def error_rows(data: dict[str, list[QKV]]) -> list[dict[str, object]]:
    """Every variant on every input, the mean over its samples; a model's inputs are causal."""
    results: list[dict[str, object]] = []
    for name, samples in data.items():
        causal = name == "model"
        wanted = [truth(*qkv, causal) for qkv in samples]
        for variant, function in VARIANTS.items():
            found = [errors(function(*qkv, causal), want) for qkv, want in zip(samples, wanted, strict=True)]
            mean = {key: float(f"{statistics.fmean(one[key] for one in found):.5g}") for key in found[0]}
            results.append({"tokens": samples[0][0].shape[2], "input": name, "variant": variant, **mean})
            print(f"{name:9s} {variant:40s} {mean}", file=sys.stderr)
    return results


def error_limits(results: list[dict[str, object]]) -> list[dict[str, object]]:
    """What full INT8 may err at most, from the FP8 rows of the same inputs."""
    of = {(row["input"], row["variant"]): row for row in results}
    limits = []
    for name, smaller in SMALLER.items():
        ours = of[name, "full INT8, ours"]
        e5m2, e4m3 = (
            of[name, f"FP8 {kind} (simulated)"] for kind in ("e5m2, unscaled cast", "e4m3, a scale per head")
        )
        for what, peer, allowed, key in (
            (f"MRE, {smaller:.0%} below e5m2", e5m2, 1 - smaller, "mre_percent"),
            ("relative L2, below e4m3 with scales", e4m3, 1.0, "relative_l2_percent"),
        ):
            found, bound = (float(side[key]) for side in (ours, peer))  # type: ignore[arg-type]
            limits.append(limit(f"{name}: {what}", found, allowed * bound, unit="percent"))
            print(line(limits[-1]), file=sys.stderr)
    return limits


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="inputs per error, averaged (default: %(default)s)"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="also the errors on this model's own numbers"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384], metavar="N",
        help="prompts of the speed part; none skips it",
    )  # fmt: skip
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128], metavar="H")
    parser.add_argument(
        "--context",
        type=int,
        nargs="*",
        default=[8192, 32768],
        metavar="N",
        help="of decoding; none skips it",
    )
    parser.add_argument("--pairs", type=int, default=9, help="of each comparison (default: %(default)s)")
    parser.add_argument(
        "--only", choices=PARTS, nargs="+", default=PARTS, metavar="PART",
        help=f"of {', '.join(PARTS)}; the others stay in the result file as they are (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="begin no round of prompts later; the same command goes on"
    )
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/int8-attention-CPU.json")
    options = parser.parse_args()
    out = options.out or result_file("int8-attention")
    dirty = is_dirty("native", "src/sateen/ops", "src/sateen/engine", *SCRIPTS)
    rounds = _int8_prefill.Rounds(ROUNDS, revision(), is_dirty=dirty)
    speed = {"prefill": options.tokens, "decode": options.context, "steps": options.context and options.model}
    if any(speed[part] for part in speed if part in options.only) and not rounds.tested:
        tests = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *TESTS], capture_output=True, cwd=ROOT, check=False
        )
        if tests.returncode:
            print("int8_attention.py: the kernels' tests fail, so their speed means nothing", file=sys.stderr)
            return 1
        rounds.tested = True
        rounds.save()
    document = HEADER | {
        "hardware": {**hardware(), "threads": torch.get_num_threads(), "isa": native().current_isa()},
        "versions": versions(),
        "heads": HEADS,
        "head_dim": CHANNELS,
    }
    old = json.loads(out.read_text()) if out.is_file() else {}
    measured = {"command": f"sateen bench int8-attention {' '.join(sys.argv[1:])}".strip()}
    measured |= {"revision": revision(), "is_dirty": dirty}
    if len(options.only) == len(PARTS):
        document |= measured
    elif old.get("hardware", {}).get("cpu") == document["hardware"]["cpu"]:
        document = old | document
    for part in options.only:
        found = measure(part, options, rounds)
        for name, rows in found.items():
            document[name] = merged(document.get(name, []), rows) if name in ("prefill", "decode") else rows
        document.setdefault("parts", {})[part] = measured
    publish(document, out)
    return 0


def measure(part: str, options: argparse.Namespace, rounds: _int8_prefill.Rounds) -> dict[str, Any]:
    """The entries of one part of `PARTS` in the result file."""
    if part == "prefill":
        rows = _int8_prefill.prefill(options.tokens, options.channels, options.pairs, rounds, options.seconds)
        return {"prefill": rows}
    if part == "decode":
        return {"decode": _int8_speed.decode(options.context, options.pairs)}
    if part == "steps":
        return {"whole_steps": _int8_speed.whole_steps(options.model, options.context, options.pairs)}
    if part == "quality":
        return {"quality": _int8_quality.quality(options.model)}
    data = {
        name: [make(TOKENS, torch.Generator().manual_seed(seed)) for seed in range(options.seeds)]
        for name, (_, make) in INPUTS.items()
    }
    inputs = {name: words for name, (words, _) in INPUTS.items()}
    if options.model:
        data["model"] = captured(options.model)
        inputs["model"] = f"{CAPTURED_LAYERS} layers of {options.model.name}, causal"
    errors = error_rows(data)
    return {"inputs": inputs, "errors": errors, "limits": error_limits(errors)}


def merged(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and the old ones of other comparisons; by channels, then by tokens or heads."""

    def key(one: dict[str, Any]) -> tuple[str, str, str]:
        return one["what"], one["ours"]["name"], one["peer"]["name"]

    rows = {key(one): one for one in old} | {key(one): one for one in new}
    return sorted(
        rows.values(), key=lambda one: [int(word) for word in re.findall(r"\d+", one["what"])][::-2]
    )


if __name__ == "__main__":
    sys.exit(main())
