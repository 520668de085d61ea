"""Rows of full layers that live in host memory, and the chosen ones of them on the model's device.

A full layer streams all of its rows through the device once per forward; the sparse layers behind it get the
blocks that some query chose, and nothing else of it stays there. Source: HySparse (arXiv 2602.03560 §6)
proposes this and gives no design; all of it is ours. Shape letters: T query tokens, K key/value heads, n
blocks per list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stage(NamedTuple):
    """Which keys of each sequence stand on the device.

    Attributes:
        positions: per sequence, ascending; whole blocks, the last one as far as it is filled.
        lists_KTn: int32, the lists as they count the staged blocks.
    """

    positions: list[NDArray[np.int64]]
    lists_KTn: Tensor


def stage_blocks(lists_KTn: Tensor, queries: Sequence[int], lengths: Sequence[int], block_size: int) -> Stage:
    """The blocks that lists name, and those that hold the queries' own keys.

    The latter keep causal masks right: these are right-aligned and look only into blocks of queries.

    Args:
        lists_KTn: int32, packed over sequences, padded with -1.
        queries: rows of each sequence in it; they are its newest keys.
        lengths: keys of each sequence.
        block_size: keys per block.
    """
    known = lists_KTn.cpu().numpy()
    out = np.full_like(known, -1)
    positions = []
    start = 0
    for count, length in zip(queries, lengths, strict=True):
        mine = known[:, start : start + count]
        is_kept = np.zeros(-(-length // block_size), dtype=bool)
        is_kept[mine[mine >= 0]] = True
        is_kept[(length - count) // block_size :] = True
        place = np.cumsum(is_kept) - 1
        out[:, start : start + count] = np.where(mine >= 0, place[np.maximum(mine, 0)], -1)
        kept = np.flatnonzero(is_kept)
        keys = (kept[:, None] * block_size + np.arange(block_size)).ravel()
        positions.append(keys[keys < length])
        start += count
    return Stage(positions, torch.from_numpy(out).to(lists_KTn.device))


def to_device(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Rows of a host pool on the model's device.

    The host goes on while they are copied. It overwrites rows of the pool only with keys that it has fetched
    from the device, which waits for all copies before.
    """
    if device.type == "cpu":
        return rows.to(dtype)
    return rows.pin_memory().to(device, non_blocking=True).to(dtype)
