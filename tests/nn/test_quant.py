"""Two-bit layers against NumPy: quantisers, the widely-linear form, gradients, integer sums, replacement."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.quant_config import default_spec, read_quant, write_quant
from sateen.models.registry import preset
from sateen.nn.complex import ComplexLinear
from sateen.nn.quant import (
    METHODS,
    Fairy2iLinear,
    LowbitLinear,
    PackedLinear,
    PhaseLinear,
    QuantLinear,
    lowbit_quantize,
    quantize_linears,
    real_matrix,
    residual_phases,
    round_activations,
    widely_linear,
)
from sateen.nn.spec import QuantSpec

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
FLASH = preset("mimo-v2-flash-tiny") | {"vocab_size": 64}
SPECS = {
    "phase": QuantSpec("phase"),
    "fairy2i-1": QuantSpec("fairy2i", stages=1),
    "fairy2i-3": QuantSpec("fairy2i", stages=3),
    "ternary": QuantSpec("ternary"),
    "int2": QuantSpec("int2"),
}


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(spec: QuantSpec, out_features: int, in_features: int, bias: bool = False) -> QuantLinear:
    """A master layer of this method over random weights; sizes count real entries of input and output."""
    if spec.method == "phase":
        linear = ComplexLinear(in_features // 2, out_features // 2)
        linear.weight_real.data = gaussian(out_features // 2, in_features // 2, seed=1)
        linear.weight_imag.data = gaussian(out_features // 2, in_features // 2, seed=2)
    else:
        linear = nn.Linear(in_features, out_features, bias=bias)
        linear.weight.data = gaussian(out_features, in_features, seed=3)
        if bias:
            linear.bias.data = gaussian(out_features, seed=4)
    return METHODS[spec.method].masters(linear, spec)


def phases(w: np.ndarray, floor: float) -> np.ndarray:
    """One stage in complex128, by angle, as the papers write it."""
    turns = np.floor((np.angle(w) + np.pi / 4) / (np.pi / 2)).astype(int) % 4
    is_im = turns % 2 == 1
    s_re = max(np.abs(w.real[~is_im]).sum() / max((~is_im).sum(), 1), floor)
    s_im = max(np.abs(w.imag[is_im]).sum() / max(is_im.sum(), 1), floor)
    return np.array([s_re, 1j * s_im, -s_re, -1j * s_im])[turns]


def dense_truth(master: QuantLinear) -> np.ndarray:
    """The real matrix that a layer should multiply by, in float64 without a line of the package."""
    spec = master.quant
    if spec.method == "phase":
        w = master.weight_real.detach().double().numpy() + 1j * master.weight_imag.detach().double().numpy()
        q = phases(w, 1e-5)
        return np.block([[q.real, q.imag], [q.imag, -q.real]])  # W·conj(x)
    r = master.weight.detach().double().numpy()
    if spec.method == "ternary":
        s = np.abs(r).mean()
        return np.clip(np.round(r / s), -1, 1) * s
    if spec.method == "int2":
        s = 1.3 * np.abs(r).mean()
        return np.clip(np.round(r / s), -2, 1) * s
    n, m = r.shape[0] // 2, r.shape[1] // 2
    r11, r12, r21, r22 = r[:n, :m], r[:n, m:], r[n:, :m], r[n:, m:]
    sums = []
    for w in (r11 + r22 + 1j * (r21 - r12)), (r11 - r22 + 1j * (r12 + r21)):
        left, total = w / 2, 0
        for _ in range(spec.stages):
            q = phases(left, 1e-6)
            left, total = left - q, total + q
        sums.append(total)
    u, w = sums
    return np.block([[u.real + w.real, w.imag - u.imag], [w.imag + u.imag, u.real - w.real]])


def rounded(x: np.ndarray, parts: int) -> np.ndarray:
    """Int8 codes per token and part, times their size, in float64."""
    pieces = x.reshape(*x.shape[:-1], parts, -1)
    levels = 127 / np.maximum(np.abs(pieces).max(-1, keepdims=True), 1e-5)
    return (np.clip(np.rint(pieces * levels), -128, 127) / levels).reshape(x.shape)


def test_the_widely_linear_form_is_the_matrix_and_turns_back():
    r = gaussian(14, 22)
    parts = widely_linear(r)
    assert float((real_matrix(parts) - r).abs().max()) < 1e-6
    u = parts.u_re.double().numpy() + 1j * parts.u_im.double().numpy()
    w = parts.w_re.double().numpy() + 1j * parts.w_im.double().numpy()
    x = gaussian(5, 22, seed=1).double().numpy()
    z = x[:, :11] + 1j * x[:, 11:]
    y = z @ u.T + z.conj() @ w.T
    np.testing.assert_allclose(np.hstack([y.real, y.imag]), x @ r.double().numpy().T, rtol=0, atol=1e-6)


def test_each_stage_leaves_less_of_a_gaussian_matrix():
    re, im = gaussian(1024, 1024, seed=5), gaussian(1024, 1024, seed=6)
    stages = residual_phases(re, im, 4, 1e-6)
    lefts = []
    for stage in stages:
        q_re, q_im = stage.dense()
        re, im = re - q_re, im - q_im
        lefts.append(float((re.square().mean() + im.square().mean()) / 2))
    # 1 - 2 / pi for one stage; the others are the published quantiser's, measured on Gaussian weights.
    np.testing.assert_allclose(lefts, [1 - 2 / np.pi, 0.130, 0.058, 0.033], atol=1.5e-3)


@pytest.mark.parametrize(("method", "low", "ratio"), [("ternary", -1, 1.0), ("int2", -2, 1.3)])
def test_lowbit_errors_are_those_of_the_gaussian_integral(method, low, ratio):
    weight = lowbit_quantize(gaussian(1500, 1500), QuantSpec(method))
    error = float((weight.dense() - gaussian(1500, 1500)).square().mean())
    t = np.linspace(-10, 10, 400_001)
    s = ratio * np.sqrt(2 / np.pi)  # the mean |w| of a unit Gaussian is sqrt(2 / pi)
    q = np.clip(np.round(t / s), low, 1) * s
    truth = np.sum((t - q) ** 2 * np.exp(-(t**2) / 2)) * (t[1] - t[0]) / np.sqrt(2 * np.pi)
    assert error == pytest.approx(truth, abs=1e-3)
    assert truth == pytest.approx({"ternary": 0.264, "int2": 0.149}[method], abs=1e-3)


def test_lowbit_levels_worked_by_hand():
    weight = torch.tensor([[1.5, -0.5, 0.5, -3.0], [0.0, 1.0, -1.0, 0.5]])  # mean |w| = 1
    ternary = lowbit_quantize(weight, QuantSpec("ternary"))
    assert ternary.levels.tolist() == [[1, 0, 0, -1], [0, 1, -1, 0]]  # halves go to the even level
    assert float(ternary.scale) == 1.0
    int2 = lowbit_quantize(weight, QuantSpec("int2", int2_ratio=1.0))
    assert int2.levels.tolist() == [[1, 0, 0, -2], [0, 1, -1, 0]]
    zero = lowbit_quantize(torch.zeros(2, 2), QuantSpec("ternary"))
    assert float(zero.scale) == pytest.approx(1e-5)
    assert not zero.dense().any()


def test_activations_are_rounded_per_token_and_part():
    x = torch.tensor([[127.0, 2.5, 3.5, -0.5, 0.0, 1.27], [1e-9, 0.0, -1e-9, 0.0, 0.0, 0.0]])
    one = round_activations(x, "int8")
    assert one[0].tolist() == [127.0, 2.0, 4.0, 0.0, 0.0, 1.0]
    two = round_activations(x, "int8", 2)
    # The second half has a largest entry of 1.27: codes are hundredths.
    torch.testing.assert_close(two[0], torch.tensor([127.0, 2.0, 4.0, -0.5, 0.0, 1.27]))
    assert not two[1].any()  # below the floor of 1e-5 / 127
    assert round_activations(x, "float") is x


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("act", ["float", "int8"])
@pytest.mark.parametrize("sizes", [(2, 2), (14, 22), (66, 514)])
def test_masters_and_packed_equal_numpy(spec, act, sizes):
    spec = QuantSpec(spec.method, spec.stages, act)
    master = layer(spec, *sizes, bias=spec.method != "phase")
    x = gaussian(7, 3, sizes[1], seed=8)
    x[0, 0] = 0
    parts = 2 if spec.method in ("phase", "fairy2i") else 1
    seen = rounded(x.double().numpy(), parts) if act == "int8" else x.double().numpy()
    want = seen @ dense_truth(master).T
    if getattr(master, "bias", None) is not None:
        want = want + master.bias.detach().double().numpy()
    packed = master.pack().eval()
    assert packed.codes.dtype == torch.uint8
    size = np.abs(want).max()
    for found in (master(x), packed(x)):
        assert np.abs(found.detach().double().numpy() - want).max() < 1e-5 * size
    np.testing.assert_allclose(packed.weight.double().numpy(), dense_truth(master), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        master.quantized_weight().detach().double().numpy(), dense_truth(master), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_gradients_pass_straight_through(spec):
    master = layer(spec, 10, 6)
    x = gaussian(5, 6, seed=8).requires_grad_()
    g = gaussian(5, 10, seed=9)
    master(x).backward(g)
    parts = 2 if spec.method in ("phase", "fairy2i") else 1
    seen, g = rounded(x.detach().double().numpy(), parts), g.double().numpy()
    np.testing.assert_allclose(x.grad.numpy(), g @ dense_truth(master), rtol=0, atol=1e-5)
    by_matrix = g.T @ seen  # the gradient of the real matrix, which the masters get as if it were theirs
    if spec.method == "phase":
        n, m = 5, 3
        np.testing.assert_allclose(
            master.weight_real.grad.numpy(), by_matrix[:n, :m] - by_matrix[n:, m:], rtol=0, atol=1e-5
        )
        np.testing.assert_allclose(
            master.weight_imag.grad.numpy(), by_matrix[:n, m:] + by_matrix[n:, :m], rtol=0, atol=1e-5
        )
    else:
        np.testing.assert_allclose(master.weight.grad.numpy(), by_matrix, rtol=0, atol=1e-5)


def test_low_precision_masters_keep_their_dtype():
    for spec in SPECS.values():
        master = layer(spec, 8, 12).to(torch.bfloat16)
        x = gaussian(3, 12).bfloat16()
        assert master(x).dtype == torch.bfloat16
        assert master.pack().eval()(x).dtype == torch.bfloat16


def built(raw, quant):
    return Decoder(ModelConfig.from_hf(raw | {"quantization_config": quant})).init_weights(0)


def test_linear_layers_are_replaced_and_names_stay():
    plain = Decoder(ModelConfig.from_hf(LLAMA))
    for method, kind in (("ternary", LowbitLinear), ("int2", LowbitLinear), ("fairy2i", Fairy2iLinear)):
        model = built(LLAMA, {"quant_method": method})
        assert list(model.state_dict()) == list(plain.state_dict())
        found = {name for name, module in model.named_modules() if isinstance(module, kind)}
        words = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        assert found == {f"model.layers.{i}.{word}" for i in range(2) for word in words}
        assert type(model.lm_head) is nn.Linear
    fairy = preset("fairy-tiny") | {"vocab_size": 64}
    model = built(fairy, {"quant_method": "phase"})
    assert (
        sum(isinstance(module, PhaseLinear) for module in model.modules()) == 7 * fairy["num_hidden_layers"]
    )
    assert type(model.lm_head) is nn.Linear


def test_named_modules_are_left_alone():
    skip = ["lm_head", "layers.1", "v_proj"]
    model = built(LLAMA, {"quant_method": "ternary", "modules_to_not_convert": skip})
    found = {name for name, module in model.named_modules() if isinstance(module, LowbitLinear)}
    words = [f"self_attn.{x}_proj" for x in "qko"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert found == {f"model.layers.0.{word}" for word in words}


def test_heads_of_multi_token_prediction_are_quantised_and_routers_are_not():
    model = built(FLASH, {"quant_method": "ternary", "modules_to_not_convert": ["lm_head", "experts"]})
    names = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    assert "model.mtp.layers.0.eh_proj" in names
    assert "model.layers.1.self_attn.q_proj" in names
    assert not any("experts" in name or name.endswith(".gate") for name in names)


@pytest.mark.parametrize("method", ["ternary", "fairy2i"])
def test_an_output_matrix_is_quantised_when_asked_and_the_losses_see_it(method):
    model = built(LLAMA, {"quant_method": method, "modules_to_not_convert": []})
    assert isinstance(model.lm_head, QuantLinear)
    x = gaussian(4, 16)
    torch.testing.assert_close(model.logits(x), x @ model.head_weight().T)
    np.testing.assert_allclose(
        model.head_weight().detach().double().numpy(), dense_truth(model.lm_head), rtol=0, atol=1e-6
    )


def test_odd_sizes_stay_and_are_logged(caplog):
    model = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 4), nn.Linear(4, 2))
    with caplog.at_level(logging.INFO, logger="sateen.nn"):
        quantize_linears(model, QuantSpec("fairy2i", skip=()))
    assert [type(module) for module in model] == [nn.Linear, nn.Linear, Fairy2iLinear]
    assert "2 layers of an odd size stay as they are: 0, 1" in caplog.text


@pytest.mark.parametrize(
    ("raw", "quant", "message"),
    [
        (
            FLASH,
            {"quant_method": "ternary"},
            r"not there for stacked experts \(model\.layers\.1\.mlp\.experts\)",
        ),
        (LLAMA, {"quant_method": "phase"}, r"'phase' found nothing to quantise; it is for complex layers"),
        (LLAMA, {"quant_method": "int2", "modules_to_not_convert": ["q_prj"]}, r"no module has 'q_prj'"),
        (
            LLAMA | {"tie_word_embeddings": True},
            {"quant_method": "int2", "modules_to_not_convert": []},
            r"lm_head is the embedding too .* add 'lm_head' to modules_to_not_convert",
        ),
        (LLAMA, {"quant_method": "fp8"}, r"quant_method 'fp8' is not supported; accepted: phase, fairy2i, "),
        (LLAMA, {"bits": 4}, r"quantization_config has no quant_method; accepted: phase, .*, none"),
        (LLAMA, "ternary", r"quantization_config is 'ternary'; a table with quant_method is expected"),
        (LLAMA, {"quant_method": "ternary", "stages": 2}, r"stages is 2; accepted for ternary: 1 to 1"),
        (LLAMA, {"quant_method": "fairy2i", "stages": 0}, r"stages is 0; accepted for fairy2i: 1 to 8"),
        (LLAMA, {"quant_method": "fairy2i", "activation": "float"}, r"did you mean activations\?"),
        (LLAMA, {"quant_method": "int2", "activations": "int4"}, r"activations 'int4' is not accepted"),
        (LLAMA, {"quant_method": "int2", "packed": "yes"}, r"packed is 'yes'; true or false is expected"),
        (LLAMA, {"quant_method": "int2", "int2_ratio": 0}, r"int2_ratio is 0; a number above 0"),
        (LLAMA, {"quant_method": "int2", "modules_to_not_convert": "lm_head"}, r"a list of module names"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_quantised_is_refused_in_one_line(raw, quant, message):
    with pytest.raises(ConfigError, match=message) as error:
        built(raw, quant)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", METHODS)
def test_a_spec_reads_back_as_it_was_written(method):
    spec = default_spec(method)
    assert read_quant(write_quant(spec), "config.json") == spec
    assert read_quant({"quant_method": method}, "config.json") == spec
    assert read_quant(None, "config.json") is None
    assert read_quant({"quant_method": "none"}, "config.json") is None


def test_packed_weights_refuse_to_train():
    packed = layer(QuantSpec("ternary"), 4, 4).pack()
    assert isinstance(packed, PackedLinear)
    assert not list(packed.parameters())
    with pytest.raises(ConfigError, match="packed two-bit weights do not train"):
        nn.Sequential(packed).train()
