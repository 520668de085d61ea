"""Are the Triton kernels right on this device? What `gpu_kernels.py` asks before it measures anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sateen import ops
from sateen.ops.int8_attention import Int8Rows, quantize_int8

Check = dict[str, Any]


def offsets(lengths: list[int], device: str) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def random_lists(K: int, T: int, S: int, block_size: int, n: int, device: str, share: int = 1) -> Tensor:
    """Lists [K, T, n]: the query's own block, the first block, others at random; `share` queries agree."""
    generator = torch.Generator(device=device).manual_seed(0)
    own = torch.arange(S - T, S, device=device) // block_size
    rows = -(-T // share)
    drawn = torch.rand(K, rows, n, generator=generator, device=device).repeat_interleave(share, 1)[:, :T]
    shared = own[::share].repeat_interleave(share)[:T]  # where the first of those that agree stands
    idx = (drawn * (shared + 1)[:, None]).int()
    idx[..., 0], idx[..., -1] = 0, own
    idx = idx.sort(-1).values
    repeated = torch.zeros_like(idx, dtype=torch.bool)
    repeated[..., 1:] = idx[..., 1:] == idx[..., :-1]  # blocks of a list are distinct
    return idx.masked_fill(repeated, -1)


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def _check(name: str, error: float, allowed: float) -> Check:
    return {"what": name, "relative_l2": error, "allowed": allowed, "is_right": error <= allowed}


def block_sparse(device: str, length: int) -> list[Check]:
    """Output and gradients against the reference in float64, forward in parts as in decoding included."""
    checks = []
    generator = torch.Generator(device=device).manual_seed(0)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        for N, K, H, V, block_size, n in ((8, 2, 128, 128, 64, 4), (16, 1, 192, 128, 1, 40)):
            lengths = [length, 3, length // 2 + 1]
            T = sum(lengths)
            shapes = (T, N, H), (T, K, H), (T, K, V), (T, N, V)
            *leaves, d_out = (
                torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes
            )
            sink = torch.linspace(-1, 2, N, device=device)
            idx = torch.cat([random_lists(K, t, t, block_size, n, device) for t in lengths], 1)
            cu, results = offsets(lengths, device), []
            for backend, wide in (("triton", dtype), ("reference", torch.float64)):
                inputs = [x.detach().to(wide).requires_grad_() for x in (*leaves, sink)]
                out = ops.block_sparse_attention(
                    *inputs[:3],
                    idx,
                    block_size=block_size,
                    cu_seqlens_q=cu,
                    sink_N=inputs[3],
                    backend=backend,
                )
                out.backward(d_out.to(wide))
                results.append([out.detach(), *(x.grad for x in inputs)])
            for name, got, want in zip(("out", "d_q", "d_k", "d_v", "d_sink"), *results, strict=True):
                what = (
                    f"block_sparse_attention {name}, {dtype}, {N}/{K} heads {H}/{V}, blocks of {block_size}"
                )
                checks.append(_check(what, gap(got, want), allowed))
    for S, queries in ((8 * length, 1), (4 * length, 5)):
        q = torch.randn(queries, 8, 64, generator=generator, device=device)
        k, v = (torch.randn(S, 2, 64, generator=generator, device=device) for _ in range(2))
        idx = random_lists(2, queries, S, 16, 64, device)
        settings = {
            "block_size": 16,
            "cu_seqlens_q": offsets([queries], device),
            "cu_seqlens_k": offsets([S], device),
        }
        got = ops.block_sparse_attention(q, k, v, idx, backend="triton", **settings)
        want = ops.block_sparse_attention(
            *(x.double() for x in (q, k, v)), idx, backend="reference", **settings
        )
        checks.append(_check(f"block_sparse_attention, {queries} queries, {S} keys", gap(got, want), 1e-5))
    return checks


def int8(device: str, length: int) -> list[Check]:
    """The gates of tests/ops/test_int8_attention.py against float64 attention, and cached rows."""
    checks = []
    generator = torch.Generator(device=device).manual_seed(0)
    paper = {"smooth_k": False, "p_bits": "s8", "v_granularity": "head", "row_sum": "int8"}
    for H, V in ((64, 64), (128, 128), (192, 128)):
        q, k, v = (
            torch.randn(1, heads, length, width, generator=generator, device=device)
            for heads, width in ((4, H), (2, H), (2, V))
        )
        wide = [x.double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
        for causal in (False, True):
            want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=causal)
            for name, options, allowed in (
                ("ours", {}, 0.025),
                ("ours, blocks of 128", {"block_size": 128}, 0.025),
                ("paper", paper, 0.04),
                ("half", {"pv": "float"}, 0.013),
            ):
                got = ops.int8_sdpa(q, k, v, causal=causal, backend="triton", **options)
                what = f"int8_attention, {name}, heads {H}/{V}, {'causal' if causal else 'no mask'}"
                checks.append(_check(what, gap(got, want), allowed))
    lengths_k = [8 * length, 5, length]
    S, B = sum(lengths_k), len(lengths_k)
    q = torch.randn(B, 8, 128, generator=generator, device=device)
    k, v = (torch.randn(S, 2, 128, generator=generator, device=device) for _ in range(2))
    (k8, k_scale), (v8, v_scale) = quantize_int8(k), quantize_int8(v)
    mean = torch.zeros(B, 2, 128, device=device)
    rows = Int8Rows(k8, k_scale.squeeze(-1), v8, v_scale.squeeze(-1), mean)
    cu = {"cu_seqlens_q": offsets([1] * B, device), "cu_seqlens_k": offsets(lengths_k, device)}
    for window in (None, 100):
        got, want = (
            ops.int8_rows_attention(q, rows, window=window, backend=backend, **cu)
            for backend in ("triton", "reference")
        )
        checks.append(_check(f"int8_rows_attention, window {window}", gap(got, want), 1e-3))  # type: ignore[arg-type]
    return checks
