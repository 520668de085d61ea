"""Token losses, MTP and balance on tiny real decoders, against plain cross-entropy on full logits."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from sateen.data.packing import IGNORE, Replay, TokenSignals, pack
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention.base import LayerLinks, Sequences
from sateen.train.objective import CrossEntropy, TokenObjective, signal_losses


def tiny(name: str, **overrides) -> Decoder:
    raw = preset(f"{name}-tiny") | {"vocab_size": 61, "initializer_range": 0.1} | overrides
    return Decoder(ModelConfig.from_hf(raw)).double().init_weights(0)


def batch_of(*lengths: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    batch = pack([torch.randint(0, 61, (n,), generator=g).tolist() for n in lengths])
    batch.labels[1] = IGNORE
    return batch


def plain_losses(model: Decoder, batch) -> dict[str, torch.Tensor]:
    """Mean cross-entropy of the trunk and of each MTP head, sequence by sequence from full logits."""
    sums: dict[str, list[torch.Tensor]] = {}
    chained = model.config.mtp is not None and model.config.mtp.is_chained
    bounds = batch.cu_seqlens.tolist()
    for a, b in pairwise(bounds):
        ids, labels = batch.input_ids[a:b], batch.labels[a:b]
        seq = Sequences.of_lengths([b - a])
        hidden = model.trunk(ids, seq)
        logits = model.logits(model.head_input(hidden))
        sums.setdefault("main", []).append(F.cross_entropy(logits, labels, reduction="none"))
        for k in range(model.num_mtp_heads):
            following = torch.cat([ids[k + 1 :], torch.zeros(min(k + 1, b - a), dtype=torch.int64)])
            chain, head = model.mtp(k, hidden, following, seq)
            hidden = chain if chained else hidden
            useful = max(b - a - k - 1, 0)
            rows = F.cross_entropy(model.logits(head)[:useful], labels[k + 1 :], reduction="none")
            sums.setdefault(f"mtp_{k}", []).append(rows[labels[k + 1 :] != IGNORE])
    sums["main"] = [torch.cat(sums["main"])[batch.labels != IGNORE]]
    return {name: torch.cat(rows).mean() for name, rows in sums.items()}


def gradients(model: Decoder) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", ["mimo-7b", "mimo-v2-flash"])
def test_loss_and_gradients_equal_plain_cross_entropy(family):
    """Two heads, so that chaining shows; sequences of 1 and 2 tokens have no far labels."""
    model = tiny(family, num_nextn_predict_layers=2)
    batch = batch_of(19, 1, 2, 7)
    objective = TokenObjective(CrossEntropy(), mtp_weight=0.3)
    objective.begin_step([batch])
    got = objective.loss(model, batch)
    got.total.backward()
    got_gradients = gradients(model)
    want = plain_losses(model, batch)
    total = want["main"] + 0.3 * (want["mtp_0"] + want["mtp_1"]) / 2
    total.backward()
    for name, value in want.items():
        torch.testing.assert_close(got.parts[name].double(), value.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.total.detach().double(), total.detach(), rtol=1e-6, atol=1e-6)
    want_gradients = gradients(model)
    assert got_gradients.keys() == want_gradients.keys()
    for name, value in want_gradients.items():
        error = (got_gradients[name] - value).norm() / value.norm().clamp(min=1e-9)
        assert error < 1e-5, (name, float(error))


def test_micro_batches_add_up_to_the_whole_batch():
    """The halves hold 21 and 9 labelled tokens: averaging two means would be wrong."""
    model = tiny("mimo-v2-flash", num_nextn_predict_layers=1)
    whole = batch_of(23, 11)
    halves = [pack([whole.input_ids[:23].tolist()], [whole.labels[:23].tolist()])]
    halves.append(pack([whole.input_ids[23:].tolist()], [whole.labels[23:].tolist()]))
    objective = TokenObjective(CrossEntropy(), mtp_weight=0.3)
    totals = []
    for batches in ([whole], halves):
        objective.begin_step(batches)
        losses = [objective.loss(model, b) for b in batches]
        totals.append(sum(loss.total for loss in losses))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-6, atol=1e-6)


def test_detach_trunk_and_head_keep_mtp_gradients_inside_the_heads():
    model = tiny("mimo-7b")
    batch = batch_of(9)

    def touched(**options: bool) -> set[str]:
        objective = TokenObjective(NoTokens(), mtp_weight=1.0, **options)
        objective.begin_step([batch])
        objective.loss(model, batch).total.backward()
        return {n for n, g in gradients(model).items() if g.abs().max() > 0}

    everything = touched()
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= everything
    inside = touched(detach_trunk=True, detach_head=True)
    assert inside
    assert all(".mtp_layers." in name for name in inside)
    assert touched(detach_trunk=True) == inside | {"lm_head.weight", "model.embed_tokens.weight"}


def test_heads_alone_learn_when_the_trunk_is_not_trained():
    model = tiny("mimo-7b")
    batch = batch_of(9)
    objective = TokenObjective(CrossEntropy(), mtp_weight=1.0, detach_head=True, trains_trunk=False)
    objective.begin_step([batch])
    loss = objective.loss(model, batch)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(loss.parts["mtp"].item(), rel=1e-6)
    assert loss.parts["main"] > 0
    assert all(".mtp_layers." in name for name in gradients(model))


def test_balance_loss_is_weighted_by_tokens_and_summed_over_layers():
    model = tiny("mimo-v2-flash")
    batch = batch_of(12, 5)
    links = LayerLinks(wants_balance_loss=True)
    model.trunk(batch.input_ids, Sequences(batch.cu_seqlens, batch.position_ids), links=links)
    want = sum(links.balance_losses)
    assert len(links.balance_losses) == len(model.moe_layers())
    objective = TokenObjective(NoTokens(), balance_weight=0.5)
    objective.begin_step([batch, batch_of(17)])  # the batch has 17 of the step's 34 tokens
    loss = objective.loss(model, batch)
    torch.testing.assert_close(loss.parts["balance"], want.detach() / 2)
    torch.testing.assert_close(loss.total.detach(), 0.5 * want.detach() / 2)


def test_expert_counts_cover_every_token():
    model = tiny("mimo-v2-flash")
    batch = batch_of(12, 5)
    objective = TokenObjective(CrossEntropy())
    objective.begin_step([batch])
    counts = objective.loss(model, batch).expert_counts
    assert counts.keys() == model.moe_layers().keys()
    assert {int(c.sum()) for c in counts.values()} == {17 * 2}


def test_replay_forces_the_recorded_experts():
    model = tiny("mimo-v2-flash")
    batch = batch_of(12)
    layer = next(iter(model.moe_layers()))
    forced = torch.tensor([[6, 7]]).expand(12, 2)
    replayed = replace(batch, replay=Replay(router_ids={layer: forced}))
    objective = TokenObjective(CrossEntropy())
    objective.begin_step([replayed])
    counts = objective.loss(model, replayed).expert_counts[layer]
    assert counts.tolist() == [0, 0, 0, 0, 0, 0, 12, 12]


def test_signals_by_hand():
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    signals = TokenSignals(
        policy_T=torch.tensor([0.5, -1.0, 0.0]),
        ce_T=torch.tensor([0.0, 0.0, 2.0]),
        ref_kl_T=torch.tensor([0.1, 0.0, 0.0]),
        ref_logprobs_T=torch.tensor([-1.0 + 0.6931472, 0.0, 0.0]),
    )
    parts = signal_losses(signals, logprobs)
    assert parts["policy"].item() == pytest.approx(0.5 * 1 - 1.0 * 2)
    assert parts["main"].item() == pytest.approx(6.0)
    assert parts["ref_kl"].item() == pytest.approx(0.1 * (2 - 1 - 0.6931472))
    sum(parts.values()).backward()
    # The divergence's gradient is 0.1 * (1 - r) with r = 2.
    assert logprobs.grad.tolist() == pytest.approx([-0.5 - 0.1, 1.0, -2.0])


class NoTokens:
    """An algorithm that trains no token."""

    needs_logprobs = False

    def begin_step(self, batches):
        pass

    def signals(self, batch, logprobs_T):
        assert logprobs_T is None
        return TokenSignals()


class FromLogprobs:
    """Weights every labelled token by its probability, and adds a soft target on two tokens."""

    needs_logprobs = True

    def begin_step(self, batches):
        pass

    def signals(self, batch, logprobs_T):
        assert not logprobs_T.requires_grad
        n = batch.num_tokens
        return TokenSignals(
            policy_T=logprobs_T.exp() * (batch.labels != IGNORE),
            target_ids_TK=torch.tensor([[3, 5]]).expand(n, 2),
            target_logprobs_TK=torch.tensor([[0.25, 0.75]]).log().expand(n, 2),
        )


def test_an_algorithm_that_reads_logprobs_and_soft_targets():
    model = tiny("mimo-7b", num_nextn_predict_layers=None)
    batch = batch_of(9)
    objective = TokenObjective(FromLogprobs())
    objective.begin_step([batch])
    objective.loss(model, batch).total.backward()
    got = gradients(model)
    logits = model.logits(model.head_input(model.trunk(batch.input_ids, Sequences.of_lengths([9]))))
    logp = torch.log_softmax(logits, -1)
    keep = batch.labels != IGNORE
    own = logp[keep].gather(1, batch.labels[keep][:, None])[:, 0]
    want = -(own.detach().exp() * own).sum() - (0.25 * logp[:, 3] + 0.75 * logp[:, 5]).sum()
    want.backward()
    for name, value in gradients(model).items():
        assert (got[name] - value).norm() / value.norm().clamp(min=1e-9) < 1e-5, name
