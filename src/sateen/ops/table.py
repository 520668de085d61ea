"""`sateen ops`: every operator, its backends best first, and on which devices each one can run here."""

from __future__ import annotations

import json as codec
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

import sateen.ops
from sateen.ops.complex_matmul import PhaseWeight
from sateen.ops.int8_attention import Int8Rows
from sateen.ops.lowbit_matmul import pack_int8
from sateen.ops.op import Op


def _attention(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    offsets = torch.tensor([0, 4], dtype=torch.int32, device=device)
    q, k, v = (torch.zeros(4, heads, 16, device=device) for heads in (2, 1, 1))
    options = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "scale": 0.25, "window": None}
    return (q, k, v), options | {"sink_N": None, "return_lse": False, "block_max": None}


def _grouped_matmul(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x_TD, w_EDF = torch.zeros(3, 4, device=device), torch.zeros(2, 4, 5, device=device)
    return (x_TD, w_EDF, torch.tensor([1, 2], device=device)), {}


def _block_sparse_attention(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (q, k, v), options = _attention(device)
    idx_KTn = torch.zeros(1, 4, 1, dtype=torch.int32, device=device)
    kept = {name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "scale", "sink_N", "return_lse")}
    return (q, k, v, idx_KTn), kept | {"block_size": 2}


def _attention_and_blocks(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    inputs, options = _attention(device)
    kept = {name: options[name] for name in ("cu_seqlens_q", "cu_seqlens_k", "scale", "sink_N")}
    return inputs, kept | {"block_size": 2, "num_blocks": 1, "forced_window": None}


def _int8_attention(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (q, k, v), options = _attention(device)
    return (q, k, v), {key: options[key] for key in ("cu_seqlens_q", "cu_seqlens_k", "scale", "window")}


def _int8_rows_attention(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (q, k, v), options = _attention(device)
    rows = Int8Rows(k.to(torch.int8), k[..., 0], v.to(torch.int8), v[..., 0], k[:1])
    return (q, rows), {key: options[key] for key in ("cu_seqlens_q", "cu_seqlens_k", "scale", "window")}


def _complex_matmul(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, scale = torch.zeros(3, 4, device=device), torch.ones((), device=device)
    weight = PhaseWeight(torch.zeros(2, 4, dtype=torch.uint8, device=device), scale, scale)
    return (x, x, (weight,)), {"conjugate": True, "act": "int8"}


def _lowbit_matmul(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.zeros(3, 4, device=device), pack_int8(torch.ones(2, 4, device=device))), {}


# A small ordinary call of each operator: what its backends are asked whether they can run.
CALLS: dict[str, Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "attention": _attention,
    "attention_and_blocks": _attention_and_blocks,
    "block_sparse_attention": _block_sparse_attention,
    "complex_matmul": _complex_matmul,
    "grouped_matmul": _grouped_matmul,
    "int8_attention": _int8_attention,
    "int8_rows_attention": _int8_rows_attention,
    "lowbit_matmul": _lowbit_matmul,
}


def operators() -> dict[str, Op]:
    """Name -> operator, for every room of `sateen.ops` that holds one."""
    modules = [
        import_module(f"sateen.ops.{m.name}") for m in pkgutil.iter_modules(sateen.ops.__path__) if m.ispkg
    ]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, Op)]
    return {op.name: op for op in found}


def rows() -> list[dict[str, str]]:
    """`{"op", "backend", "device", "status"}` each; the status is `ok` or the reason it cannot run."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        {"op": name, "backend": backend, "device": device, "status": status}
        for name, op in operators().items()
        for device in devices
        for backend, status in _explain(op, device).items()
    ]


def main(*, json: bool = False) -> int:
    """Prints the table, as JSON where asked, and returns the exit code."""
    table = rows()
    if json:
        print(codec.dumps(table, indent=2))
        return 0
    widths = {key: max(len(key), *(len(row[key]) for row in table)) for key in table[0]}
    for row in [{key: key for key in widths}, *table]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    return 0


def _explain(op: Op, device: str) -> dict[str, str]:
    args, options = CALLS[op.name](device)
    return op.explain(*args, **options)
