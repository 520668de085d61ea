"""Which numbers the matmuls of a training step use.

`float32` is plain. `bfloat16` is torch's autocast, except on CPUs without bfloat16 instructions: there
torch's bfloat16 product measured four to five times slower than its float32 one, so linear layers round their
operands to bfloat16 and multiply them in float32. A product of two bfloat16 numbers is exact in float32 and
both ways sum in float32, so the values are the same up to the order of the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

log = logging.getLogger("sateen.train")


@contextmanager
def matmul_dtype(device: str, dtype: torch.dtype) -> Iterator[None]:
    """A context in which the matmuls of linear layers run in `dtype`; parameters keep theirs."""
    if dtype == torch.float32:
        yield
        return
    with torch.autocast(device, dtype):
        if device == "cpu" and dtype == torch.bfloat16 and not has_bfloat16_matmul():
            with _RoundedLinear():
                yield
        else:
            yield


@cache
def has_bfloat16_matmul() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware: AVX512-BF16, AMX or Arm's BFMMLA."""
    is_native = (
        torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2", "DEFAULT")
        or torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported()
    )
    if not is_native:
        log.info("bfloat16: this CPU has no bfloat16 matmul; operands are rounded and multiplied in float32")
    return is_native


class _RoundedLinear(TorchFunctionMode):
    """Takes over `linear` while autocast is on; everything else passes."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and torch.is_autocast_enabled("cpu") and not kwargs:
            return _Linear.apply(*args, *([None] * (3 - len(args))))  # type: ignore[no-untyped-call]
        return function(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        x16, w16 = x.bfloat16(), w.bfloat16()
        ctx.save_for_backward(x16, w16)
        ctx.dtypes = x.dtype, w.dtype, None if bias is None else bias.dtype
        return F.linear(
            x16.float(), w16.float(), None if bias is None else bias.bfloat16().float()
        ).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x16, w16 = ctx.saved_tensors
        x_dtype, w_dtype, bias_dtype = ctx.dtypes
        wide = grad.float()
        dx = (wide @ w16.float()).to(x_dtype) if ctx.needs_input_grad[0] else None
        rows = wide.flatten(0, -2)
        dw = (rows.T @ x16.float().flatten(0, -2)).to(w_dtype) if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0).to(bias_dtype) if ctx.needs_input_grad[2] else None
