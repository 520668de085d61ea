"""Block-quantised FP8 weights: codes of float8_e4m3fn with one float32 scale per block of rows and columns.

The real number is code times scale. Blocks are 128 x 128, except where a file has more scale rows than that
gives: the key projection of MiMo-V2-Flash's global layers has 8 for 768 rows. Three readings of it exist;
`choose_reading` lets the codes decide. Shape letters: R rows, C columns, r and c rows and columns of scales,
S rows of a strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sateen.errors import CheckpointError

BLOCK = 128
DTYPE = torch.bfloat16  # what weights become where nobody says: their activations' dtype in the release
LARGEST = 448.0  # of float8_e4m3fn: what the largest weight of a block is coded as
STRIP = 2**18  # numbers whose float32 product is held at a time
LEAST_SHARE = 0.98  # of blocks that must reach it before a reading is believed (source: ours)


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


class Tiling(NamedTuple):
    """How weight rows share scales: `step` rows each, counted anew every `period` rows."""

    period: int
    step: int

    def rows(self, num_rows: int, device: torch.device) -> Tensor:
        """The scale row of each weight row, int64 [R]."""
        row_R = torch.arange(num_rows, device=device)
        return row_R // self.period * -(-self.period // self.step) + row_R % self.period // self.step


def row_readings(
    name: str, num_rows: int, num_scale_rows: int, head_dim: int | None = None
) -> dict[str, Tiling]:
    """The ways to assign scale rows to weight rows, by name.

    `block`: every 128 rows, scale rows beyond the last block unused. `head`: the count restarts at every head
    of `head_dim` rows, as a file does that was written from one shard per head. `even`: equal shares.

    Raises:
        CheckpointError: no reading has this number of scale rows.
    """
    readings = {}
    blocks = -(-num_rows // BLOCK)
    if num_scale_rows >= blocks:
        readings["block"] = Tiling(num_rows, BLOCK)
    if head_dim is not None and num_rows % head_dim == 0 and num_scale_rows > blocks:
        per_head = -(-head_dim // BLOCK)
        if per_head * (num_rows // head_dim) == num_scale_rows:
            readings["head"] = Tiling(head_dim, BLOCK)
    if num_scale_rows > blocks and num_rows % num_scale_rows == 0:
        readings["even"] = Tiling(num_rows, num_rows // num_scale_rows)
    if not readings:
        raise CheckpointError(
            f"{name}: {num_rows} rows have {num_scale_rows} rows of FP8 scales; blocks of {BLOCK} need "
            f"{blocks}"
        )
    return readings


def choose_rows(name: str, codes_RC: Tensor, num_scale_rows: int, head_dim: int | None = None) -> Tensor:
    """The scale row of each weight row in the reading that the codes speak for, int64 [R].

    Raises:
        CheckpointError: see `choose_reading`.
    """
    reading = choose_reading(name, codes_RC, num_scale_rows, head_dim)
    num_rows = codes_RC.shape[0]
    return row_readings(name, num_rows, num_scale_rows, head_dim)[reading].rows(num_rows, codes_RC.device)


def choose_reading(name: str, codes_RC: Tensor, num_scale_rows: int, head_dim: int | None = None) -> str:
    """The name of the reading that the codes speak for.

    Each block was scaled so that its largest weight has the largest code. A reading that cuts blocks apart
    makes parts without that weight, so it falls short; one that joins blocks does not. Hence the finest
    reading in which the blocks reach the largest code is the file's.

    Raises:
        CheckpointError: the codes speak for none, or for two alike.
    """
    readings = row_readings(name, codes_RC.shape[0], num_scale_rows, head_dim)
    if len(readings) == 1:
        return next(iter(readings))
    rows = {word: tiling.rows(codes_RC.shape[0], codes_RC.device) for word, tiling in readings.items()}
    shares = {word: _full_share(codes_RC, rows_R) for word, rows_R in rows.items()}
    full = {word: int(rows[word].max()) for word, share in shares.items() if share >= LEAST_SHARE}
    finest = [word for word, last in full.items() if last == max(full.values())]
    if len(finest) != 1:
        listed = ", ".join(f"{word} {share:.0%}" for word, share in shares.items())
        raise CheckpointError(
            f"{name}: {num_scale_rows} rows of FP8 scales for {codes_RC.shape[0]} rows can be read in "
            f"several ways and the codes do not tell which (blocks with a largest code: {listed}); "
            "dequantise the file with its vendor's tool"
        )
    return finest[0]


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
    """The real weights [R, C] in `dtype`, on the codes' device.

    Args:
        name: of the weight, and of its file where it has one; errors begin with it.
        codes_RC: float8_e4m3fn.
        scale_rc: float scales; a block's real numbers are its codes times its scale.
        dtype: of the result; the product is formed in float32, a strip of rows at a time.
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
    scale_rc = scale_rc.to(codes_RC.device, torch.float32)
    if not bool((scale_rc[rows_R.unique()] > 0).all()) or not bool(scale_rc.isfinite().all()):
        raise CheckpointError(
            f"{name}: FP8 scales must be finite and above 0; the file is damaged: fetch it again"
        )
    real_RC = torch.empty(codes_RC.shape, dtype=dtype, device=codes_RC.device)
    height = max(1, STRIP // codes_RC.shape[1])
    for start in range(0, len(rows_R), height):
        strip = slice(start, start + height)
        scale_SC = scale_rc[rows_R[strip]].repeat_interleave(BLOCK, 1)[:, : codes_RC.shape[1]]
        real_RC[strip] = codes_RC[strip].float().mul_(scale_SC)
    return real_RC
