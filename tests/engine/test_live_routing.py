"""Greedy speculation on a mixture whose experts are chosen by content, not settled by a bias."""

import pytest
import torch

from sateen.engine.engine import LLM
from sateen.nn.moe import Router

MODEL = "mimo-v2-flash-tiny"


@pytest.fixture
def choices(monkeypatch):
    """Every router's choices, and the smallest distance between the last expert in and the first one out."""
    seen = {"ids": [], "margin": 1.0}
    choose = Router.choose

    def watched(self, scores_TE):
        ids_TA = choose(self, scores_TE)
        best = (scores_TE + self.e_score_correction_bias).sort(-1, descending=True).values
        A = ids_TA.shape[1]
        seen["margin"] = min(seen["margin"], float((best[:, A - 1] - best[:, A]).min()))
        seen["ids"].append(ids_TA)
        return ids_TA

    monkeypatch.setattr(Router, "choose", watched)
    return seen


@pytest.mark.parametrize("heads", [1, 3])
def test_greedy_speculation_equals_plain_decoding(
    heads, choices, drafting_model, make_prompts, tokens_of, greedy
):
    """Where no router nearly ties, rounding cannot flip a choice and the tokens must be equal."""
    model = drafting_model(MODEL, heads=heads, noise=0.2, strength=0.15)
    for moe in model.moe_layers().values():
        moe.gate.e_score_correction_bias.zero_()
        with torch.no_grad():
            moe.gate.weight.mul_(3.0)  # scores far apart
    prompts = make_prompts([20, 33], seed=5)
    plain = tokens_of(LLM(model, draft="none", step="torch"), prompts, greedy(24))
    drafted = LLM(model, draft="mtp", max_num_seqs=2, max_num_batched_tokens=16, step="torch")
    assert tokens_of(drafted, prompts, greedy(24)) == plain
    # What the comparison rests on: live routing, no near-tie, drafts both kept and rejected.
    chosen = torch.cat(choices["ids"])
    assert len(chosen.unique(dim=0)) > 10
    assert choices["margin"] > 1e-5
    assert 0.2 < drafted.stats()["acceptance_by_position"][0] < 0.99
