"""Packed batches: labels of MTP heads, counted by hand."""

import pytest

from sateen.data.packing import pack


@pytest.mark.parametrize("lengths", [[5, 1, 3], [0, 4, 0, 2], [1], [2, 0]])
@pytest.mark.parametrize("by", [1, 2, 3, 9])
def test_shifted_labels_stay_in_their_sequence(lengths, by):
    batch = pack([[100 * i + j for j in range(n)] for i, n in enumerate(lengths)])
    expected = []
    for i, n in enumerate(lengths):
        labels = [100 * i + j + 1 for j in range(n - 1)] + [-100] * (n > 0)
        expected += [*labels[by:], *[-100] * min(by, n)]
    assert batch.shifted_labels(by).tolist() == expected


def test_positions_restart_and_offsets_end_at_the_last_token():
    batch = pack([[7, 8, 9], [4]])
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 3, 4]
    assert batch.labels.tolist() == [8, 9, -100, -100]
