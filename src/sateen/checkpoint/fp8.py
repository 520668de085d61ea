"""Block-quantised FP8 weights: codes of float8_e4m3fn with one float32 scale per block of rows and columns.

A weight `<name>` has its scales in `<name>_scale_inv`; the real number is code times scale. Blocks are 128 x
128, except where a file has more scale rows than that gives: the key projection of MiMo-V2-Flash's global
layers has 8 for 768 rows. Three readings of it exist; `choose_rows` lets the codes decide. Shape letters: R
rows, C columns, r and c rows and columns of scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sateen.errors import CheckpointError

BLOCK = 128
DTYPE = torch.bfloat16  # what weights become where nobody says: their activations' dtype in the release
SUFFIX = "_scale_inv"
LARGEST = 448.0  # of float8_e4m3fn: what the largest weight of a block is coded as
LEAST_SHARE = 0.98  # of blocks that must reach it before a reading is believed (source: ours)


def is_fp8(raw: Mapping[str, Any], origin: str) -> bool:
    """Whether a config.json says that weights are stored as FP8 blocks of the kind read here.

    Raises:
        CheckpointError: they are FP8 of another kind.
    """
    table = raw.get("quantization_config")
    if not isinstance(table, Mapping) or table.get("quant_method") != "fp8":
        return False
    block, form = table.get("weight_block_size"), table.get("fmt", "e4m3")
    if block is None or list(block) != [BLOCK, BLOCK] or form != "e4m3":
        raise CheckpointError(
            f"{origin}: quantization_config: FP8 weights with weight_block_size {block} and fmt {form!r} are "
            f"not readable; readable: [{BLOCK}, {BLOCK}] and 'e4m3'"
        )
    return True


def check_shapes(
    name: str, codes_shape: Sequence[int], scale_shape: Sequence[int], head_dim: int | None
) -> None:
    """Refuses scales whose number does not fit the weight of this name.

    Raises:
        CheckpointError: they do not.
    """
    rows, columns = codes_shape
    if len(scale_shape) != 2 or scale_shape[1] != -(-columns // BLOCK):
        raise CheckpointError(
            f"{name}: FP8 scales are {tuple(scale_shape)} for a weight of {tuple(codes_shape)}; "
            f"{columns} columns need {-(-columns // BLOCK)}"
        )
    row_readings(name, rows, scale_shape[0], head_dim)


def row_readings(
    name: str, num_rows: int, num_scale_rows: int, head_dim: int | None = None
) -> dict[str, Tensor]:
    """The ways to assign scale rows to weight rows, by name; int64 [R] each.

    `block`: every 128 rows, scale rows beyond the last block unused. `head`: the count restarts at every head
    of `head_dim` rows, as a file does that was written from one shard per head. `even`: equal shares.

    Raises:
        CheckpointError: no reading has this number of scale rows.
    """
    row = torch.arange(num_rows)
    readings = {}
    blocks = -(-num_rows // BLOCK)
    if num_scale_rows >= blocks:
        readings["block"] = row // BLOCK
    if head_dim is not None and num_rows % head_dim == 0 and num_scale_rows > blocks:
        per_head = -(-head_dim // BLOCK)
        if per_head * (num_rows // head_dim) == num_scale_rows:
            readings["head"] = row // head_dim * per_head + row % head_dim // BLOCK
    if num_scale_rows > blocks and num_rows % num_scale_rows == 0:
        readings["even"] = row // (num_rows // num_scale_rows)
    if not readings:
        raise CheckpointError(
            f"{name}: {num_rows} rows have {num_scale_rows} rows of FP8 scales; blocks of {BLOCK} need "
            f"{blocks}"
        )
    return readings


def choose_rows(name: str, codes_RC: Tensor, num_scale_rows: int, head_dim: int | None = None) -> Tensor:
    """The reading that the codes speak for, int64 [R].

    Each block was scaled so that its largest weight has the largest code. A reading that cuts blocks apart
    makes parts without that weight, so it falls short; one that joins blocks does not. Hence the finest
    reading in which the blocks reach the largest code is the file's.

    Raises:
        CheckpointError: the codes speak for none, or for two alike.
    """
    readings = row_readings(name, codes_RC.shape[0], num_scale_rows, head_dim)
    if len(readings) == 1:
        return next(iter(readings.values()))
    shares = {name: _full_share(codes_RC, rows_R) for name, rows_R in readings.items()}
    full = [name for name in readings if shares[name] >= LEAST_SHARE]
    finest = max((int(readings[name].max()) for name in full), default=-1)
    chosen = [name for name in full if int(readings[name].max()) == finest]
    if len(chosen) != 1:
        listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        raise CheckpointError(
            f"{name}: {num_scale_rows} rows of FP8 scales for {codes_RC.shape[0]} rows can be read in "
            f"several ways and the codes do not tell which (blocks with a largest code: {listed}); "
            "dequantise the file with its vendor's tool"
        )
    return readings[chosen[0]]


def _full_share(codes_RC: Tensor, rows_R: Tensor) -> float:
    """The share of blocks in which some code is the largest one."""
    size_RC = codes_RC.float().abs()
    padded = torch.nn.functional.pad(size_RC, (0, -size_RC.shape[1] % BLOCK))
    columns_Rc = padded.view(len(rows_R), -1, BLOCK).amax(-1)
    index_Rc = rows_R[:, None].expand_as(columns_Rc)
    top_rc = columns_Rc.new_zeros(int(rows_R.max()) + 1, columns_Rc.shape[1])
    top_rc.scatter_reduce_(0, index_Rc, columns_Rc, "amax")
    coded = top_rc[top_rc > 0]  # a block of zeros says nothing
    return float((coded == LARGEST).float().mean()) if len(coded) else 0.0


def dequantize(
    name: str, codes_RC: Tensor, scale_rc: Tensor, dtype: torch.dtype, *, head_dim: int | None = None
) -> Tensor:
    """The real weights [R, C] in `dtype`.

    Args:
        name: of the weight in its file; errors begin with it.
        codes_RC: float8_e4m3fn.
        scale_rc: float scales; a block's real numbers are its codes times its scale.
        dtype: of the result; the product is formed in float32.
        head_dim: rows of one head, where the weight is a projection of heads.

    Raises:
        CheckpointError: another dtype of codes, scales that are not finite and positive, or a number of them
            that does not fit.
    """
    if codes_RC.ndim != 2 or codes_RC.dtype != torch.float8_e4m3fn:
        raise CheckpointError(
            f"{name}: FP8 weights are float8_e4m3fn matrices; got {codes_RC.dtype} {tuple(codes_RC.shape)}"
        )
    check_shapes(name, codes_RC.shape, scale_rc.shape, head_dim)
    rows_R = choose_rows(name, codes_RC, scale_rc.shape[0], head_dim)
    scale_rc = scale_rc.float()
    if not bool((scale_rc[rows_R.unique()] > 0).all()) or not bool(scale_rc.isfinite().all()):
        raise CheckpointError(
            f"{name}: FP8 scales must be finite and above 0; the file is damaged: fetch it again"
        )
    scale_RC = scale_rc[rows_R].repeat_interleave(BLOCK, 1)[:, : codes_RC.shape[1]]
    return (codes_RC.float() * scale_RC).to(dtype)
