"""Models with weights of eight and four bits against the floats they were made from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sateen
from sateen import ops
from sateen.engine.contract import WeightUpdate
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.lowbit import lowbit_model
from sateen.models.quantize import quantize_model
from sateen.models.registry import preset
from sateen.nn.quant.int8 import IntegerExperts, IntegerHead, IntegerLinear
from sateen.nn.spec import QuantSpec

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
    "max_position_embeddings": 128, "torch_dtype": "float32", "initializer_range": 0.1,
}  # fmt: skip
QWEN = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False}
FLASH = preset("mimo-v2-flash-tiny") | {"vocab_size": 64, "initializer_range": 0.1}
MODELS = {"llama": LLAMA, "qwen2": QWEN, "flash": FLASH}
IDS = torch.arange(40).view(2, 20) % 64
GREEDY = sateen.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def built(raw, seed=0):
    """A model whose biases are no zeros, with experts that no rounding swaps."""
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(seed).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias += 2.0 * torch.arange(moe.spec.num_experts)
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def gap(got, want):
    return float((got - want).norm() / want.norm())


def rounded(model, weights):
    """The model in floats whose linear weights are the values that the codes stand for."""
    other = built(model.config.raw)
    other.load_state_dict(model.state_dict())
    if other.config.tie_word_embeddings:
        other.lm_head.weight = nn.Parameter(other.lm_head.weight.clone())
    pack = {"int8": ops.pack_int8, "int4": ops.pack_int4}

    def again(matrix, how):
        return ops.unpack_lowbit(pack[how](matrix))

    with torch.no_grad():
        for name, module in other.named_modules():
            if type(module) is nn.Linear:
                module.weight.copy_(again(module.weight, "int8" if name == "lm_head" else weights))
        for moe in other.moe_layers().values():
            for stack in moe.experts.parameters():
                for matrix in stack:
                    matrix.copy_(again(matrix, weights))
    return other


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_rounded_weights(name, weights):
    model = built(MODELS[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    packed = lowbit_model(model, weights)
    got, want = logits(packed), logits(model)
    assert gap(got, logits(rounded(model, weights))) < 0.03  # inputs are rounded to int8
    assert gap(got, want) < {"int8": 0.04, "int4": 0.3}[weights]
    assert gap(got, want) > 1e-4
    # The given model is as it was.
    assert not any(isinstance(module, IntegerLinear) for module in model.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_packed_and_what_is_shared(name):
    model = built(MODELS[name])
    packed = lowbit_model(model, "int4")
    assert packed.lm_head.weights == "int8"
    assert packed.model.embed_tokens.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    layer, original = packed.model.layers[1], model.model.layers[1]
    assert layer.input_layernorm.weight.data_ptr() == original.input_layernorm.weight.data_ptr()
    assert layer.self_attn.q_proj.weights == "int4"
    if original.self_attn.q_proj.bias is not None:
        assert layer.self_attn.q_proj.bias.data_ptr() == original.self_attn.q_proj.bias.data_ptr()
    assert not any(type(module) is nn.Linear for module in packed.modules())
    for index, moe in model.moe_layers().items():
        found = packed.moe_layers()[index]
        assert isinstance(found.experts, IntegerExperts)
        assert found.gate.weight.data_ptr() == moe.gate.weight.data_ptr()
    F, D = original.self_attn.q_proj.weight.shape
    assert layer.self_attn.q_proj.codes.numel() == F * D // 2
    assert layer.self_attn.q_proj.scales.numel() == F * D // 32 * 2
    assert packed.head_weight().shape == (64, model.config.hidden_size)


def test_bfloat16_models_stay_in_bfloat16():
    model = built(LLAMA).bfloat16()
    packed = lowbit_model(model, "int8")
    assert logits(packed).dtype == torch.bfloat16
    assert packed.head_weight().dtype == torch.bfloat16
    assert gap(logits(packed).float(), logits(model).float()) < 0.05


def test_models_that_cannot_be_packed_are_refused(tmp_path):
    model = built(LLAMA)
    with pytest.raises(ConfigError, match="unknown weights 'int3'"):
        lowbit_model(model, "int3")
    with pytest.raises(ConfigError, match="packs a model in floating point and this one has fairy2i"):
        lowbit_model(quantize_model(model, QuantSpec("fairy2i")), "int8")
    fairy = preset("fairy-tiny") | {"vocab_size": 64, "quantization_config": {"quant_method": "none"}}
    with pytest.raises(ConfigError, match="found no linear layers to pack"):
        lowbit_model(built(fairy), "int4")
    packed = lowbit_model(model, "int4")
    with pytest.raises(ConfigError, match="int8 weights are for serving and do not train"):
        packed.lm_head.train()
    with pytest.raises(ConfigError, match="this one is int4 already"):
        lowbit_model(packed, "int8")
    with pytest.raises(CheckpointError, match="int4 weights is for serving and is not saved"):
        packed.save(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("name", "weights"), [("llama", "int8"), ("qwen2", "int4"), ("flash", "int4")])
def test_the_engine_serves_and_takes_new_weights(name, weights, tmp_path):
    model = built(MODELS[name])
    llm = sateen.LLM(model, weights=weights, max_num_seqs=2)

    def tokens(engine):
        return [out.outputs[0].token_ids for out in engine.generate([[5, 6], [7, 8, 9, 10]], GREEDY)]

    assert tokens(llm) == tokens(sateen.LLM(lowbit_model(model, weights), max_num_seqs=2))
    # New values of the model it was made from, then tensors, then a directory.
    for version, source in enumerate(("model", "tensors", "folder"), 1):
        other = built(MODELS[name], seed=version)
        if source == "model":
            model.load_state_dict(other.state_dict())
            llm.update_weights(WeightUpdate(version))
        elif source == "tensors":
            llm.update_weights(WeightUpdate(version, other.state_dict()))
        else:
            other.save(tmp_path)
            llm.update_weights(WeightUpdate(version, tmp_path))
        assert torch.equal(logits(llm.model), logits(lowbit_model(other, weights)))


def test_an_update_that_does_not_fit_changes_nothing():
    llm = sateen.LLM(built(LLAMA), weights="int8")
    before = logits(llm.model)
    whole = built(LLAMA, seed=1).state_dict()
    for broken in (
        {key: x for key, x in whole.items() if "q_proj" not in key},
        whole | {"model.layers.0.mlp.up_proj.weight": torch.zeros(3, 64)},
        whole | {"extra.weight": torch.zeros(1)},
    ):
        with pytest.raises(CheckpointError, match="the weights are not this model's"):
            llm.update_weights(WeightUpdate(1, broken))
        assert torch.equal(logits(llm.model), before)


def test_the_output_matrix_reads_its_inputs_more_finely():
    torch.manual_seed(0)
    linear = torch.nn.Linear(200, 64, bias=True)
    x = torch.randn(5, 200) * torch.logspace(-3, 3, 5)[:, None]
    with torch.no_grad():
        plain, head = IntegerLinear(linear, "int8"), IntegerHead(linear, "int8")
        product = x.double() @ head.weight.double().T
        want = product + linear.bias.double()
        errors = [(layer(x).double() - want).norm(dim=1) / product.norm(dim=1) for layer in (plain, head)]
    assert errors[0].min() > 1e-3
    assert errors[1].max() < 3e-5
    assert head(x[:0]).shape == (0, 64)
