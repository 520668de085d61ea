"""Routing replay: training repeats the sampler's experts, also after the weights moved; the router learns."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from sateen.data.packing import IGNORE
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences
from sateen.post.algorithms import GRPO
from sateen.post.rollouts.source import _rollout
from sateen.post.types import Rollout, pack_rollouts
from sateen.train.objective import TokenObjective


@pytest.fixture(scope="module")
def model():
    raw = preset("mimo-v2-flash-tiny") | {"initializer_range": 0.3, "num_nextn_predict_layers": 0}
    return Decoder(ModelConfig.from_hf(raw)).init_weights(5).double()


@pytest.fixture(scope="module")
def rollouts(model):
    llm = LLM(model, record_routing=True, max_num_seqs=3, max_model_len=64)
    outputs = llm.generate(
        [[5, 6, 7], [9] * 12, [1, 2, 3, 4]],
        [SamplingParams(temperature=1.0, max_tokens=9, seed=i, logprobs=0) for i in range(3)],
    )
    return [
        Rollout(
            output.prompt_token_ids,
            output.outputs[0].token_ids,
            output.outputs[0].token_logprobs or [],
            reward=float(i == 0),
            router_ids=output.router_ids,
        )
        for i, output in enumerate(outputs)
    ]


def routes(model, batch, forced=None):
    """Layer -> [T, A] of a training forward."""
    links = LayerLinks(forced_router_ids=dict(forced or {}))
    model.trunk(batch.input_ids, Sequences(batch.cu_seqlens, batch.position_ids), links=links)
    return links.router_ids


def test_equal_weights_choose_what_was_recorded(model, rollouts):
    batch = pack_rollouts(rollouts, [1.0, -1.0, 0.5])
    assert batch.replay is not None
    is_newest = torch.zeros(batch.num_tokens, dtype=torch.bool)
    is_newest[batch.cu_seqlens[1:].long() - 1] = True
    chosen = routes(model, batch)
    assert set(batch.replay.router_ids) == set(chosen) == {1, 2, 3, 4, 5}
    for layer, recorded in batch.replay.router_ids.items():
        assert torch.equal(recorded[~is_newest], chosen[layer][~is_newest])
        assert (recorded[is_newest] == -1).all()
    assert (batch.labels[is_newest] == IGNORE).all(), "rows without routes carry no loss"


def test_replay_holds_after_the_weights_moved(model, rollouts):
    batch = pack_rollouts(rollouts, [1.0, -1.0, 0.5])
    assert batch.replay is not None
    moved = Decoder(model.config).init_weights(6).double()
    free, forced = routes(moved, batch), routes(moved, batch, batch.replay.router_ids)
    for layer, recorded in batch.replay.router_ids.items():
        is_known = recorded[:, 0] >= 0
        assert torch.equal(forced[layer][is_known], recorded[is_known])
        assert not torch.equal(free[layer][is_known], recorded[is_known])

    objective = TokenObjective(GRPO(clip_low=0.99, clip_high=1e9))
    objective.begin_step([batch])
    loss = objective.loss(moved, batch)
    loss.total.backward()
    for layer, counts in loss.expert_counts.items():
        assert torch.equal(counts, torch.bincount(forced[layer].flatten(), minlength=8))
        gradient = moved.moe_layers()[layer].gate.weight.grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0, "the weights of replayed experts are the trained router's"


def test_rollouts_without_routes_have_no_replay(rollouts):
    bare = Rollout([1], [2], [-0.5])
    assert pack_rollouts([bare], [1.0]).replay is None
    assert pack_rollouts([rollouts[0], bare], [1.0, 1.0]).replay is None


def test_routes_survive_a_checkpoint(rollouts):
    assert _rollout(json.loads(json.dumps(asdict(rollouts[1])))) == rollouts[1]
