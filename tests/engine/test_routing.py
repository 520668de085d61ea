"""Recorded routes equal those of one forward over the whole sequence, whatever steps the engine took."""

from __future__ import annotations

import pytest
import torch

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences

MOE = {1, 2, 3, 4, 5}  # layers of the preset that have experts


@pytest.fixture(scope="module")
def model():
    """In float64 and with wide scores, so that no rounding decides between two experts."""
    raw = preset("mimo-v2-flash-tiny") | {"initializer_range": 0.3, "num_nextn_predict_layers": 2}
    return Decoder(ModelConfig.from_hf(raw)).init_weights(3).double().eval()


def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(512, (n,), generator=generator).tolist() for n in (3, 40, 17, 64, 9)]


def expected(model, tokens):
    """Layer -> expert ids of a plain forward, without caches."""
    links = LayerLinks()
    with torch.no_grad():
        model.trunk(torch.tensor(tokens), Sequences.of_lengths([len(tokens)]), links=links)
    return {layer: ids for layer, ids in links.router_ids.items() if layer in MOE}


@pytest.mark.parametrize(
    "settings",
    [
        {"draft": "none"},
        {"draft": "none", "max_num_batched_tokens": 8},
        {"draft": "mtp"},
        {"draft": "none", "num_pages": 3, "max_model_len": 128, "max_num_batched_tokens": 24},
    ],
    ids=["whole prompts", "chunks", "drafts", "preempted"],
)
def test_routes_are_those_of_one_forward(model, settings):
    llm = LLM(model, record_routing=True, max_num_seqs=4, **{"max_model_len": 256} | settings)
    outputs = llm.generate(
        prompts(), [SamplingParams(temperature=1.0, max_tokens=30, seed=i, ignore_eos=True) for i in range(5)]
    )
    stats = llm.stats()
    assert bool(stats["preemptions"]) == ("num_pages" in settings)
    if settings["draft"] == "mtp":
        assert sum(stats["draft"]["accepted"]) < sum(stats["draft"]["drafted"])
    used = set()
    for output in outputs:
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        assert output.router_ids is not None
        assert set(output.router_ids) == MOE
        for layer, ids in expected(model, tokens).items():
            found = torch.tensor(output.router_ids[layer])
            assert torch.equal(found[:-1], ids[:-1].int())
            assert (found[-1] == -1).all(), "the newest token has not been computed"
            used |= {tuple(row) for row in found[:-1].tolist()}
    assert len(used) > 5, "routes that never differ would prove nothing"


def test_routes_are_recorded_on_request_only(model):
    (output,) = LLM(model, draft="none", max_model_len=64).generate([[1, 2, 3]])
    assert output.router_ids is None


def test_models_without_experts_have_none():
    raw = preset("mimo-v2-flash-tiny") | {"moe_layer_freq": [0] * 6, "num_nextn_predict_layers": 0}
    dense = Decoder(ModelConfig.from_hf(raw)).init_weights(0).eval()
    (output,) = LLM(dense, record_routing=True, max_model_len=64).generate([[1, 2, 3]])
    assert output.router_ids is None
