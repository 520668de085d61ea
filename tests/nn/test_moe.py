"""The router and the experts against loops written here; replay, balance loss, bias update."""

from __future__ import annotations

import math

import pytest
import torch

from sateen.nn.attention import LayerLinks, Sequences
from sateen.nn.moe import MoE, Router, sequence_balance_loss, update_router_bias
from sateen.nn.spec import MoESpec

D, E, A, F = 6, 5, 2, 4


def make(seed=0, **changes):
    spec = MoESpec(num_experts=E, experts_per_token=A, intermediate_size=F, **changes)
    layer = MoE(D, spec, layer_index=3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.7, generator=generator)
        layer.gate.e_score_correction_bias.normal_(0.0, 0.5, generator=generator)
    return layer


def rows(T, seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def route_by_loop(layer, x):
    """For each token [(expert, weight)], best first, from the formulas of the paper in Python floats."""
    weight, bias = layer.gate.weight.tolist(), layer.gate.e_score_correction_bias.tolist()
    routes = []
    for token in x.tolist():
        scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(token, row, strict=True)))) for row in weight]
        ranked = sorted(range(E), key=lambda e: (-(scores[e] + bias[e]), e))[:A]
        total = sum(scores[e] for e in ranked) + 1e-20 if layer.spec.norm_topk_prob else 1.0
        routes.append([(e, scores[e] / total * layer.spec.routed_scaling_factor) for e in ranked])
    return routes


def expert_by_hand(layer, e, x):
    gate, up, down = (p[e].double() for p in layer.experts.parameters())
    g = gate @ x.double()
    return down @ (g / (1 + torch.exp(-g)) * (up @ x.double()))


def run(layer, x, links=None):
    links = LayerLinks() if links is None else links
    return layer(x, Sequences.of_lengths([x.shape[0]]), links), links


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("scaling", [1.0, 2.5])
@pytest.mark.usefixtures("poisoned_memory")
def test_router_and_experts_match_the_loop(norm_topk_prob, scaling):
    layer = make(norm_topk_prob=norm_topk_prob, routed_scaling_factor=scaling)
    x = rows(13)
    with torch.no_grad():
        out, links = run(layer, x)
        routes = route_by_loop(layer, x)
        for t, route in enumerate(routes):
            want = sum(weight * expert_by_hand(layer, e, x[t]) for e, weight in route)
            torch.testing.assert_close(out[t].double(), want, rtol=1e-5, atol=1e-5)
    assert links.router_ids[3].tolist() == [[e for e, _ in route] for route in routes]
    # Dropless: every choice is served, however uneven the load.
    counts = [sum(e == chosen for route in routes for chosen, _ in route) for e in range(E)]
    assert links.expert_counts[3].tolist() == counts
    assert sum(counts) == 13 * A


def test_a_load_of_one_expert_drops_nothing():
    layer = make()
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 9.0, 0.0, 8.0, 0.0]))
    x = rows(40)
    with torch.no_grad():
        out, links = run(layer, x)
        assert links.expert_counts[3].tolist() == [0, 40, 0, 40, 0]
        for t, route in enumerate(route_by_loop(layer, x)):
            want = sum(weight * expert_by_hand(layer, e, x[t]) for e, weight in route)
            torch.testing.assert_close(out[t].double(), want, rtol=1e-5, atol=1e-5)


def test_the_bias_selects_but_does_not_weigh():
    layer = make()
    x = rows(4)
    layer.gate.e_score_correction_bias.zero_()
    scores = layer.gate.scores(x)
    layer.gate.e_score_correction_bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0, 4.0]))
    ids = layer.gate.choose(scores)
    assert ids.tolist() == [[2, 4]] * 4
    want = scores[:, [2, 4]] / scores[:, [2, 4]].sum(-1, keepdim=True)
    torch.testing.assert_close(layer.gate.weights(scores, ids), want)


def test_ties_go_to_the_lower_expert():
    router = Router(D, MoESpec(num_experts=40, experts_per_token=3, intermediate_size=1))
    with torch.no_grad():
        router.weight.zero_()
    ids = router.choose(router.scores(rows(50)))
    assert ids.tolist() == [[0, 1, 2]] * 50
    router.e_score_correction_bias[[7, 39]] = 1.0
    assert router.choose(router.scores(rows(2))).tolist() == [[7, 39, 0]] * 2


def test_the_router_scores_in_float32_under_bfloat16_and_autocast():
    layer = make()
    x = rows(9)
    want = (x.double() @ layer.gate.weight.double().T).sigmoid()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer.gate.scores(x)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), want, rtol=1e-6, atol=1e-6)
    low = x.bfloat16()
    torch.testing.assert_close(
        layer.gate.scores(low).double(),
        (low.double() @ layer.gate.weight.double().T).sigmoid(),
        rtol=1e-6,
        atol=1e-6,
    )


def test_replaying_its_own_choice_is_the_identity():
    layer, x = make(), rows(11)
    out, links = run(layer, x)
    again, _ = run(layer, x, LayerLinks(forced_router_ids={3: links.router_ids[3].to(torch.uint8).clone()}))
    assert torch.equal(out, again)
    elsewhere, _ = run(layer, x, LayerLinks(forced_router_ids={2: links.router_ids[3].flip(0)}))
    assert torch.equal(out, elsewhere)


def differing(a, b):
    """Tokens whose rows differ by more than rounding: a product's rounding may depend on its other rows."""
    return (~torch.isclose(a, b, rtol=1e-5, atol=1e-6)).any(-1).nonzero().flatten().tolist()


def test_a_flipped_mask_changes_that_token_and_no_other():
    layer, x = make(), rows(11)
    out, links = run(layer, x)
    forced = links.router_ids[3].clone()
    unused = next(e for e in range(E) if e not in forced[4].tolist())
    forced[4, 0] = unused
    changed, links = run(layer, x, LayerLinks(forced_router_ids={3: forced}))
    assert differing(changed, out) == [4]
    scores = layer.gate.scores(x)[4]
    chosen = forced[4]
    weights = scores[chosen] / scores[chosen].sum()
    want = sum(w * expert_by_hand(layer, int(e), x[4]) for e, w in zip(chosen, weights, strict=True))
    torch.testing.assert_close(changed[4].double(), want, rtol=1e-5, atol=1e-5)
    assert links.router_ids[3].tolist() == forced.tolist()


def test_rows_of_minus_one_choose_freely():
    layer, x = make(), rows(6)
    out, links = run(layer, x)
    forced = torch.full((6, A), -1)
    assert torch.equal(run(layer, x, LayerLinks(forced_router_ids={3: forced}))[0], out)
    forced[2] = (links.router_ids[3][2] + 1) % E
    changed, _ = run(layer, x, LayerLinks(forced_router_ids={3: forced}))
    assert differing(changed, out) == [2]


def test_the_router_learns_through_the_chosen_experts_only():
    layer, x = make(), rows(7)
    forced = torch.tensor([[1, 4]] * 7)
    out, _ = run(layer, x, LayerLinks(forced_router_ids={3: forced}))
    out.square().sum().backward()
    touched = layer.gate.weight.grad.abs().sum(-1) > 0
    assert touched.tolist() == [False, True, False, False, True]
    for parameter in layer.experts.parameters():
        assert (parameter.grad.flatten(1).abs().sum(-1) > 0).tolist() == touched.tolist()


def test_balance_loss_by_hand():
    # Two sequences (2 and 1 tokens, an empty one between), 4 experts, one chosen per token.
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.2, 0.2, 0.2, 0.2], [0.9, 0.3, 0.3, 0.0]])
    ids = torch.tensor([[0], [1], [0]])
    # First: f = 4/(1*2) * [1, 1, 0, 0]; P, the mean of [.4 .1 ..] and [.25 .25 ..], is [.325 .175 ..]: 1.0.
    # Second: f = 4 * [1, 0, 0, 0], P = [.6 .2 .2 0] -> 2.4; the mean over the two is 1.7.
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    assert float(sequence_balance_loss(scores, ids, cu)) == pytest.approx(1.7)


def test_balance_loss_is_one_at_an_even_load_and_pulls_down_the_busy_expert():
    even = torch.tensor([[0, 1], [2, 3]])
    cu = torch.tensor([0, 2], dtype=torch.int32)
    assert float(sequence_balance_loss(torch.full((2, 4), 0.5), even, cu)) == pytest.approx(1.0)
    scores = torch.full((2, 4), 0.5, requires_grad=True)
    sequence_balance_loss(scores, torch.tensor([[0, 1], [0, 1]]), cu).backward()
    assert (scores.grad[:, :2] > 0).all()
    assert (scores.grad[:, 2:] < 0).all()


def test_the_balance_loss_is_computed_only_when_wanted():
    layer, x = make(), rows(6)
    _, links = run(layer, x)
    assert links.balance_losses == []
    links = LayerLinks(wants_balance_loss=True)
    layer(x, Sequences.of_lengths([4, 2]), links)
    want = sequence_balance_loss(layer.gate.scores(x), links.router_ids[3], torch.tensor([0, 4, 6]))
    assert [loss.item() for loss in links.balance_losses] == [pytest.approx(want.item())]


def test_the_bias_moves_towards_an_even_load():
    router = Router(D, MoESpec(num_experts=4, experts_per_token=1, intermediate_size=1))
    router.e_score_correction_bias.copy_(torch.tensor([0.5, 0.0, 0.0, 0.0]))
    update_router_bias(router, torch.tensor([10, 0, 4, 2]), rate=0.125)  # the mean is 4
    assert router.e_score_correction_bias.tolist() == [0.375, 0.125, 0.0, 0.125]
    assert not router.e_score_correction_bias.requires_grad
