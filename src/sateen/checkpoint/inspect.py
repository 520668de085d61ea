"""`sateen inspect MODEL`: what a preset or a directory holds, from headers and small files.

A directory's tensor names and shapes are checked against its config on the way, so a broken one is refused
here as it would be at loading.
"""

from __future__ import annotations

import json as codec
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sateen.checkpoint.file_notes import file_notes
from sateen.checkpoint.gguf import gguf_bytes, is_gguf
from sateen.checkpoint.hf import is_preset, load_model
from sateen.checkpoint.load import check, parameter_entries
from sateen.checkpoint.shards import DTYPES, Files, by_file, resolve, shards
from sateen.models.decoder import Decoder
from sateen.models.inspect import describe
from sateen.models.quant_config import write_quant
from sateen.models.quantize import linear_bytes
from sateen.nn.quant import QuantLinear


def main(model: str, *, context: Sequence[int] = (), kv_dtype: str = "auto", json: bool = False) -> int:
    """Prints the description and returns the exit code.

    Args:
        model: what `load_model` takes.
        context: tokens per sequence to size the cache for; a few usual ones when empty.
        kv_dtype: fp32, bf16, fp16, fp8, int8, or auto for the config's dtype.
        json: print JSON.
    """
    found = inspect(model, context=context, kv_dtype=kv_dtype)
    print(codec.dumps(found, indent=2) if json else "\n".join(lines(found)))
    return 0


def inspect(model: str | Path, *, context: Sequence[int] = (), kv_dtype: str = "auto") -> dict[str, Any]:
    """`models.inspect.describe`, `weight_bytes`: dtype -> bytes as stored (presets: as float32), and `quant`.

    What the files of a directory add stands first among the `traps`. `quant` is None, or the method, its
    settings and what its linear layers hold: `layers`, `weights` (real parameters) and `bytes` as stored.
    """
    stored = None if is_preset(model) else check(resolve(model))
    if stored is None:
        built = load_model(model, device="meta")
        tensors = {id(tensor): tensor for tensor in built.state_dict(keep_vars=True).values()}
        weights = {"F32": sum(tensor.numel() for tensor in tensors.values()) * DTYPES["F32"].itemsize}
    else:
        built = stored.model.eval()
        built.source = stored.folder
        weights = stored_bytes(stored.folder)
    found = describe(built, contexts=context, kv_dtype=kv_dtype)
    if stored is not None:
        found["traps"] = file_notes(stored) + found["traps"]
    return {"model": str(model)} | found | {"weight_bytes": weights, "quant": _quant(built)}


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of a directory's tensors by their stored dtype, from the headers of its files."""
    total: dict[str, int] = {}
    for dtype, size in _tensor_bytes(folder).values():
        total[dtype] = total.get(dtype, 0) + size
    return total


def _tensor_bytes(folder: Path) -> dict[str, tuple[str, int]]:
    """Tensor name -> its stored dtype and bytes."""
    if is_gguf(folder):
        return gguf_bytes(folder)
    found: dict[str, tuple[str, int]] = {}
    where = shards(folder)
    files = Files(where)
    for name in (name for names in by_file(where).values() for name in names):
        dtype, shape = files.describe(name)
        found[name] = dtype, math.prod(shape) * DTYPES[dtype].itemsize
    return found


def _quant(built: Decoder) -> dict[str, Any] | None:
    spec = built.config.quant
    if spec is None:
        return None
    found = write_quant(spec) | linear_bytes(built)
    if built.source is not None:
        # Built without data, masters do not know their stored dtype; the files do.
        sizes = _tensor_bytes(built.source)
        layers = {name for name, module in built.named_modules() if isinstance(module, QuantLinear)}
        found["bytes"] = sum(
            sizes[entry.name][1]
            for name, _, entry in parameter_entries(built)
            if name.rpartition(".")[0] in layers and not name.endswith(".bias")
        )
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """The description as text."""
    counts, weights = found["parameters"], found["weight_bytes"]
    kinds = ", ".join(f"{_bytes(size)} {dtype}" for dtype, size in weights.items())
    out = [
        f"{found['model']}: {found['model_type']}, {found['num_hidden_layers']} layers, hidden size "
        f"{found['hidden_size']}, vocabulary {found['vocab_size']}, "
        f"up to {found['max_position_embeddings']} tokens",
        found["in_words"],
        "",
        *_table(
            [
                "layers",
                "count",
                "attention",
                "q/kv heads",
                "qk/v dims",
                "window",
                "sink",
                "base",
                "rotary",
                "mlp",
            ],
            [[row["layers"], str(row["count"]), *_layer_cells(row)] for row in _layer_rows(found)],
        ),
        "",
        f"parameters  {_billions(counts['total'])}, of which {_billions(counts['active'])} active per token"
        + (f"; MTP heads {_billions(counts['mtp'])}" if counts["mtp"] else ""),
        f"weights     {_bytes(sum(weights.values()))} ({kinds})",
        *([] if found["quant"] is None else [_quant_line(found["quant"])]),
        "",
        f"cache of one sequence in {found['kv_dtype']}; a ring layer holds its window and no more",
        *_table(
            ["layer kind", "layers", "per cached token and layer"],
            [
                [row["layer_kind"], str(row["num_layers"]), _bytes(row["bytes"])]
                for row in found["kv_bytes_per_token"]
            ],
        ),
        *_table(
            ["context", "trunk", "MTP heads", "all layers full", "ratio"],
            [
                [
                    str(row["context"]),
                    _bytes(row["bytes"]),
                    _bytes(row["mtp_bytes"]),
                    "-" if row["all_full_bytes"] is None else _bytes(row["all_full_bytes"]),
                    "-" if row["ratio"] is None else f"{row['ratio']:.2f}x",
                ]
                for row in found["kv"]
            ],
        ),
    ]
    return out + (["", *(f"note: {trap}" for trap in found["traps"])] if found["traps"] else [])


def _quant_line(quant: dict[str, Any]) -> str:
    stages = f", {quant['stages']} stages" if quant["stages"] > 1 else ""
    form = "packed" if quant["packed"] else "masters"
    return (
        f"two-bit     {quant['quant_method']}{stages}, {quant['activations']} activations, {form}: "
        f"{quant['layers']} layers with {_billions(quant['weights'])} weights in {_bytes(quant['bytes'])}, "
        f"{8 * quant['bytes'] / quant['weights']:.2f} bits each"
    )


def _layer_rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    heads = [found["mtp"] | {"layers": "MTP", "count": found["mtp"]["num_heads"]}] if found["mtp"] else []
    return [*found["layers"], *heads]


def _layer_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["attention"],
        f"{row['num_attention_heads']}/{row['num_key_value_heads']}",
        f"{row['head_dim']}/{row['v_head_dim']}",
        "-" if row["window"] is None else str(row["window"]),
        "yes" if row["has_sink"] else "-",
        f"{row['rope_theta']:g}",
        str(row["rotary_dim"]),
        row["mlp"],
    ]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows])
    return ["  ".join(cells).rstrip() for cells in padded]


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _bytes(size: int) -> str:
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.2f} {unit}"
    return f"{size} B"
