"""Layers that fall back to float attention: what is measured, which fall back, who hears of it."""

from __future__ import annotations

import logging

import pytest
import torch

from sateen import ops
from sateen.engine import int8_layers
from sateen.engine.contract import WeightUpdate
from sateen.engine.engine import LLM
from sateen.engine.int8_layers import PROBE_TOKENS
from sateen.engine.request import SamplingParams
from sateen.errors import BackendUnavailable, ConfigError
from sateen.nn.attention import Sequences
from sateen.ops.native import native_available

needs_kernels = pytest.mark.skipif(native_available() is not None, reason="needs the compiled kernels")
GREEDY = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True)


def engine(model, attention="int8", dtype="int8", **changes):
    settings = {"draft": "none", "max_model_len": 256, "attention": attention, "kv_cache_dtype": dtype}
    return LLM(model, **(settings | changes))


def test_the_error_of_the_first_layer_is_that_of_its_attention(mimo):
    """Against softmax attention in float64, written out, on the same queries, keys and values."""
    ids = torch.tensor([(7919 * i + 1) % mimo.config.vocab_size for i in range(PROBE_TOKENS)])
    ids = ids[: mimo.config.max_position_embeddings]
    seq, layer = Sequences.of_lengths([len(ids)]), mimo.model.layers[0]
    with torch.inference_mode():
        x = layer.input_layernorm(mimo.model.embed_tokens(ids))
        q, k, v = (x.double() for x in layer.self_attn.project(x, seq))
        group = q.shape[1] // k.shape[1]
        k8, v8 = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("tnh,snh->nts", q, k8) * q.shape[-1] ** -0.5
        scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
        want = torch.einsum("nts,snv->tnv", scores.softmax(-1), v8)
        offsets = {"cu_seqlens_q": seq.cu_seqlens, "cu_seqlens_k": seq.cu_seqlens}
        rows = ops.quantize_rows(k.float(), v.float(), seq.cu_seqlens)
        got = ops.int8_rows_attention(q.float(), rows, **offsets)
    found = engine(mimo, dtype="auto").stats()["int8_attention"]
    assert found["probe_tokens"] == len(ids)
    errors = found["errors"]
    assert list(errors) == [f"model.layers.{i}.self_attn" for i in range(mimo.config.num_hidden_layers)]
    assert errors["model.layers.0.self_attn"] == pytest.approx(
        float((got - want).norm() / want.norm()), abs=2e-4
    )


@pytest.mark.parametrize("dtype", ["int8", "auto"])
@pytest.mark.parametrize("name", ["flash", "mimo"])
def test_only_layers_above_the_budget_fall_back(name, dtype, request, make_prompts, caplog):
    model = request.getfixturevalue(name)
    prompts = make_prompts([70, 20])

    def logprobs(llm):
        return [output.outputs[0].token_logprobs for output in llm.generate(prompts, GREEDY)]

    errors = engine(model, dtype=dtype).stats()["int8_attention"]["errors"]
    assert all(0 < error < 0.05 for error in errors.values())
    largest = max(errors, key=errors.get)
    budget = sorted(errors.values())[-2]
    with caplog.at_level(logging.WARNING, "sateen.engine"):
        some = engine(model, dtype=dtype, int8_budget=budget)
    assert some.stats()["int8_attention"]["float_layers"] == [largest]
    assert largest in caplog.text
    every = engine(model, dtype=dtype, int8_budget=1e-9)
    assert every.stats()["int8_attention"]["float_layers"] == list(errors)
    found = [
        logprobs(llm) for llm in (engine(model, dtype=dtype), some, every, engine(model, "float", dtype))
    ]
    assert found[2] == [pytest.approx(row, abs=1e-5) for row in found[3]]
    assert found[0] != found[1] != found[2]


def test_half_errs_less_than_full(mimo):
    full, half = (
        engine(mimo, form, "auto").stats()["int8_attention"]["errors"] for form in ("int8", "int8-half")
    )
    assert all(half[layer] < full[layer] for layer in full)


def test_new_weights_are_measured_anew(mimo, make_prompts):
    llm = engine(mimo)
    before = llm.stats()["int8_attention"]["errors"]
    weights = {name: tensor.clone() for name, tensor in mimo.state_dict().items()}
    for name in weights:
        if name.endswith("q_proj.weight"):
            weights[name] *= 8
    old = {name: tensor.clone() for name, tensor in mimo.state_dict().items()}
    try:
        llm.update_weights(WeightUpdate(1, weights))
        after = llm.stats()["int8_attention"]["errors"]
        assert all(after[layer] > before[layer] for layer in before)
        llm.generate(make_prompts([9]), GREEDY)
    finally:
        mimo.load_state_dict(old)


class OtherLevel:
    """The compiled kernels as another processor would name them."""

    def __init__(self, isa):
        self.isa = isa

    def current_isa(self):
        return self.isa


@needs_kernels
def test_auto_is_integers_over_int8_rows(mimo, make_prompts):
    prompts = make_prompts([70, 20])
    found = {}
    for attention in ("auto", "int8", "float"):
        llm = engine(mimo, attention)
        texts = [output.outputs[0].token_logprobs for output in llm.generate(prompts, GREEDY)]
        found[attention] = texts, llm.stats()["int8_attention"]
    assert found["auto"] == found["int8"]
    assert found["auto"][1]["attention"] == "int8"
    assert found["auto"][1]["kv_cache_dtype"] == "int8"
    assert found["float"][1] is None
    assert found["float"][0] != found["auto"][0]
    assert engine(mimo, "auto", "auto").stats()["int8_attention"] is None
    assert engine(mimo, "auto", "bf16").stats()["int8_attention"] is None


@needs_kernels
@pytest.mark.parametrize(("isa", "is_integer"), [("generic", False), ("avx2", True), ("avx512", True)])
def test_auto_is_the_faster_form_of_the_processor(isa, is_integer, mimo, make_prompts, monkeypatch, caplog):
    """A decode step over int8 rows was measured at each level; plain code is slower with integers."""
    monkeypatch.setattr(int8_layers, "native", lambda: OtherLevel(isa))
    with caplog.at_level(logging.WARNING, "sateen.engine"):
        llm = engine(mimo, "auto")
        assert (llm.stats()["int8_attention"] is not None) == is_integer
        assert llm.cache.attention == ("int8" if is_integer else "float")
        assert not caplog.text
        llm.generate(make_prompts([9]), GREEDY)
        assert engine(mimo, "int8").stats()["int8_attention"] is not None
    assert len(caplog.records) == (isa != "avx512")


def test_auto_without_compiled_kernels_is_floating_point(mimo, monkeypatch):
    monkeypatch.setattr(int8_layers, "native_available", lambda: "no compiler")
    assert engine(mimo, "auto").stats()["int8_attention"] is None


def test_auto_serves_layers_that_have_no_integer_form(hysparse, make_prompts):
    llm = engine(hysparse, "auto")
    assert llm.stats()["int8_attention"] is None
    want = engine(hysparse, "float").generate(make_prompts([20]), GREEDY)
    got = llm.generate(make_prompts([20]), GREEDY)
    assert got[0].outputs[0].token_logprobs == want[0].outputs[0].token_logprobs


def test_rows_that_are_quantised_again_and_again_are_told(mimo, caplog):
    with caplog.at_level(logging.WARNING, "sateen.engine"):
        engine(mimo, "int8", "fp32")
        assert "kv_cache_dtype='int8'" in caplog.text


def test_refusals(mimo, hysparse):
    assert engine(mimo, "float").stats()["int8_attention"] is None
    assert engine(mimo, "int8-half", "auto").stats()["int8_attention"]["attention"] == "int8-half"
    with pytest.raises(ConfigError, match="int8_budget is 0"):
        engine(mimo, int8_budget=0)
    with pytest.raises(ConfigError, match="attention"):
        engine(mimo, "int4")
    with pytest.raises(BackendUnavailable, match="attention 'int8-half' cannot serve layer"):
        engine(hysparse, "int8-half")
