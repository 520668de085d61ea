"""Quantised and packed directories: tensors find their places, serving equals the masters, sizes add up."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import sateen
from sateen.checkpoint.convert import convert
from sateen.checkpoint.hf import load_model
from sateen.checkpoint.inspect import inspect, lines
from sateen.cli import main
from sateen.engine.contract import WeightUpdate
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.models.quantize import convert_fairy2i, pack_model, quantize_model, unquantize_model
from sateen.models.registry import preset
from sateen.nn.quant import PackedLinear
from sateen.nn.spec import QuantSpec

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    "max_position_embeddings": 128, "torch_dtype": "float32",
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False}
FLASH = preset("mimo-v2-flash-tiny") | {"vocab_size": 64}
FAIRY = preset("fairy-tiny") | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
KEPT = {"modules_to_not_convert": ["lm_head", "experts"]}
CASES = {
    "llama-fairy2i": (LLAMA, {"quant_method": "fairy2i"}),
    "llama-fairy2i-int8": (LLAMA, {"quant_method": "fairy2i", "stages": 3, "activations": "int8"}),
    "qwen2-int2": (QWEN, {"quant_method": "int2", "modules_to_not_convert": []}),
    "flash-ternary": (FLASH, {"quant_method": "ternary", "activations": "float"} | KEPT),
    "flash-fairy2i": (FLASH, {"quant_method": "fairy2i"} | KEPT),
    "fairy-phase": (FAIRY, {"quant_method": "phase", "activations": "float"}),
}
IDS = torch.arange(40).view(2, 20) % 64


def trained(raw, quant, seed=0):
    """A model whose biases are no zeros."""
    config = ModelConfig.from_hf(raw | {"quantization_config": quant})
    model = Decoder(config).init_weights(seed).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def gap(found, want):
    return float((found - want).norm() / want.norm())


@pytest.mark.parametrize(("raw", "quant"), CASES.values(), ids=CASES)
def test_packed_models_equal_their_masters_and_survive_the_disk(raw, quant, tmp_path):
    masters = trained(raw, quant)
    masters.save(tmp_path / "masters")
    again = load_model(tmp_path / "masters")
    assert torch.equal(logits(again), logits(masters))
    assert not [name for name in load_file(tmp_path / "masters" / "model.safetensors") if "codes" in name]

    packed = pack_model(again)
    assert gap(logits(packed), logits(masters)) < 1e-5
    packed.save(tmp_path / "packed")
    stored = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert stored["quantization_config"]["packed"] is True
    loaded = load_model(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(packed))
    for (name, a), (_, b) in zip(packed.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name
    assert count_parameters(loaded) == count_parameters(masters)


@pytest.mark.parametrize("name", ["llama-fairy2i", "flash-ternary", "fairy-phase"])
def test_generation_from_a_packed_directory_is_that_of_the_masters(name, tmp_path):
    masters = trained(*CASES[name])
    pack_model(masters).save(tmp_path / "packed")
    params = sateen.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[1, 2, 3], list(range(20))]
    first, second = (sateen.LLM(model).generate(prompts, params) for model in (masters, tmp_path / "packed"))
    assert [out.outputs[0].token_ids for out in first] == [out.outputs[0].token_ids for out in second]


def test_masters_come_back_as_they_were():
    plain = Decoder(ModelConfig.from_hf(LLAMA)).init_weights(0)
    back = unquantize_model(convert_fairy2i(plain, 2))
    assert back.config.raw == LLAMA
    for (name, a), (_, b) in zip(plain.state_dict().items(), back.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert back.lm_head.weight is back.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama-fairy2i", "flash-ternary", "fairy-phase"])
def test_packed_weights_unpack_to_a_model_in_floats(name, tmp_path):
    packed = pack_model(trained(*CASES[name]))
    plain = unquantize_model(packed)
    assert plain.config.quant is None
    assert not any(isinstance(module, PackedLinear) for module in plain.modules())
    assert gap(logits(plain), logits(packed)) < 1e-5
    plain.save(tmp_path / "plain")
    again = load_model(tmp_path / "plain")
    assert again.config.quant is None
    assert torch.equal(logits(again), logits(plain))


def test_codes_and_scales_keep_their_dtypes_in_half_precision(tmp_path):
    pack_model(trained(LLAMA, {"quant_method": "fairy2i"})).save(tmp_path / "packed")
    model = load_model(tmp_path / "packed", dtype="bfloat16")
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in model.state_dict().items()}
    assert kinds == {"weight": torch.bfloat16, "codes": torch.uint8, "scales": torch.float32}
    assert logits(model).dtype == torch.bfloat16
    model.save(tmp_path / "half")
    assert gap(logits(load_model(tmp_path / "half", dtype="float32")), logits(model).float()) < 2e-2


def test_bytes_are_counted_as_they_are_stored(tmp_path):
    masters = trained(LLAMA, {"quant_method": "fairy2i", "stages": 2})
    masters.save(tmp_path / "masters")
    pack_model(masters).save(tmp_path / "packed")
    weights = 2 * (32 * 32 * 2 + 16 * 32 * 2 + 3 * 48 * 32)
    found = inspect(tmp_path / "masters")["quant"]
    assert (found["layers"], found["weights"], found["bytes"]) == (14, weights, 4 * weights)
    # Both halves of 16 or 24 rows take 64, of 16 or 24 columns 256: 64 * 64 bytes for each of 2 * 2 stages.
    stored = 14 * (4 * 64 * 64 + 4 * 2 * 4)
    found = inspect(tmp_path / "packed")
    assert (found["quant"]["layers"], found["quant"]["weights"], found["quant"]["bytes"]) == (
        14,
        weights,
        stored,
    )
    assert found["weight_bytes"] == {"F32": 14 * 32 + 4 * (64 * 32 + 5 * 32), "U8": 14 * 4 * 64 * 64}
    assert any(
        line.startswith("two-bit     fairy2i, 2 stages, float activations, packed") for line in lines(found)
    )
    assert inspect(tmp_path / "masters")["parameters"] == found["parameters"]
    assert inspect("mimo-7b-tiny")["quant"] is None


def test_codes_that_are_floats_are_refused(tmp_path):
    pack_model(trained(LLAMA, {"quant_method": "ternary"})).save(tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.codes"
    save_file(tensors | {name: tensors[name].float()}, file)
    with pytest.raises(CheckpointError, match=rf"{name} is F32; readable: U8"):
        load_model(tmp_path / "packed")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(CheckpointError, match=rf"1 tensors are missing: {name}"):
        load_model(tmp_path / "packed")


def test_the_verb_converts_packs_and_turns_back(tmp_path, capsys):
    Decoder(ModelConfig.from_hf(QWEN)).init_weights(0).save(tmp_path / "plain")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    plain = load_model(tmp_path / "plain")

    def run(*words):
        code = main(["convert", *map(str, words)])
        return code, capsys.readouterr()

    code, said = run(tmp_path / "plain", tmp_path / "two", "--weights", "fairy2i", "--stages", "1")
    assert code == 0
    assert said.out == f"{tmp_path / 'two'}\n"
    assert (tmp_path / "two" / "tokenizer.json").read_text() == "{}"
    two = load_model(tmp_path / "two")
    assert two.config.quant == QuantSpec("fairy2i", stages=1, act="float")
    assert torch.equal(logits(two), logits(convert_fairy2i(plain, 1)))
    assert run(tmp_path / "two", tmp_path / "packed", "--weights", "packed")[0] == 0
    assert gap(logits(load_model(tmp_path / "packed")), logits(two)) < 1e-5
    assert run(tmp_path / "two", tmp_path / "back", "--weights", "float")[0] == 0
    assert torch.equal(logits(load_model(tmp_path / "back")), logits(plain))
    assert run(tmp_path / "back", tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    assert load_model(tmp_path / "half").lm_head.weight.dtype == torch.bfloat16
    words = ("--weights", "int2", "--activations", "float", "--skip", "lm_head,mlp")
    assert run(tmp_path / "plain", tmp_path / "half", *words)[0] == 0
    assert load_model(tmp_path / "half").config.quant == QuantSpec(
        "int2", act="float", skip=("lm_head", "mlp")
    )

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for words, message in [
        ((tmp_path / "plain", tmp_path / "mine"), "exists and is not a model directory"),
        ((tmp_path / "none", tmp_path / "x"), "no config.json here"),
        ((tmp_path / "plain", tmp_path / "x", "--weights", "packed"), "only quantised weights can be packed"),
        ((tmp_path / "plain", tmp_path / "x", "--weights", "float"), "no quantised weights to take off"),
        ((tmp_path / "plain", tmp_path / "x", "--weights", "phase"), "nothing to quantise"),
        ((tmp_path / "plain", tmp_path / "x", "--stages", "2"), "--stages is for --weights fairy2i"),
        ((tmp_path / "plain", tmp_path / "x", "--skip", "lm_head"), "--skip is for phase, fairy2i"),
        ((tmp_path / "plain", tmp_path / "x", "--weights", "fairy2i", "--stages", "9"), "1 to 8"),
        (
            (tmp_path / "plain", tmp_path / "x", "--activations", "int8"),
            "--activations is for phase, fairy2i",
        ),
        ((tmp_path / "two", tmp_path / "x", "--weights", "int2"), "the model has fairy2i weights already"),
    ]:
        code, said = run(*words)
        assert code == 2, words
        assert message in said.err
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_form_that_is_none_is_named():
    with pytest.raises(ConfigError, match=r"unknown --weights 'fairy2'; did you mean fairy2i\?"):
        convert(trained(LLAMA, None), weights="fairy2")


def test_the_engine_packs_complex_two_bit_weights():
    masters = trained(*CASES["fairy-phase"])
    llm = sateen.LLM(masters, weights="fairy2")
    assert llm.model.config.quant.packed
    params = sateen.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    want = sateen.LLM(masters).generate([[5, 6]], params)[0].outputs[0].token_ids
    assert llm.generate([[5, 6]], params)[0].outputs[0].token_ids == want
    # New values of the model it was made from reach the packed copy.
    other = trained(*CASES["fairy-phase"], seed=1)
    masters.load_state_dict(other.state_dict())
    llm.update_weights(WeightUpdate(1))
    assert torch.equal(logits(llm.model), logits(pack_model(other)))
    assert sateen.LLM(pack_model(masters), weights="fairy2").model.config.quant.packed


@pytest.mark.parametrize(
    ("weights", "quant", "error", "message"),
    [
        ("fairy2", None, ConfigError, "packs complex two-bit weights and this model's are full-precision"),
        ("fairy2", {"quant_method": "ternary"}, ConfigError, "this model's are ternary"),
        (
            "int8",
            {"quant_method": "ternary"},
            ConfigError,
            "a model in floating point and this one has ternary",
        ),
        ("fairy3", None, ConfigError, "did you mean fairy2"),
    ],
)
def test_weights_that_the_engine_does_not_have_are_refused(weights, quant, error, message):
    with pytest.raises(error, match=message):
        sateen.LLM(trained(LLAMA, quant), weights=weights)


def test_a_second_quantisation_and_an_empty_pack_are_refused():
    model = trained(LLAMA, {"quant_method": "ternary"})
    assert quantize_model(model, QuantSpec("ternary")) is model
    with pytest.raises(ConfigError, match="has ternary weights already; take them off first"):
        quantize_model(model, QuantSpec("int2"))
    with pytest.raises(ConfigError, match="already, packed"):
        quantize_model(pack_model(model), QuantSpec("ternary"))
    with pytest.raises(ConfigError, match="only quantised weights can be packed"):
        pack_model(trained(LLAMA, None))
