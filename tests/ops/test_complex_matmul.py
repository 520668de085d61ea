"""Two-bit phases against angles, bytes worked by hand, and complex products of NumPy."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch

from sateen import ops
from sateen.errors import BackendUnavailable, ShapeError

POWERS = np.array([1, 1j, -1, -1j])


def parts(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(2)]


def quantized(*shape, seed=0, spread=3.0):
    """A weight whose two scales differ."""
    w_re, w_im = parts(*shape, seed=seed)
    return ops.phase_quantize(spread * w_re, w_im)


def values(weight):
    """The complex matrix a weight stands for, in NumPy complex128 and from its fields alone."""
    codes = weight.codes.numpy()
    return POWERS[codes] * np.where(codes % 2, float(weight.s_im), float(weight.s_re))


def rounded(x):
    """Int8 codes and the size of one code, row by row in NumPy float32."""
    x = x.float().numpy()
    levels = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    return np.clip(np.rint(x * levels), -128, 127).astype(np.int64), (1 / levels).astype(np.float64)


def gap(got, want):
    size = np.linalg.norm(want)
    return float(np.linalg.norm(got[0].double().numpy() + 1j * got[1].double().numpy() - want) / size)


# The four axes and the four diagonals; a diagonal belongs to the axis counter-clockwise of it.
BOUNDARIES = [
    ((1.0, 0.0), 0), ((0.0, 1.0), 1), ((-1.0, 0.0), 2), ((0.0, -1.0), 3),
    ((1.0, 1.0), 1), ((-1.0, 1.0), 2), ((-1.0, -1.0), 3), ((1.0, -1.0), 0),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "code"), BOUNDARIES)
@pytest.mark.parametrize("size", [1.0, 1e-30, 3e30])
def test_boundary_angles(entry, code, size):
    re, im = (torch.tensor([[size * part]]) for part in entry)
    assert ops.phase_quantize(re, im).codes.item() == code


@pytest.mark.parametrize("re", [0.0, -0.0])
@pytest.mark.parametrize("im", [0.0, -0.0])
def test_zero_is_plus_one_with_the_floor_as_scale(re, im):
    codes, s_re, s_im = ops.phase_quantize(torch.tensor([[re]]), torch.tensor([[im]]))
    assert codes.item() == 0
    assert s_re.item() == s_im.item() == pytest.approx(1e-5, rel=1e-6)


def test_a_signed_zero_beside_the_negative_axis_changes_nothing():
    for im in (0.0, -0.0):  # angles of +pi and -pi
        assert ops.phase_quantize(torch.tensor([[-2.0]]), torch.tensor([[im]])).codes.item() == 2


def test_codes_follow_the_angle():
    w_re, w_im = parts(40, 50)
    codes = ops.phase_quantize(w_re, w_im).codes
    for re, im, code in zip(w_re.flatten().tolist(), w_im.flatten().tolist(), codes.flatten(), strict=True):
        assert math.floor((cmath.phase(complex(re, im)) + math.pi / 4) / (math.pi / 2)) % 4 == code


def test_scales_are_means_over_their_own_axis():
    w_re = torch.tensor([[3.0, -5.0, 0.5], [0.25, 0.0, 1.0]])
    w_im = torch.tensor([[1.0, 2.0, 2.0], [-4.0, 9.0, 0.0]])
    codes, s_re, s_im = ops.phase_quantize(w_re, w_im)
    assert codes.tolist() == [[0, 2, 1], [3, 1, 0]]
    assert s_re.item() == 3.0  # of 3, 5, 1
    assert s_im.item() == 5.0  # of 2, 4, 9
    assert codes.dtype == torch.uint8


@pytest.mark.parametrize("floor", [1e-5, 1e-6])
def test_an_axis_without_entries_has_the_floor(floor):
    _, s_re, s_im = ops.phase_quantize(torch.full((2, 2), 4.0), torch.ones(2, 2), floor=floor)
    assert s_re.item() == 4.0
    assert s_im.item() == pytest.approx(floor, rel=1e-6)


def test_bfloat16_masters_are_quantised_in_float32():
    w_re, w_im = parts(64, 96, dtype=torch.bfloat16)
    for got, want in zip(
        ops.phase_quantize(w_re, w_im), ops.phase_quantize(w_re.float(), w_im.float()), strict=True
    ):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_error_on_gaussian_weights_by_stage():
    w_re, w_im = parts(400, 500)
    energy, left = [], torch.complex(w_re, w_im)
    for _ in range(4):
        left = left - torch.complex(*ops.phase_quantize(left.real, left.imag).dense())
        energy.append(float(left.abs().square().sum() / (w_re.square() + w_im.square()).sum()))
    assert energy[0] == pytest.approx(1 - 2 / math.pi, abs=2e-3)
    assert energy[1:] == pytest.approx([0.130, 0.058, 0.033], abs=3e-3)


def test_no_other_scale_of_the_same_codes_is_nearer():
    w_re, w_im = parts(30, 40)
    weight = ops.phase_quantize(w_re, w_im)

    def error(s_re, s_im):
        c_re, c_im = ops.PhaseWeight(weight.codes, torch.tensor(s_re), torch.tensor(s_im)).dense()
        return float((c_re - w_re).square().sum() + (c_im - w_im).square().sum())

    s_re, s_im = (float(s) for s in weight[1:])
    best = error(s_re, s_im)
    assert all(error(s_re * a, s_im * b) > best for a, b in ((0.99, 1), (1.01, 1), (1, 0.99), (1, 1.01)))


def test_a_weight_that_is_not_finite_shows_in_its_scale():
    w_re, w_im = parts(3, 4)
    w_re[1, 2] = torch.inf
    _, s_re, s_im = ops.phase_quantize(w_re, w_im)
    assert s_re.isinf()
    assert s_im.isfinite()
    for part, other in ((0, 1), (1, 0)):
        w = parts(3, 4)
        w[part][1, 2] = torch.nan
        scales = ops.phase_quantize(*w)[1:]
        assert scales[part].isnan()
        assert scales[other].isfinite()


def test_bytes_hold_the_first_column_lowest():
    codes = torch.tensor([[1, 2, 3, 0, 3], [0, 0, 0, 2, 1]], dtype=torch.uint8)
    stored = ops.pack_phase(ops.PhaseWeight(codes, torch.tensor(1.0), torch.tensor(2.0)))
    assert stored.packed.shape == (64, 64)  # 2 rows padded to 64, 5 columns to 256
    assert stored.packed[:2, :2].tolist() == [[0b00_11_10_01, 0b11], [0b10_00_00_00, 0b01]]
    assert int(stored.packed.sum()) == 0b00_11_10_01 + 0b11 + 0b10_00_00_00 + 0b01
    assert (stored.out_features, stored.in_features) == (2, 5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 255), (64, 256), (65, 257), (7, 511)])
def test_unpack_gives_back_what_was_packed_and_never_reads_the_padding(shape):
    weight = quantized(*shape)
    stored = ops.pack_phase(weight)
    assert stored.packed.shape == (-(-shape[0] // 64) * 64, -(-shape[1] // 256) * 64)
    poisoned = stored.packed.clone()
    poisoned[shape[0] :] = 0xFF
    poisoned[:, -(-shape[1] // 4) :] = 0xFF
    if shape[1] % 4:
        poisoned[:, shape[1] // 4] |= 0xFF << 2 * (shape[1] % 4) & 0xFF
    assert torch.equal(poisoned, stored.packed) == (shape == (64, 256))
    for packed in (stored.packed, poisoned):
        again = ops.unpack_phase(ops.PackedPhase(packed, stored.s_re, stored.s_im, *shape))
        assert all(torch.equal(a, b) for a, b in zip(again, weight, strict=True))


def test_the_published_ffn_width_costs_its_padding():
    stored = ops.pack_phase(quantized(64, 5460))
    assert stored.packed.shape == (64, 5632 // 4)


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("code", range(4))
def test_each_code_turns_the_input(code, conjugate):
    one = torch.tensor(1.0)
    weight = ops.PhaseWeight(torch.tensor([[code]], dtype=torch.uint8), one, one)
    re, im = 3.0, 5.0
    # What each code adds to (y_re, y_im) in the conjugate form, and in the plain one.
    want = {
        True: [(re, -im), (im, re), (-re, im), (-im, -re)],
        False: [(re, im), (-im, re), (-re, -im), (im, -re)],
    }[conjugate][code]
    for act in ("int8", "float"):
        got = ops.complex_matmul(
            torch.tensor([[re]]), torch.tensor([[im]]), weight, conjugate=conjugate, act=act
        )
        assert [part.item() for part in got] == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("conjugate", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 255), (3, 65, 257)])
def test_int8_equals_integer_sums_in_numpy(shape, conjugate):
    T, F, D = shape
    weight = quantized(F, D)
    x_re, x_im = parts(T, D, seed=1)
    (r8, alpha), (i8, beta) = rounded(x_re), rounded(10 * x_im)  # scales of a token that differ
    assert np.abs(np.concatenate([r8, i8])).max() <= 127
    x = r8 * alpha + 1j * i8 * beta
    want = (x.conj() if conjugate else x) @ values(weight).T
    got = ops.complex_matmul(x_re, 10 * x_im, weight, conjugate=conjugate)
    assert gap(got, want) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_equals_fake_quantised_floats(dtype):
    weight = quantized(48, 300)
    x_re, x_im = parts(4, 300, seed=1, dtype=dtype)
    fake = [torch.from_numpy(codes * size) for codes, size in map(rounded, (x_re, x_im))]
    want = ops.complex_matmul(*fake, weight, act="float")
    got = ops.complex_matmul(x_re, x_im, weight, act="int8")
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3  # bfloat16 outputs have 8 bits
    assert gap(got, want[0].numpy() + 1j * want[1].numpy()) < tolerance
    assert {part.dtype for part in got} == {dtype}


def test_floats_are_not_rounded():
    weight = quantized(33, 129)
    x_re, x_im = parts(5, 129, seed=2, dtype=torch.float64)
    want = (x_re.numpy() - 1j * x_im.numpy()) @ values(weight).T
    assert gap(ops.complex_matmul(x_re, x_im, weight, act="float"), want) < 1e-14


def test_int8_loses_little_on_gaussian_activations():
    weight = quantized(64, 512)
    x_re, x_im = parts(16, 512, seed=2)
    want = (x_re.double().numpy() - 1j * x_im.double().numpy()) @ values(weight).T
    assert 1e-3 < gap(ops.complex_matmul(x_re, x_im, weight), want) < 1.2e-2


def test_sums_beyond_the_exact_range_of_float32_are_rounded_once():
    D = 400_000  # sums of about 45 million, where float32 counts in fours and partial sums would drift
    x8 = torch.randint(100, 128, (8, D), generator=torch.Generator().manual_seed(0))
    x8[:, 0] = 127  # so that a code is the number itself
    one = torch.tensor(1.0)
    weight = ops.PhaseWeight(torch.zeros(8, D, dtype=torch.uint8), one, one)
    y_re, y_im = ops.complex_matmul(x8.float(), x8.float(), weight)
    want = x8.sum(1)
    assert want.min() > 2**25
    assert torch.equal(y_re, want.float().unsqueeze(1).expand(8, 8))
    assert torch.equal(y_im, -y_re)


def test_halves_go_to_the_even_code_and_small_tokens_use_the_floor():
    one = torch.tensor(1.0)
    weight = ops.PhaseWeight(torch.zeros(1, 2, dtype=torch.uint8), one, one)
    zero = torch.zeros(2, 2)
    y_re, y_im = ops.complex_matmul(torch.tensor([[127.0, 0.5], [127.0, 1.5]]), zero, weight)
    assert y_re.flatten().tolist() == [127.0, 129.0]
    assert y_im.abs().max() == 0
    tiny = torch.tensor([[1e-5, 0.0], [3e-8, 0.0]])  # the second is under half a code
    y_re, _ = ops.complex_matmul(tiny, zero, weight)
    assert y_re.flatten().tolist() == pytest.approx([1e-5, 0.0], rel=1e-6)


@pytest.mark.parametrize("act", ["int8", "float"])
@pytest.mark.parametrize("conjugate", [True, False])
def test_stages_add_up_packed_or_not(act, conjugate):
    w_re, w_im = parts(20, 260)
    stages, rest = [], torch.complex(w_re, w_im)
    for _ in range(3):
        stages.append(ops.phase_quantize(rest.real, rest.imag))
        rest = rest - torch.complex(*stages[-1].dense())
    x_re, x_im = parts(2, 3, 260, seed=3)
    if act == "int8":
        inputs = [codes * size for codes, size in map(rounded, (x_re, x_im))]
    else:
        inputs = [x.double().numpy() for x in (x_re, x_im)]
    x = inputs[0] + 1j * inputs[1]
    want = (x.conj() if conjugate else x) @ sum(values(stage) for stage in stages).T
    loose = ops.complex_matmul(x_re, x_im, stages, conjugate=conjugate, act=act)
    packed = [ops.pack_phase(stage) for stage in stages]
    got = ops.complex_matmul(x_re, x_im, packed, conjugate=conjugate, act=act)
    assert got[0].shape == (2, 3, 20)
    assert gap(got, want) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(got, loose, strict=True))


def test_a_token_does_not_depend_on_its_neighbours():
    weight = quantized(9, 31)
    x_re, x_im = parts(6, 31, seed=4)
    whole = ops.complex_matmul(x_re, x_im, weight)
    other_re, other_im = x_re.clone(), x_im.clone()
    other_re[1:], other_im[1:] = 1e4, -1e4
    for a, b in zip(whole, ops.complex_matmul(other_re, other_im, weight), strict=True):
        assert torch.equal(a[0], b[0])


def test_inputs_are_left_alone_and_no_token_gives_no_output():
    weight = quantized(9, 31)
    x_re, x_im = parts(6, 31, seed=4)
    before = x_re.clone(), x_im.clone(), weight.codes.clone()
    ops.complex_matmul(x_re, x_im, weight)
    assert all(torch.equal(a, b) for a, b in zip((x_re, x_im, weight.codes), before, strict=True))
    assert [tuple(y.shape) for y in ops.complex_matmul(x_re[:0], x_im[:0], weight)] == [(0, 9), (0, 9)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, x: ops.complex_matmul(x, x[:, :-1], w), "one shape and dtype"),
        (lambda w, x: ops.complex_matmul(x, x.double(), w), "one shape and dtype"),
        (lambda w, x: ops.complex_matmul(x[:, 1:], x[:, 1:], w), r"\(2, 30\) and \(9, 31\)"),
        (lambda w, x: ops.complex_matmul(x.int(), x.int(), w), "takes float activations"),
        (lambda w, x: ops.complex_matmul(x, x, []), "at least one stage"),
        (lambda w, x: ops.complex_matmul(x, x, [w, quantized(8, 31)]), "stages of one shape"),
        (lambda w, x: ops.complex_matmul(x, x, w, act="int4"), "known: float, int8"),
        (lambda w, x: ops.phase_quantize(x, x[:1]), r"two \[F,D\] parts"),
        (lambda w, x: ops.phase_quantize(x[0], x[0]), r"two \[F,D\] parts"),
        (lambda w, x: ops.pack_phase(w._replace(codes=w.codes + 4)), "of 0..3"),
        (lambda w, x: ops.pack_phase(w._replace(codes=w.codes.int())), "uint8 codes"),
        (lambda w, x: ops.unpack_phase(ops.PackedPhase(w.codes, w.s_re, w.s_im, 9, 31)), r"uint8 \(64, 64\)"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(call, words):
    with pytest.raises(ShapeError, match=words):
        call(quantized(9, 31), parts(2, 31)[0])


def test_an_unknown_backend_is_refused():
    with pytest.raises(BackendUnavailable, match="known: auto, reference"):
        ops.complex_matmul(*parts(2, 31), quantized(9, 31), backend="lut")
