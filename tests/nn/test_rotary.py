"""Rotary embedding by hand values."""

from __future__ import annotations

import math

import pytest
import torch

from sateen.nn.attention import Sequences
from sateen.nn.rotary import apply_rotary, rotary_tables


def test_two_channels_turn_by_their_position():
    x = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 2.0]]])
    out = apply_rotary(x, rotary_tables(torch.tensor([0, 1, 5]), theta=10000.0, dim=2))
    assert out[0, 0].tolist() == [1.0, 0.0]
    assert out[1, 0].tolist() == pytest.approx([math.cos(1), math.sin(1)])
    assert out[2, 0].tolist() == pytest.approx([-2 * math.sin(5), 2 * math.cos(5)])


def test_halves_are_paired_and_the_base_slows_later_channels():
    # Half-split form: channel j turns with channel j + dim/2, by position * theta^(-2j/dim).
    x = torch.tensor([[[1.0, 3.0, 2.0, 4.0]]])
    out = apply_rotary(x, rotary_tables(torch.tensor([7]), theta=100.0, dim=4))[0, 0].tolist()
    fast, slow = 7.0, 7.0 / 10.0
    assert out == pytest.approx(
        [
            1 * math.cos(fast) - 2 * math.sin(fast),
            3 * math.cos(slow) - 4 * math.sin(slow),
            2 * math.cos(fast) + 1 * math.sin(fast),
            4 * math.cos(slow) + 3 * math.sin(slow),
        ],
        rel=1e-5,
    )


def test_a_partial_rotation_leaves_the_other_channels_alone():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 10, generator=generator)
    tables = rotary_tables(torch.tensor([2, 3, 4]), theta=50.0, dim=4)
    out = apply_rotary(x, tables)
    assert torch.equal(out[..., 4:], x[..., 4:])
    torch.testing.assert_close(out[..., :4], apply_rotary(x[..., :4].contiguous(), tables), rtol=0, atol=0)
    assert not torch.allclose(out[..., :4], x[..., :4])


def test_products_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(1, 1, 8, generator=generator), torch.randn(1, 1, 8, generator=generator)

    def product(at_q, at_k):
        turned = [
            apply_rotary(x, rotary_tables(torch.tensor([p]), 10000.0, 8)) for x, p in ((q, at_q), (k, at_k))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)


def test_angles_stay_exact_in_float32_for_low_precision_inputs():
    # bfloat16 cannot hold position 100001; the tables are float32 and only the result is rounded.
    tables = rotary_tables(torch.tensor([100001]), theta=5e6, dim=2)
    assert tables[0].dtype == torch.float32
    assert float(tables[0][0, 0]) == pytest.approx(math.cos(100001), abs=1e-6)
    out = apply_rotary(torch.ones(1, 1, 2, dtype=torch.bfloat16), tables)
    assert out.dtype == torch.bfloat16
    assert float(out[0, 0, 0]) == pytest.approx(math.cos(100001) - math.sin(100001), abs=2e-2)


def test_one_forward_shares_its_tables_per_base():
    seq = Sequences.of_lengths([2, 0, 3])
    assert seq.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert seq.cu_seqlens.dtype == torch.int32
    assert seq.position_ids.tolist() == [0, 1, 0, 1, 2]
    assert seq.rotary(1e4, 4) is seq.rotary(1e4, 4)
    assert not torch.equal(seq.rotary(1e4, 4)[0], seq.rotary(5e6, 4)[0])
    assert Sequences.of_lengths([]).cu_seqlens.tolist() == [0]
