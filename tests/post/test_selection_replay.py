"""Selection replay: training attends to the blocks that the sampler chose, whatever rounding would choose."""

from __future__ import annotations

import json

import pytest
import torch

from sateen.config import RLConfig
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences, hysparse
from sateen.nn.attention.replay import replayed_blocks
from sateen.post.algorithms import GRPO
from sateen.post.rollouts.source import _rollout, _values
from sateen.post.types import Rollout, pack_rollouts
from sateen.train.objective import TokenObjective

TINY = ("hysparse-tiny", "hysparse2-tiny")
SMALL = {"hysparse-tiny": {"sparse_topk_tokens": 16, "sparse_block_size": 4, "sliding_window": 8}}
ORACLES = {"hysparse-tiny": {0, 3}, "hysparse2-tiny": {3, 6}}


@pytest.fixture(scope="module", params=TINY)
def model(request):
    """In float64, so that engine and trainer choose alike where nothing disturbs the scores."""
    raw = preset(request.param) | {"initializer_range": 0.2} | SMALL.get(request.param, {})
    return Decoder(ModelConfig.from_hf(raw)).init_weights(5).double().eval()


def sample(model, **settings):
    settings = {"max_num_seqs": 3, "max_model_len": 256} | settings
    llm = LLM(model, record_selections=True, record_routing=True, **settings)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(500, (n,), generator=generator).tolist() for n in (70, 3, 41)]
    outputs = llm.generate(
        prompts,
        [
            SamplingParams(temperature=1.0, max_tokens=40, seed=i, logprobs=0, ignore_eos=True)
            for i in range(3)
        ],
    )
    rollouts = [
        Rollout(
            output.prompt_token_ids,
            output.outputs[0].token_ids,
            output.outputs[0].token_logprobs or [],
            reward=float(i == 0),
            router_ids=output.router_ids,
            selections=output.selections,
        )
        for i, output in enumerate(outputs)
    ]
    return rollouts, llm.stats()


@pytest.fixture(scope="module")
def rollouts(model):
    return sample(model)[0]


def lists_of(model, tokens):
    """Layer -> [K, T, n] of one forward without caches."""
    links = LayerLinks()
    with torch.inference_mode():
        model.trunk(torch.tensor(tokens), Sequences.of_lengths([len(tokens)]), links=links)
    return links.selections


def trainer_logprobs(model, batch, *, replays):
    """Of the labels, by a training forward as `TokenObjective` runs it."""
    links = LayerLinks(forced_router_ids=dict(batch.replay.router_ids))
    if replays:
        links.forced_selections = dict(batch.replay.selections)
    with torch.inference_mode():
        hidden = model.trunk(batch.input_ids, Sequences(batch.cu_seqlens, batch.position_ids), links=links)
        # The engine rounds logits to float32 before it takes the softmax.
        logprobs = model.logits(model.head_input(hidden)).float().log_softmax(-1)
    return logprobs.gather(-1, batch.labels.clamp(min=0)[:, None]).squeeze(-1)


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_num_batched_tokens": 16}, {"num_pages": 4, "max_num_batched_tokens": 48}],
    ids=["whole prompts", "chunks", "preempted"],
)
def test_recorded_lists_are_those_of_one_forward(model, settings):
    found, stats = sample(model, **settings)
    assert bool(stats["preemptions"]) == ("num_pages" in settings)
    assert stats["prefix"] is None
    for rollout in found:
        whole = lists_of(model, [*rollout.prompt_ids, *rollout.completion_ids])
        assert rollout.selections is not None
        assert set(rollout.selections) == ORACLES[name_of(model)]
        for layer, lists_TKn in rollout.selections.items():
            assert lists_TKn.dtype == torch.int32
            assert torch.equal(lists_TKn[:-1].transpose(0, 1), whole[layer][:, :-1])
            assert (lists_TKn[-1] == -1).all(), "the newest token has not been computed"


def name_of(model):
    return "hysparse2-tiny" if model.config.raw["sparse_bridge"] else "hysparse-tiny"


def test_replay_gives_the_samplers_logprobs_where_choosing_again_does_not(model, rollouts, monkeypatch):
    """A trainer with coarser scores: queries and keys rounded to bfloat16 before blocks are chosen."""
    batch = pack_rollouts(rollouts, [1.0, -1.0, 0.5])
    has_label = batch.labels >= 0
    sampled = batch.old_logprobs[has_label]
    whole = hysparse.ops.attention_and_blocks

    def rounded(q, k, v, **options):
        lists = whole(q.bfloat16().to(q.dtype), k.bfloat16().to(k.dtype), v, **options)[1]
        return whole(q, k, v, **options)[0], lists

    monkeypatch.setattr(hysparse.ops, "attention_and_blocks", rounded)
    replayed = trainer_logprobs(model, batch, replays=True)[has_label]
    again = trainer_logprobs(model, batch, replays=False)[has_label]
    # Attention and logits are float32 inside; choosing again is some ten thousand times further away.
    torch.testing.assert_close(replayed, sampled, rtol=0, atol=2e-5)
    assert (again - sampled).abs().max() > 1e-2


def test_the_objective_replays_and_gradients_follow_the_recorded_lists(model, rollouts):
    """Weights that moved choose other blocks; replay keeps the recorded ones, and oracles' keys learn."""
    batch = pack_rollouts(rollouts, [1.0, -1.0, 0.5])
    assert batch.replay is not None
    moved = Decoder(model.config).init_weights(6).double()
    seq = Sequences(batch.cu_seqlens, batch.position_ids)
    links = LayerLinks(forced_selections=dict(batch.replay.selections))
    free = LayerLinks()
    moved.trunk(batch.input_ids, seq, links=links)
    moved.trunk(batch.input_ids, seq, links=free)
    for layer, recorded in batch.replay.selections.items():
        is_known = (recorded >= 0).any(-1).any(0)
        assert is_known.sum() == batch.num_tokens - 3
        assert torch.equal(links.selections[layer][:, is_known], recorded[:, is_known])
        assert not torch.equal(free.selections[layer][:, is_known], recorded[:, is_known])
    losses = {}
    for name, replay in (("with", batch.replay), ("without", None)):
        objective = TokenObjective(GRPO(clip_low=0.99, clip_high=1e9))
        one = type(batch)(**vars(batch) | {"replay": replay})
        objective.begin_step([one])
        moved.zero_grad()
        loss = objective.loss(moved, one)
        loss.total.backward()
        losses[name] = loss.total.item()
        for layer in batch.replay.selections:
            gradient = moved.model.layers[layer].self_attn.k_proj.weight.grad
            assert gradient is not None
            assert float(gradient.abs().max()) > 0
    assert abs(losses["with"] - losses["without"]) > 1e-6


def test_tokens_without_lists_choose_freely():
    chosen = torch.tensor([[[0, 1], [0, 2], [1, 2]], [[0, 1], [1, 2], [0, 2]]], dtype=torch.int32)
    forced = torch.tensor([[[3, -1], [-1, -1], [-1, -1]], [[4, 5], [-1, -1], [6, -1]]])
    got = replayed_blocks(chosen, forced)
    assert got.dtype == torch.int32
    assert got.tolist() == [[[3, -1], [0, 2], [-1, -1]], [[4, 5], [1, 2], [6, -1]]]
    assert replayed_blocks(chosen, None) is chosen


def test_lists_survive_a_checkpoint(rollouts):
    again = _rollout(json.loads(json.dumps(_values(rollouts[1]))))
    assert again.selections is not None
    for layer, lists in rollouts[1].selections.items():
        assert again.selections[layer].dtype == lists.dtype
        assert torch.equal(again.selections[layer], lists)
    bare = Rollout([1], [2], [-0.5])
    assert _values(bare)["selections"] is None
    assert pack_rollouts([rollouts[0], bare], [1.0, 1.0]).replay is None


def test_lists_are_recorded_on_request_only(model):
    (output,) = LLM(model, max_model_len=64).generate([[1, 2, 3]])
    assert output.selections is None
    assert RLConfig.model_fields["replay_selections"].default is True
