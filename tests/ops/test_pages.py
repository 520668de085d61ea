"""Tensors that move to other memory keep their numbers and whom they share it with."""

from __future__ import annotations

import pytest
import torch

import sateen.ops.native as loader
from sateen.ops.pages import ARENA_BYTES, move_to_huge_pages

needs_kernels = pytest.mark.skipif(bool(loader.native_available()), reason="needs the compiled kernels")


def tensors(size):
    generator = torch.Generator().manual_seed(0)
    big = torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8)
    return [
        big,
        torch.randn(7, 5, generator=generator).bfloat16(),
        torch.randn(3, generator=generator),
        big.view(-1),
    ]


@needs_kernels
def test_numbers_stay_and_sharing_stays():
    before = tensors(ARENA_BYTES + 1000)  # one tensor larger than an arena, and small ones behind it
    moved = [*before[:3], before[0].view(-1)]
    want, places = [tensor.clone() for tensor in moved], [tensor.data_ptr() for tensor in moved]
    move_to_huge_pages(iter(moved))
    for tensor, copy, place in zip(moved, want, places, strict=True):
        assert torch.equal(tensor, copy)
        assert tensor.data_ptr() != place
        assert tensor.data_ptr() % 4 == 0
    assert moved[0].data_ptr() == moved[3].data_ptr()
    assert moved[1].data_ptr() == moved[2].data_ptr() - 128  # 70 bytes, padded to a multiple of 64


def test_little_stays_where_it_is():
    few = tensors(1000)
    places = [tensor.data_ptr() for tensor in few]
    move_to_huge_pages(few)
    assert [tensor.data_ptr() for tensor in few] == places
