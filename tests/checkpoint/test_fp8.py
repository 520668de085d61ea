"""FP8 blocks: every tiling dequantises exactly, and the codes tell which tiling a file uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sateen.checkpoint.fp8 import choose_rows, dequantize, row_readings
from sateen.errors import CheckpointError


def quantize(weight: np.ndarray, groups: list[range], num_scale_rows: int):
    """Codes and scales of a writer that scales each group of rows and 128 columns to 448, in a plain loop."""
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.ones(num_scale_rows, -(-columns // 128))
    real = np.zeros_like(weight)
    for g, group in enumerate(groups):
        for c in range(scale.shape[1]):
            part = weight[group.start : group.stop, c * 128 : (c + 1) * 128]
            s = np.float32(np.abs(part).max() / 448)
            code = torch.from_numpy(part / s).to(torch.float8_e4m3fn)
            codes[group.start : group.stop, c * 128 : (c + 1) * 128] = code
            scale[g, c] = float(s)
            real[group.start : group.stop, c * 128 : (c + 1) * 128] = code.float().numpy() * s
    return codes, scale, real


GROUPS = {  # 768 rows in 4 heads of 192, 8 rows of scales
    "block": [range(i, i + 128) for i in range(0, 768, 128)],
    "head": [range(h + a, h + b) for h in range(0, 768, 192) for a, b in ((0, 128), (128, 192))],
    "even": [range(i, i + 96) for i in range(0, 768, 96)],
}


@pytest.mark.parametrize("reading", GROUPS)
def test_every_reading_of_eight_scale_rows(reading):
    weight = np.random.default_rng(0).standard_normal((768, 300)).astype(np.float32)
    codes, scale, real = quantize(weight, GROUPS[reading], 8)
    assert list(row_readings(768, 8, 192)) == ["block", "head", "even"]
    rows = choose_rows(codes, 8, 192)
    expected = [next(g for g, group in enumerate(GROUPS[reading]) if r in group) for r in range(768)]
    assert rows.tolist() == expected
    np.testing.assert_array_equal(dequantize(codes, scale, torch.float32, head_dim=192).numpy(), real)
    half = dequantize(codes, scale, torch.bfloat16, head_dim=192)
    assert torch.equal(half, torch.from_numpy(real).to(torch.bfloat16))


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (200, 130), (1, 1), (128, 129)])
def test_plain_blocks(rows, columns):
    weight = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    groups = [range(i, min(i + 128, rows)) for i in range(0, rows, 128)]
    codes, scale, real = quantize(weight, groups, len(groups))
    np.testing.assert_array_equal(dequantize(codes, scale, torch.float32).numpy(), real)


def test_codes_that_do_not_tell_are_refused():
    codes = torch.full((768, 128), 3.0).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"do not tell which.*block 0%, head 0%, even 0%"):
        dequantize(codes, torch.ones(8, 1), torch.float32, head_dim=192)
    full = torch.full((768, 128), 448.0).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"do not tell which.*block 100%"):
        dequantize(full, torch.ones(8, 1), torch.float32, head_dim=192)


@pytest.mark.parametrize(
    ("codes", "scale", "says"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), "float8_e4m3fn matrices; got torch.float32"),
        (torch.zeros(4, 4).to(torch.float8_e5m2), torch.ones(1, 1), "got torch.float8_e5m2"),
        (torch.zeros(300, 4).to(torch.float8_e4m3fn), torch.ones(2, 1), "300 rows have 2 rows.*need 3"),
        (torch.zeros(4, 300).to(torch.float8_e4m3fn), torch.ones(1, 2), "300 columns need 3"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.zeros(1, 1), "finite and above 0"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.full((1, 1), torch.nan), "finite and above 0"),
    ],
)
def test_what_does_not_fit_is_refused(codes, scale, says):
    with pytest.raises(CheckpointError, match=says):
        dequantize(codes, scale, torch.float32)
