"""Tables of blocks and query places against loops."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from sateen.ops.spans import cut, stand

LENGTHS = [[], [0], [5], [4, 0, 1, 7, 0], [3, 3, 3], [0, 0, 9, 1]]


def offsets(lengths):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("size", [1, 3, 4, 64])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_cover_each_sequence_in_order(lengths, size):
    want = [
        (b, sum(lengths[:b]) + place, place, min(size, length - place))
        for b, length in enumerate(lengths)
        for place in range(0, length, size)
    ]
    blocks = cut(offsets(lengths), sum(lengths), size)
    assert all(x.dtype == torch.int32 for x in blocks)
    count = int(blocks.first_B[-1])
    assert count == len(want)
    rows = list(zip(*(x.tolist() for x in blocks[:4]), strict=True))
    assert rows[:count] == want
    assert all(row[3] == 0 for row in rows[count:])
    assert blocks.first_B.tolist() == [0, *accumulate(-(-length // size) for length in lengths)]


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"), [([2, 0, 3], [2, 4, 5]), ([4, 2], [1, 0]), ([0], [3]), ([], [])]
)
def test_queries_stand_right_aligned(lengths_q, lengths_k):
    want = [
        (b, sum(lengths_k[:b]), t + lengths_k[b] - length)
        for b, length in enumerate(lengths_q)
        for t in range(length)
    ]
    found = stand(offsets(lengths_q), offsets(lengths_k), sum(lengths_q))
    assert all(x.dtype == torch.int32 for x in found)
    assert list(zip(*(x.tolist() for x in found), strict=True)) == want
