"""The recorder against ids worked out from the router logits that transformers returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sateen.errors import ConfigError
from sateen.placement.recorder import record


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
        )
    )  # fmt: skip


def test_counts_are_those_of_the_logits(model):
    ids = torch.arange(22).view(2, 11)
    with record(model) as recorder, torch.no_grad():
        for step in (ids, ids.flip(0, 1) + 3):
            logits = model(step, output_router_logits=True).router_logits
            recorder.step()
    trace = recorder.trace()
    assert trace.counts_TLE.shape == (2, 2, 4)
    for layer in range(2):
        chosen = logits[layer].topk(2).indices.flatten().bincount(minlength=4)
        np.testing.assert_array_equal(trace.counts_TLE[1, layer], chosen)
    model(ids)  # detached again: this pass is not counted
    with pytest.raises(ConfigError, match="without tokens"):
        recorder.step()


def test_what_cannot_be_recorded():
    with pytest.raises(ConfigError, match="Linear has no module"), record(torch.nn.Linear(2, 2)):
        pass
