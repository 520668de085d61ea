"""The speed part of `int8_attention.py`: decoding beside a bfloat16 cache. Prompts are in `_int8_prefill.py`.

Both sides of a pair start from the same float tensors in their own dtype and layout; quantisation counts.
Times are processor milliseconds of all threads, which say more than the clock where others use the machine.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _pairs import interleave, line, ratios, row
from torch.nn import functional as F

from sateen import ops
from sateen.checkpoint.hf import load_model
from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.native.step import NativeStep
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.nn.attention import LayerLinks

DECODE_BAR, BANDWIDTH_BAR = 1.5, 0.7
READ_BYTES = 256 << 20  # far more than a cache holds
# query heads, key/value heads, channels
DECODE_SHAPES = [(8, 8, 64), (9, 3, 64), (32, 8, 128)]


def seconds(run: Callable[[], object]) -> Callable[[int], float]:
    """A side of `interleave`: processor milliseconds of a round."""

    def once(_: int) -> float:
        began = time.process_time()
        run()
        return (time.process_time() - began) * 1e3

    return once


def show(found: dict[str, Any]) -> dict[str, Any]:
    print(line(found), file=sys.stderr, flush=True)
    return found


def cached_step(model: Decoder, context: int, dtype: torch.dtype) -> Callable[[], object]:
    """A native decode step of one token behind `context` random rows; int8 rows meet integer attention."""
    layouts = model.config.kv_layouts()[: model.config.num_hidden_layers]
    cache = KVCache(
        layouts, num_trunk_layers=len(layouts), num_slots=1, max_model_len=context + 1,
        num_pages=context // 64 + 1, dtype=dtype, attention="int8" if dtype == torch.int8 else "auto",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for pool in cache.pools.values():
        for rows in (pool.k_RKH, pool.v_RKV):
            if dtype == torch.int8:
                rows.random_(-127, 128, generator=generator)
            else:
                rows.normal_(generator=generator)
        for scale in pool.scales[:2] if pool.scales is not None else ():
            scale.fill_(1 / 73)
    entry = cache.open()
    assert cache.reserve(entry, context + 1)
    step = NativeStep(model, cache)

    def run() -> object:
        entry.length = context
        return step.trunk([1], cache.forward([entry], [1]), LayerLinks())

    return run


def attention_model(N: int, K: int, H: int, context: int) -> Decoder:
    """A model of so many layers that their bfloat16 rows fill READ_BYTES, with matrices far smaller.

    Its step is attention over rows that no cache of the processor holds; what Python does is a small part,
    and so are products with matrices of one vector of bfloat16 per row.
    """
    config = ModelConfig.from_hf(
        {
            "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": -(-READ_BYTES // (context * K * 4 * H)), "num_attention_heads": N,
            "num_key_value_heads": K, "head_dim": H, "max_position_embeddings": 1 << 17, "rms_norm_eps": 1e-5,
            "rope_theta": 1e5, "hidden_act": "silu", "tie_word_embeddings": True,
        }
    )  # fmt: skip
    return Decoder(config).to(torch.bfloat16).eval()


def int8_step(N: int, K: int, H: int, context: int) -> Callable[[], object]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(rows, heads, H, generator=generator)
        for rows, heads in ((1, N), (context, K), (context, K))
    )
    (k8, k_scale), (v8, v_scale) = ops.quantize_int8(k), ops.quantize_int8(v)
    rows = ops.Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), torch.zeros(1, K, H))
    cu_q, cu_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, context], dtype=torch.int32)
    return lambda: ops.int8_rows_attention(q, rows, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def sdpa_step(N: int, K: int, H: int, context: int) -> Callable[[], object]:
    q, k, v = (
        torch.randn(1, heads, rows, H).bfloat16() for heads, rows in ((N, 1), (K, context), (K, context))
    )
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=N != K)


@torch.inference_mode()
def decode(contexts: list[int], pairs: int) -> list[dict[str, Any]]:
    """Rows of one new token over int8 rows against the same over bfloat16 rows, with the bytes both read.

    Of the native step it is the time per layer, see `attention_model`.
    """
    # As the cache's pools lie: numpy asks for huge pages where there is much to store.
    memory = torch.from_numpy(np.zeros(READ_BYTES // 8, dtype=np.int64)).fill_(1)
    rows = []
    for N, K, H in DECODE_SHAPES:
        for context in contexts:
            model = attention_model(N, K, H, context)
            layers = model.config.num_hidden_layers
            sides = {
                "int8 rows": int8_step(N, K, H, context),
                "native step, int8 rows": cached_step(model, context, torch.int8),
                "native step, bfloat16 rows": cached_step(model, context, torch.bfloat16),
                "sdpa bfloat16": sdpa_step(N, K, H, context),
                "memory": memory.sum,
            }
            times = interleave({name: seconds(run) for name, run in sides.items()}, pairs, warmup=2)
            for name in ("native step, int8 rows", "native step, bfloat16 rows"):
                times[name] = [ms / layers for ms in times[name]]
            size = dict.fromkeys(("int8 rows", "native step, int8 rows"), context * K * (2 * H + 8))
            size["memory"] = READ_BYTES
            rates: dict[str, list[float]] = {
                name: [size.get(name, context * K * 4 * H) / ms / 1e6 for ms in found]
                for name, found in times.items()
            }
            middle = {name: sorted(rate)[len(rate) // 2] for name, rate in rates.items()}
            for ours, peer, bar in (
                ("native step, int8 rows", "native step, bfloat16 rows", DECODE_BAR),
                ("native step, int8 rows", "int8 rows", None),
                ("int8 rows", "sdpa bfloat16", None),
            ):
                rows.append(
                    show(
                        row(
                            f"one token after {context}, {N} query and {K} key/value heads of {H}",
                            (ours, times[ours]), (peer, times[peer]), unit="ms", bar=bar,
                            ratio=ratios(times[peer], times[ours]),
                            gb_per_s={name: round(middle[name], 2) for name in (ours, peer, "memory")},
                        )
                    )
                )  # fmt: skip
            share = {
                name: f"{middle[name]:.1f} GB/s, {middle[name] / middle['memory']:.0%}" for name in middle
            }
            print(f"    {share}", file=sys.stderr, flush=True)
    return rows


@torch.inference_mode()
def whole_steps(path: Path | None, contexts: list[int], pairs: int) -> list[dict[str, Any]]:
    """Whole steps of a model in bfloat16, over int8 and over bfloat16 rows; none without a model."""
    if path is None:
        return []
    model = load_model(path, dtype="bfloat16").eval()
    rows = []
    for context in contexts:
        sides = {
            f"{words} rows": cached_step(model, context, dtype)
            for words, dtype in (("int8", torch.int8), ("bfloat16", torch.bfloat16))
        }
        times = interleave({name: seconds(run) for name, run in sides.items()}, pairs, warmup=2)
        ratio = ratios(times["bfloat16 rows"], times["int8 rows"])
        ours, peer = (("int8 rows", times["int8 rows"]), ("bfloat16 rows", times["bfloat16 rows"]))
        rows.append(show(row(f"a step of {path.name} after {context}", ours, peer, unit="ms", ratio=ratio)))
    return rows
