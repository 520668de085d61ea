"""Tensors [tokens, heads, channels] as the compiled kernels read them: one format, contiguous channels."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

# As `Format` in native/linear.h numbers them.
_FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def format_of(x: Tensor) -> int:
    """The kernels' number of this dtype, one of float32, bfloat16 and float16."""
    return _FORMATS[x.dtype]


def number_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one format, float32 where their dtypes differ, with contiguous channels."""
    same = len({x.dtype for x in tensors}) == 1 and tensors[0].dtype in _FORMATS
    found = tensors if same else tuple(x.float() for x in tensors)
    return tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in found)


def number_array(x: Tensor) -> NDArray[Any]:
    """The same memory as numpy sees it; 16-bit numbers as integers, because numpy has no bfloat16."""
    x = x.detach()
    return (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()


def array(x: Tensor | None) -> NDArray[Any] | None:
    """The same memory as numpy sees it: its buffer protocol costs a fifth of torch's DLPack call."""
    return None if x is None else x.detach().numpy()
