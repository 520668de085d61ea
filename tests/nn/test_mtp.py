"""MTP heads: which tokens a row reads, what it predicts, the order of the joined halves, chaining."""

from __future__ import annotations

import pytest
import torch

from sateen.data.packing import IGNORE, pack
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences

FORMS = {"mimo-7b-tiny": True, "mimo-v2-flash-tiny": False}  # preset -> heads are chained
HEADS = 3


def make(name, **changes):
    raw = preset(name) | {"num_nextn_predict_layers": HEADS, "initializer_range": 0.3} | changes
    return Decoder(ModelConfig.from_hf(raw)).init_weights(0).double()


def all_heads(model, ids):
    """Outputs of each head, rows that lack a token to read left out."""
    T, outs = len(ids), []
    with torch.no_grad():
        hidden = model.trunk(ids, Sequences.of_lengths([T]))
        for k in range(HEADS):
            rows = T - k - 1
            hidden, out = model.mtp(k, hidden[:rows], ids[k + 1 :], Sequences.of_lengths([rows]))
            outs.append(out)
    return outs


def changed_rows(before, after):
    # Rounding differs with the number of rows an expert receives; a real change is far larger.
    return [
        ((a - b).abs() > 1e-5).any(-1).nonzero().flatten().tolist()
        for a, b in zip(before, after, strict=True)
    ]


@pytest.mark.parametrize("name", FORMS)
def test_row_t_of_head_k_reads_the_state_of_t_and_the_token_at_t_plus_k_plus_1(name):
    model = make(name)
    for module_name, parameter in model.named_parameters():
        if module_name.endswith("o_proj.weight"):
            parameter.data.zero_()  # without attention a row sees its own inputs only
    ids = torch.arange(10)
    before = all_heads(model, ids)
    ids[6] = 99
    for k, rows in enumerate(changed_rows(before, all_heads(model, ids))):
        # As the state of row 6, as the token of row 5 - k; where heads are chained, as an earlier head's too.
        reads = range(5 - k, 7) if FORMS[name] else (5 - k, 6)
        assert rows == [row for row in reads if row < 10 - k - 1]


@pytest.mark.parametrize("name", FORMS)
def test_tokens_beyond_t_plus_k_plus_1_never_change_row_t(name):
    model = make(name)
    ids = torch.arange(24)
    before = all_heads(model, ids)
    for j in (8, 20):
        other = ids.clone()
        other[j] = 99
        for k, rows in enumerate(changed_rows(before, all_heads(model, other))):
            assert rows[0] == j - k - 1
            assert j in rows or j >= 24 - k - 1


def test_head_k_is_trained_on_the_token_at_t_plus_k_plus_2():
    first, second = [10, 11, 12, 13, 14], [20, 21, 22]
    batch = pack([first, second])
    for k in range(HEADS):
        want = [
            sequence[t + k + 2] if t + k + 2 < len(sequence) else IGNORE
            for sequence in (first, second)
            for t in range(len(sequence))
        ]
        assert batch.shifted_labels(k + 1).tolist() == want


@pytest.mark.parametrize(("name", "first"), [("mimo-7b-tiny", "hidden"), ("mimo-v2-flash-tiny", "embedding")])
def test_the_first_half_of_the_join_belongs_to_the_published_input(name, first):
    model = make(name)
    head, D = model.mtp_heads()[0], model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    inputs = {x: torch.randn(4, D, generator=generator, dtype=torch.float64) for x in ("hidden", "embedding")}
    join = getattr(head, {"hidden": "input_proj", "embedding": "eh_proj"}[first])
    with torch.no_grad():
        join.weight[:, :D] = 0
        for zeroed in inputs:
            out = head.join(inputs["hidden"], inputs["embedding"])
            other = head.join(**{f"{x}_TD": t.flip(0) if x == zeroed else t for x, t in inputs.items()})
            assert torch.equal(out, other) == (zeroed == first)


@pytest.mark.parametrize("name", FORMS)
def test_what_the_next_head_receives(name):
    model = make(name)
    ids = torch.arange(6)
    with torch.no_grad():
        hidden = model.trunk(ids, Sequences.of_lengths([6]))
        passed, out = model.mtp(0, hidden, ids, Sequences.of_lengths([6]))
    assert torch.equal(passed, out if FORMS[name] else hidden)
    assert not torch.equal(hidden, model.head_input(hidden))  # the heads read the state before the final norm


@pytest.mark.parametrize("name", FORMS)
def test_packed_heads_equal_separate_ones_and_every_parameter_learns(name):
    model = make(name)
    lengths = [9, 1, 20]
    ids = torch.arange(sum(lengths))
    seq = Sequences.of_lengths(lengths)
    hidden = torch.randn(
        sum(lengths),
        model.config.hidden_size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(2),
    )
    parts = []
    for k in range(HEADS):
        _, out = model.mtp(k, hidden, ids, seq, links=LayerLinks())
        for rows, states, tokens in zip(
            out.split(lengths), hidden.split(lengths), ids.split(lengths), strict=True
        ):
            alone = model.mtp(k, states, tokens, Sequences.of_lengths([len(tokens)]))[1]
            torch.testing.assert_close(rows, alone, rtol=1e-5, atol=1e-5)
        parts.append(out)
    weights = torch.rand(parts[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sum((out.square() * weights).sum() for out in parts).backward()
    for head in model.mtp_heads():
        for parameter_name, parameter in head.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name


def test_embeddings_may_stand_in_for_token_ids():
    model = make("mimo-v2-flash-tiny")
    ids, seq = torch.arange(5), Sequences.of_lengths([5])
    with torch.no_grad():
        embedded = model.model.embed_tokens(ids)
        hidden = model.trunk(ids, seq)
        assert torch.equal(model.trunk(torch.zeros_like(ids), seq, embeddings_TD=embedded), hidden)
        want = model.mtp(1, hidden, ids, seq)[1]
        assert torch.equal(model.mtp(1, hidden, torch.zeros_like(ids), seq, embeddings_TD=embedded)[1], want)
