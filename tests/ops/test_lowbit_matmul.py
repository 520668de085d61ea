"""Weights of eight and four bits against bytes worked by hand and NumPy; thin products against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sateen.ops.native as loader
from sateen import ops
from sateen.errors import ShapeError
from sateen.ops.lowbit_matmul import OP, thin_matmul

BACKENDS = list(OP.backends)
PACK = {"int8": ops.pack_int8, "int4": ops.pack_int4}
# Rows F and columns D: one, odd, a whole panel or group, one more, several of both.
SHAPES = [(1, 1), (3, 33), (16, 32), (17, 31), (40, 100), (33, 256)]
needs_kernels = pytest.mark.skipif(bool(loader.native_available()), reason="needs the compiled kernels")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(packed):
    """Codes, sizes and minima [F, D] of a packed weight, entry by entry from the layout's description."""
    F, D = packed.out_features, packed.in_features
    bytes_ = packed.codes.numpy()
    codes, sizes, minima = (np.zeros((F, D)) for _ in range(3))
    scales = packed.scales.double().numpy()
    for f in range(F):
        p, r = divmod(f, 16)
        for d in range(D):
            if isinstance(packed, ops.PackedInt8):
                codes[f, d] = int(bytes_[p, d // 4, r, d % 4]) - 128
                sizes[f, d] = scales[p, d // 32, r]
                continue
            g, column = divmod(d, 32)
            byte = int(bytes_[p, g, column % 16 // 4, r, column % 4])
            codes[f, d] = byte % 16 if column < 16 else byte // 16
            sizes[f, d], minima[f, d] = scales[p, g, :, r]
    return codes, sizes, minima


def rounded(x):
    """Activations as int8 codes times their size, in groups of 32 columns, float64 after the rounding."""
    out = np.zeros(x.shape)
    for start in range(0, x.shape[1], 32):
        group = x[:, start : start + 32].float().numpy()
        top = np.abs(group).max(1, keepdims=True)
        codes = np.rint(group * (np.float32(127) / top))
        out[:, start : start + 32] = codes.astype(np.float64) * top / 127
    return out


def gap(got, want):
    return float(np.linalg.norm(got.double().numpy() - want) / np.linalg.norm(want))


def test_int8_bytes_worked_by_hand():
    weight = torch.zeros(18, 5)
    weight[0] = torch.tensor([127.0, -127.0, 0.4, 0.6, 3.0])
    weight[17, 4] = -2.0
    packed = ops.pack_int8(weight)
    assert packed.codes.shape == (2, 8, 16, 4)  # 18 rows padded to 32, 5 columns to 32
    assert packed.codes[0, 0, 0].tolist() == [255, 1, 128, 129]
    assert packed.codes[0, 1, 0, 0] == 131
    assert packed.codes[1, 1, 1, 0] == 1
    assert packed.scales.shape == (2, 1, 16)
    assert packed.scales[0, 0, 0] == 1.0
    assert packed.scales[1, 0, 1] == (torch.tensor(2.0) / 127).bfloat16()
    assert ops.unpack_lowbit(packed)[0].tolist() == [127.0, -127.0, 0.0, 1.0, 3.0]


def test_int4_bytes_worked_by_hand():
    weight = torch.zeros(17, 64)
    weight[16, :16] = torch.arange(16) * 0.5 - 3  # step 1/2, minimum -3
    weight[16, 16:32] = 4.5 - torch.arange(16) * 0.5
    weight[16, 32:] = 7.0  # a group without a range
    packed = ops.pack_int4(weight)
    assert packed.codes.shape == (2, 2, 4, 16, 4)
    low, high = packed.codes[1, 0, :, 0].flatten() & 15, packed.codes[1, 0, :, 0].flatten() >> 4
    assert low.tolist() == list(range(16))
    assert high.tolist() == list(range(15, -1, -1))
    assert packed.scales[1, 0, :, 0].tolist() == [0.5, -3.0]
    assert packed.scales[1, 1, 1, 0] == 7.0
    assert torch.equal(ops.unpack_lowbit(packed), weight)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_unpack_follows_the_layout(shape, weights):
    weight = random(*shape)
    packed = PACK[weights](weight)
    codes, sizes, minima = stored(packed)
    assert np.allclose(ops.unpack_lowbit(packed).numpy(), codes * sizes + minima, atol=1e-6)
    for poisoned in (0, 255):  # the padding is never read
        other = packed.codes.clone()
        other[-1, :, -1] = poisoned
        if shape[0] % 16:
            again = type(packed)(
                torch.where(is_row_padding(packed), poisoned, packed.codes), packed.scales, *shape
            )
            assert torch.equal(ops.unpack_lowbit(again), ops.unpack_lowbit(packed))


def is_row_padding(packed):
    """Which code bytes belong to no row."""
    rows = torch.arange(packed.codes.shape[0] * 16).view(-1, 16) >= packed.out_features
    shape = [rows.shape[0], *[1] * (packed.codes.ndim - 3), 16, 1]
    return rows.view(shape).expand(packed.codes.shape)


def test_int8_codes_are_the_nearest():
    weight = random(20, 70) * torch.logspace(-6, 6, 20).unsqueeze(1)
    error = (ops.unpack_lowbit(ops.pack_int8(weight)) - weight).abs()
    for start in range(0, 70, 32):  # the size of a code has the eight bits of bfloat16
        group = slice(start, start + 32)
        half = weight[:, group].abs().amax(1, keepdim=True) / 127 / 2
        assert (error[:, group] <= half * (1 + 2**-8)).all()


def test_int4_is_nearer_than_the_plain_range_and_keeps_grids():
    weight = random(64, 256)
    groups = weight.view(64, 8, 32).double().numpy()
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    step = (high - low) / 15
    plain = np.rint((groups - low) / step) * step + low
    mine = gap(ops.unpack_lowbit(ops.pack_int4(weight)), weight.double().numpy())
    assert mine < 0.95 * np.linalg.norm(plain - groups) / np.linalg.norm(groups)
    # Blocks as GGUF's Q4_1 stores them, float16 step and minimum, keep their codes: what is left is that the
    # step and the minimum are rounded to the eight bits of bfloat16.
    codes = torch.randint(0, 16, (64, 8, 32), generator=torch.Generator().manual_seed(1))
    codes[..., 0], codes[..., 1] = 0, 15
    steps = random(64, 8, 1, seed=2).abs().half().float() + 0.1
    minima = (-8 * steps * (1 + 0.1 * random(64, 8, 1, seed=3))).half().float()
    grid = (codes * steps + minima).view(64, 256)
    error = (ops.unpack_lowbit(ops.pack_int4(grid)) - grid).abs().view(64, 8, 32)
    assert (error <= 2**-8 * 1.01 * (15 * steps + minima.abs())).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_numpy(shape, weights, backend):
    F, D = shape
    packed = PACK[weights](random(F, D))
    codes, sizes, minima = stored(packed)
    for T in (1, 2, 3, 5, 8, 70):
        x = random(T, D, seed=T)
        want = rounded(x) @ (codes * sizes + minima).T
        got = ops.lowbit_matmul(x, packed, backend=backend)
        assert got.dtype == torch.float32
        assert gap(got, want) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_sums_are_exact_at_the_ends_of_the_codes(weights, backend):
    generator = torch.Generator().manual_seed(0)
    for T in (1, 2, 4, 9):
        x8 = torch.randint(0, 2, (T, 96), generator=generator) * 254 - 127
        x8[:, 5::7] = torch.randint(-127, 128, (T, 13), generator=generator)
        x8[:, ::32] = 127  # so that the size of a code is 1
        low, high = (-127, 127) if weights == "int8" else (0, 15)
        w = torch.where(torch.rand(19, 96, generator=generator) < 0.5, low, high)
        w[:, ::32], w[:, 1::32] = high, low  # so that the step is 1
        packed = PACK[weights](w.float())
        want = (x8 @ w.T).float()
        assert want.abs().max() < 2**24
        assert torch.equal(ops.lowbit_matmul(x8.float(), packed, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_halves_go_to_the_even_code(weights, backend):
    size = {"int8": 127, "int4": 15}[weights]  # so that the step is 1
    w = size * torch.eye(32)
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, *[0.0] * 26]])
    got = ops.lowbit_matmul(x, PACK[weights](w), backend=backend)[0, :6] / size
    assert got.tolist() == pytest.approx([127.0, 0.0, 2.0, 2.0, 0.0, -2.0], abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_numbers_that_are_not_finite_stay_in_their_token(weights, backend):
    packed = PACK[weights](random(20, 70))
    x = random(6, 70, seed=1)
    want = ops.lowbit_matmul(x, packed, backend=backend)
    bad = x.clone()
    bad[1, 3], bad[2, 64], bad[4, 40] = torch.nan, torch.inf, -torch.inf
    got = ops.lowbit_matmul(bad, packed, backend=backend)
    assert got[[1, 2, 4]].isnan().all()
    assert torch.equal(got[[0, 3, 5]], want[[0, 3, 5]])
    # Powers of two change no code; groups that are too small for codes are zeros.
    for size in (2.0**90, 2.0**-90):
        scaled = ops.lowbit_matmul(x * size, packed, backend=backend)
        assert torch.allclose(scaled / size, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.lowbit_matmul(x * 2.0**-120, packed, backend=backend), torch.zeros(6, 20))
    assert torch.equal(ops.lowbit_matmul(torch.zeros(2, 70), packed, backend=backend), torch.zeros(2, 20))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_weight_that_is_not_finite_shows(weights):
    for value in (torch.nan, torch.inf):
        weight = random(4, 64)
        weight[2, 40] = value
        y = ops.lowbit_matmul(random(3, 64), PACK[weights](weight))
        assert not y[:, 2].isfinite().any()
        assert y[:, [0, 1, 3]].isfinite().all()


def test_rounding_activations_costs_half_a_percent():
    weight, x = random(64, 512), random(16, 512, seed=1)
    want = x.double().numpy() @ ops.unpack_lowbit(ops.pack_int8(weight)).double().numpy().T
    assert 2e-3 < gap(ops.lowbit_matmul(x, ops.pack_int8(weight)), want) < 7e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_dtype_of_the_input(dtype):
    packed = ops.pack_int8(random(9, 40, dtype=torch.bfloat16))
    x = random(3, 40, seed=1).to(dtype)
    y = ops.lowbit_matmul(x, packed)
    assert y.dtype == dtype
    assert torch.allclose(y.float(), ops.lowbit_matmul(x.float(), packed), rtol=1e-2, atol=1e-2)
    assert ops.lowbit_matmul(x[:0], packed).shape == (0, 9)


def test_wrong_shapes_are_refused():
    packed = ops.pack_int4(random(9, 40))
    for x in (random(3, 41), random(40), torch.ones(3, 40, dtype=torch.int8)):
        with pytest.raises(ShapeError, match=r"lowbit_matmul takes float activations \[T,D\]"):
            ops.lowbit_matmul(x, packed)
    for weight in (random(40), random(0, 4), torch.ones(3, 4, dtype=torch.int8)):
        with pytest.raises(ShapeError, match=r"pack_int8 takes a float weight \[F,D\]"):
            ops.pack_int8(weight)
    cut = ops.PackedInt4(packed.codes[:, :1], packed.scales, 9, 40)
    for backend in BACKENDS:
        with pytest.raises(ShapeError, match="a packed weight of 9 x 40 has uint8 codes"):
            ops.lowbit_matmul(random(3, 40), cut, backend=backend)
    with pytest.raises(ShapeError, match="thin_matmul takes float32"):
        thin_matmul(random(3, 40), random(9, 41))


def bf16(x):
    return x.bfloat16().float()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_thin_products_equal_float64(shape, dtype):
    F, D = shape
    weight = random(F, D, dtype=dtype)
    for T in (1, 2, 3, 4, 7, 33):
        x = random(T, D, seed=T)
        seen = bf16(x) if dtype == torch.bfloat16 else x  # bfloat16 weights round their activations too
        want = seen.double().numpy() @ weight.double().numpy().T
        assert gap(thin_matmul(x, weight), want) < 1e-6


@needs_kernels
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_token_has_the_same_output_in_any_batch(kind):
    weight, x = random(37, 200), random(23, 200, seed=1)
    if kind in PACK:
        packed = PACK[kind](weight)
        whole, alone = (ops.lowbit_matmul(x, packed), [ops.lowbit_matmul(t, packed) for t in x.split(1)])
    else:
        cast = weight.to(getattr(torch, kind))
        whole, alone = thin_matmul(x, cast), [thin_matmul(t, cast) for t in x.split(1)]
    assert torch.equal(whole, torch.cat(alone))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_as_it_is(dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).unsqueeze(1)
    want = bits.float()
    got = thin_matmul(torch.ones(1, 1), bits)[0].unsqueeze(1)
    if dtype == torch.bfloat16:  # products of the BF16 instructions take and give zeros for subnormal numbers
        is_tiny = want.abs() < 2.0**-126
        assert (got[is_tiny].abs() < 2.0**-126).all()
        got, want = got[~is_tiny], want[~is_tiny]
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


@needs_kernels
def test_the_extension_refuses_what_would_read_outside_its_arrays():
    x, out = np.zeros((2, 40), np.float32), np.zeros((2, 9), np.float32)
    weight = np.zeros(9 * 40 * 4, np.uint8)
    run = loader.native().linear_forward
    run(0, 9, 40, weight, None, None, x, 1, out)
    for arguments in (
        (0, 9, 40, weight[1:], None, None, x, 1, out),
        (0, 10, 40, weight, None, None, x, 1, out),
        (3, 9, 40, weight[: 16 * 64], None, None, x, 1, out),
        (9, 9, 40, weight, None, None, x, 1, out),
        (0, 9, 40, weight, weight, None, x, 1, out),
        (0, 9, 40, weight, None, np.zeros(8, np.float32), x, 1, out),
        (0, 9, 40, weight, None, None, x[:, :39].copy(), 1, out),
        (0, 9, 40, weight, None, None, x, 1, out[:1]),
        (0, 9, 40, weight, None, None, x, 0, out),
    ):
        with pytest.raises(ValueError, match=r"bytes|format|bias|x is|out is|thread"):
            run(*arguments)


@needs_kernels
@pytest.mark.parametrize("threads", [2, 3])
def test_more_threads_give_the_same_output(threads):
    weight, x = random(83, 96), random(5, 96, seed=1)
    packed, before = ops.pack_int4(weight), torch.get_num_threads()
    want = ops.lowbit_matmul(x, packed), thin_matmul(x, weight)
    try:
        torch.set_num_threads(threads)
        got = ops.lowbit_matmul(x, packed), thin_matmul(x, weight)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@needs_kernels
def test_every_instruction_set_passes(passes_at):
    passes_at(__file__, "equal or exact or halves or finite or batch or half")
