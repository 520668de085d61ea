"""Tile sizes in turn, the section `tune` of `gpu_kernels.py`: the fastest belong into `tiles_for`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import _gpu_check as check
import torch

from sateen.ops.spans import cut, stand


def _int8(device: str, T: int, B: int, N: int, H: int, causal: bool) -> dict[str, Callable[[], Any]]:
    from sateen.ops.int8_attention.triton_forward import Tiles, forward
    from sateen.ops.int8_attention.triton_quantize import quantize_keys_and_values

    q, k, v = (torch.randn(B * T, N, H, device=device, dtype=torch.float16) for _ in range(3))
    cu = check.offsets([T] * B, device)
    form: dict[str, Any] = {
        "causal": causal, "scale": H**-0.5, "window": None, "smooth_k": True, "pv": "int8", "levels": 255,
        "v_granularity": "channel", "row_sum": "float",
    }  # fmt: skip

    def run(block: int, tiles: Tiles) -> Callable[[], Any]:
        return lambda: forward(q, k, v, cu, cu, None, block_size=block, tiles=tiles, **form)

    def quantise() -> Any:
        settings: dict[str, Any] = {"smooth_k": True, "has_codes": True, "per_channel": True, "tile": 64}
        return quantize_keys_and_values(k, v, cu, cut(cu, B * T, 64), **settings)

    calls: dict[str, Callable[[], Any]] = {"quantisation of keys and values alone": quantise}
    for block, rows, warps, stages in product((64, 128), (64, 128), (4, 8), (2, 3, 4)):
        calls[f"block {block} rows {rows} warps {warps} stages {stages}"] = run(
            block, Tiles(rows, warps, stages)
        )
    return calls


def _sparse(
    device: str, T: int, N: int, K: int, H: int, size: int, n: int
) -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    from sateen.ops.block_sparse_attention.triton_backward import backward
    from sateen.ops.block_sparse_attention.triton_forward import Tiles, forward

    q, k, v = (torch.randn(T, heads, H, device=device, dtype=torch.bfloat16) for heads in (N, K, K))
    idx, cu = check.random_lists(K, T, T, size, n, device), check.offsets([T], device)
    where = stand(cu, cu, T)
    out, lse = forward(q, k, v, idx, None, where, size, H**-0.5)

    def fore(tiles: Tiles) -> Callable[[], Any]:
        return lambda: forward(q, k, v, idx, None, where, size, H**-0.5, tiles)

    def back(tiles: Tiles) -> Callable[[], Any]:
        return lambda: backward(out, q, k, v, idx, cu, None, where, out, lse, size, H**-0.5, tiles)

    yield (
        "forward",
        {
            f"keys {keys} warps {warps} stages {stages}": fore(Tiles(keys, 64, warps, 8, stages))
            for keys, warps, stages in product((32, 64, 128), (2, 4, 8), (2, 3, 4))
        },
    )
    yield (
        "backward",
        {
            f"keys {keys} rows {rows} warps {warps} kv_warps {kv} stages {stages}": back(
                Tiles(keys, rows, warps, kv, stages)
            )
            for keys, rows, warps, kv, stages in product((32, 64), (32, 64), (4,), (4, 8), (1, 2, 3))
        },
    )


def tune(clock: Any, is_tiny: bool) -> Iterator[dict[str, Any]]:
    """Every tile of a small grid; a tile that does not fit this GPU is a row with an error."""
    for H, causal in product((64, 128), (False, True)):
        T, B, N = (32, 1, 1) if is_tiny else (4096, 4, 32)
        row = {"what": "int8_attention", "tokens": T, "batch": B, "heads": N, "head_dim": H, "causal": causal}
        yield row | {"times": clock.compare(_int8(clock.device, T, B, N, H, causal))}
        if is_tiny:
            break
    for N, K, H, size, n in ((32, 8, 128, 64, 16), (64, 4, 128, 64, 16), (64, 1, 256, 1, 1024)):
        T, n = (4, 2) if is_tiny else (16384 if size > 1 else 4096, n)
        for what, calls in _sparse(clock.device, T, N, K, H, size, n):
            row = {"what": f"block_sparse_attention {what}", "tokens": T, "heads": N, "kv_heads": K}
            yield row | {"head_dim": H, "block_size": size, "blocks": n, "times": clock.compare(calls)}
        if is_tiny:
            break
