"""What every attention over packed sequences asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from sateen.errors import ShapeError


def check_packed(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    window: int | None = None,
    sink: Tensor | None = None,
) -> str:
    """Refuses tensors that do not fit together; returns their shapes in words, for further checks.

    Raises:
        ShapeError: the message begins with `name`, the operator.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 3) or k.shape[:2] != v.shape[:2] or q.shape[2] != k.shape[2]:
        raise ShapeError(f"{name} takes q [T,N,H], k [S,K,H], v [S,K,V]; got {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(f"{name} needs query heads that are a multiple of key/value heads; got {shapes}")
    if window is not None and window < 1:
        raise ShapeError(f"{name} window counts the query's own key, so it is at least 1; got {window}")
    if sink is not None and sink.shape != (q.shape[1],):
        raise ShapeError(f"{name} takes one sink per query head; got {tuple(sink.shape)} for {shapes}")
    # Offsets are read on the CPU only: on other devices the check would wait for the device at every call.
    if not torch.compiler.is_compiling() and cu_q.device.type == "cpu":
        ends = (int(cu_q[-1]), int(cu_k[-1]))
        if ends != (q.shape[0], k.shape[0]) or cu_q.shape != cu_k.shape:
            raise ShapeError(
                f"{name} offsets end at {ends} for {cu_q.numel() - 1} and {cu_k.numel() - 1} sequences; "
                f"got {shapes}"
            )
    return shapes
