"""The door to Triton: whether its kernels can run, and where they stand among an operator's backends.

Kernels stand in modules of their own, imported by the first call, so that importing sateen needs no Triton.
With `TRITON_INTERPRET=1` in the environment they run on the CPU, step by step in Python, which is for tests:
`auto` does not choose them then.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Above every other backend where the kernels are compiled, below the reference where they are interpreted.
PRIORITY = -1 if INTERPRETED else 30


def triton_available(x: Tensor) -> str | None:
    """None where Triton kernels can run on this tensor, otherwise the reason why not."""
    if find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if x.device.type == "cuda" or INTERPRETED:
        return None
    return f"it runs on CUDA and the tensors are on {x.device.type}; TRITON_INTERPRET=1 interprets it here"


def readable(x: Tensor) -> Tensor:
    """`x` with contiguous last dimension, as kernels read it; a copy only where needed."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def dot_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of what matrix products read; the interpreter has no products of bfloat16 numbers."""
    import triton.language as tl

    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
