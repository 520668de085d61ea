import torch

from sateen.engine.cache.memory import HUGE_PAGE, MAP, Memory

CPU = torch.device("cpu")


def test_zeros_lie_side_by_side_at_cache_lines_and_do_not_overlap():
    memory = Memory()
    shapes = [
        ((3, 5), torch.bfloat16),
        ((7,), torch.int8),
        ((0, 4), torch.float32),
        ((2, 2, 2), torch.float32),
    ]
    tensors = [memory.zeros(shape, dtype, CPU) for shape, dtype in shapes]
    assert [(tuple(x.shape), x.dtype) for x in tensors] == shapes
    assert [x.data_ptr() - tensors[0].data_ptr() for x in tensors if x.numel()] == [0, 64, 128]
    assert tensors[0].data_ptr() % HUGE_PAGE == 0
    for number, x in enumerate(tensors, start=1):
        x.fill_(number)
    for number, x in enumerate(tensors, start=1):
        assert (x == number).all()


def test_what_does_not_fit_gets_a_map_of_its_own_size():
    memory = Memory()
    small = memory.zeros((10,), torch.float32, CPU)
    large = memory.zeros((MAP + HUGE_PAGE,), torch.uint8, CPU)
    assert large.numel() == MAP + HUGE_PAGE
    assert large.data_ptr() % HUGE_PAGE == 0
    large[-1] = 5
    small.fill_(1)
    assert not large[:-1].any()


def test_memory_outlives_who_handed_it_out():
    memory = Memory()
    x = memory.zeros((100,), torch.float32, CPU)
    del memory
    assert x.fill_(2.0).sum() == 200
