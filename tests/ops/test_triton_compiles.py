"""Triton kernels are compiled to machine code for GPUs that are not here, as their launchers launch them.

The interpreter accepts what the compiler refuses, such as a variable that changes its shape in a loop, and
knows no limit of shared memory. Triton's wheel holds ptxas, so this needs no CUDA.
"""

from __future__ import annotations

import pytest
import torch

from sateen.ops.int8_attention import Int8Rows
from sateen.ops.spans import stand
from sateen.ops.triton import INTERPRETED

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what one program may have
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.int8: "*i8",
}  # fmt: skip


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Kernel launches compile for `compiled["capability"]` instead, and leave name -> shared bytes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found = {}

    def launch(kernel, *args, grid, warmup, num_warps=4, num_stages=3, **constants):
        names = kernel.arg_names
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for i, (name, x) in enumerate(zip(names, args, strict=False)):
            is_tensor = isinstance(x, torch.Tensor)
            if isinstance(x, int) and x == 1:  # Triton makes such an argument a constant
                constants[name], signature[name] = 1, "constexpr"
                continue
            kind = POINTERS[x.dtype] if is_tensor else "fp32" if isinstance(x, float) else "i32"
            signature[name] = kind
            if is_tensor or (isinstance(x, int) and x % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        assert set(signature) == set(names), f"{kernel.__name__}: arguments and parameters differ"
        source = ASTSource(
            kernel,
            {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            attributes,
        )
        target = GPUTarget("cuda", found["capability"], 32)
        done = triton.compile(
            source, target=target, options={"num_warps": num_warps, "num_stages": num_stages}
        )
        assert len(done.asm["cubin"]) > 1000
        found[kernel.__name__] = done.metadata.shared

    monkeypatch.setattr(JITFunction, "run", launch)
    return found


def some(dtype, *shape):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("capability", "dtype", "H", "V"),
    [(90, torch.bfloat16, 128, 128), pytest.param(80, torch.float32, 256, 256, marks=pytest.mark.slow)],
)
def test_block_sparse_attention(compiled, capability, dtype, H, V):
    from sateen.ops.block_sparse_attention.triton_backward import backward
    from sateen.ops.block_sparse_attention.triton_forward import forward, tiles_for

    compiled["capability"] = capability
    q, k, v = some(dtype, 32, 16, H), some(dtype, 32, 2, H), some(dtype, 32, 2, V)
    idx, cu, sink = (
        some(torch.int32, 2, 32, 16),
        torch.tensor([0, 32], dtype=torch.int32),
        some(torch.float32, 16),
    )
    where = stand(cu, cu, 32)
    forward(q, k, v, idx, sink, where, 64, 0.1, tiles_for(q, v)._replace(parts=4))
    out, lse = forward(q, k, v, idx, sink, where, 64, 0.1)
    backward(out, q, k, v, idx, cu, sink, where, out, lse, 64, 0.1)
    del compiled["capability"]
    assert set(compiled) == {"_forward", "_merge", "_gradient_q", "_gradient_kv"}
    assert max(compiled.values()) <= SHARED_BYTES[capability], compiled


@pytest.mark.parametrize(
    ("capability", "dtype", "H", "V", "block_size", "pv"),
    [
        (90, torch.bfloat16, 64, 64, 64, "int8"),
        pytest.param(90, torch.bfloat16, 128, 128, 64, "int8", marks=pytest.mark.slow),
        pytest.param(80, torch.float32, 256, 200, 64, "float", marks=pytest.mark.slow),
        pytest.param(80, torch.bfloat16, 256, 200, 128, "float", marks=pytest.mark.slow),
    ],
)
def test_int8_attention(compiled, capability, dtype, H, V, block_size, pv):
    from sateen.ops.int8_attention.triton_forward import forward

    compiled["capability"] = capability
    T = 128
    q, k, v = (some(dtype, T, heads, width) for heads, width in ((4, H), (1, H), (1, V)))
    cu, sink = torch.tensor([0, T], dtype=torch.int32), some(torch.float32, 4)
    forward(
        q, k, v, cu, cu, sink, causal=True, scale=0.1, window=None, smooth_k=True, pv=pv, levels=255,
        v_granularity="channel", row_sum="float", block_size=block_size,
    )  # fmt: skip
    del compiled["capability"]
    encoders = {"_survey", "_conclude", "_encode_keys"} | ({"_encode_values"} if pv == "int8" else set())
    assert set(compiled) == {"_forward"} | encoders
    assert max(compiled.values()) <= SHARED_BYTES[capability], compiled


@pytest.mark.parametrize(
    ("capability", "H", "V", "block_size"),
    [(90, 128, 128, 64), pytest.param(80, 256, 256, 128, marks=pytest.mark.slow)],
)
def test_cached_int8_rows(compiled, capability, H, V, block_size):
    from sateen.ops.int8_attention.triton_rows import Tiles, rows_forward

    compiled["capability"] = capability
    scale, cu = some(torch.float32, 600, 2), torch.tensor([0, 600], dtype=torch.int32)
    k8, v8 = some(torch.int8, 600, 2, H), some(torch.int8, 600, 2, V)
    rows = Int8Rows(k8, scale, v8, scale, some(torch.float32, 1, 2, H))
    q, cu_q = some(torch.bfloat16, 1, 8, H), torch.tensor([0, 1], dtype=torch.int32)
    rows_forward(
        q, rows, cu_q, cu, None, scale=0.1, window=None, block_size=block_size, tiles=Tiles(rows=16, parts=4)
    )
    del compiled["capability"]
    assert set(compiled) == {"_forward", "_merge"}
    assert max(compiled.values()) <= SHARED_BYTES[capability], compiled
