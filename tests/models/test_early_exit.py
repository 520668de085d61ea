"""The early exit of HySparse2: wanted rows are those of a full forward, the others are not computed."""

from __future__ import annotations

import pytest
import torch

from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.early_exit import EarlyExit
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences

FULL, SLIDING, SPARSE = "full_attention", "sliding_attention", "sparse_attention"
VARIANTS = {
    "plain": {},
    "three sliding layers behind the source": {
        "num_hidden_layers": 7,
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING, FULL, SPARSE, SPARSE],
        "sparse_bridge_source": 0,
    },
    "sparse layers with windows of their own": {"sparse_local": "gated"},
    "the source chooses, and blocks": {
        "sparse_select": "block",
        "sparse_block_size": 4,
        "layer_types": [SLIDING, FULL, SPARSE, FULL, SPARSE, SLIDING, FULL, SPARSE],
    },
}


def config(**changes):
    return ModelConfig.from_hf(preset("hysparse2-tiny") | {"initializer_range": 0.1} | changes)


def test_rows_of_the_published_shape():
    exit = EarlyExit.of(ModelConfig.from_hf(preset("hysparse2-80b-a3b")))
    assert exit is not None
    assert exit.source == 12
    rows = [exit.rows(layer, 1 << 20, 1) for layer in (11, 12, 13, 14, 24, 25, 48)]
    # Twelve sliding layers of window 128 behind the source: 128 + 11 * 127 queries.
    assert rows == [1 << 20, 1525, 1525, 1398, 128, 1, 1]
    assert exit.rows(12, 1000, 1) == 1000
    assert exit.rows(30, 1000, 4) == 4


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.inference_mode()
def test_wanted_rows_are_those_of_a_full_forward(changes):
    model = Decoder(config(**changes)).init_weights(0).eval()
    lengths, wanted = [70, 3, 120, 1], [1, 3, 5, 1]
    tokens = torch.randint(512, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    whole = model.trunk(tokens, Sequences.of_lengths(lengths))
    got = model.trunk(tokens, Sequences.of_lengths(lengths), wanted=wanted)
    ends = torch.tensor(lengths).cumsum(0).tolist()
    is_wanted = torch.zeros(len(tokens), dtype=torch.bool)
    for end, count in zip(ends, wanted, strict=True):
        is_wanted[end - count : end] = True
    want, found = (model.logits(model.head_input(x[is_wanted])) for x in (whole, got))
    assert want.abs().max() > 0.1
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    left_out = got[~is_wanted].abs().sum(-1) == 0
    assert left_out.sum() > 150, "most rows do not leave the trunk"


@torch.inference_mode()
def test_layers_see_the_rows_of_the_formula():
    """Window 8, one sliding layer behind the source: its queries are 8 rows, the cross-decoder's one."""
    model = Decoder(config()).init_weights(0).eval()
    seen: dict[str, int] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "mlp")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name.removeprefix("model.layers."), len(args[0]))
            )
    model.trunk(torch.arange(200), Sequences.of_lengths([200]), wanted=[1])
    queries = [seen[f"{i}.self_attn.q_proj"] for i in range(8)]
    keys = [seen.get(f"{i}.self_attn.k_proj") for i in range(8)]
    mlps = [seen[f"{i}.mlp"] for i in range(8)]
    assert queries == [200, 8, 8, 1, 1, 1, 1, 1]
    assert mlps == queries
    assert keys == [200, 200, 8, 200, None, None, 200, None]


@torch.inference_mode()
def test_all_rows_wanted_is_the_plain_forward():
    model = Decoder(config()).init_weights(0).eval()
    tokens, links, plain = torch.arange(60), LayerLinks(), LayerLinks()
    got = model.trunk(tokens, Sequences.of_lengths([40, 20]), links=links, wanted=[40, 20])
    assert torch.equal(got, model.trunk(tokens, Sequences.of_lengths([40, 20]), links=plain))
    assert all(torch.equal(links.selections[i], lists) for i, lists in plain.selections.items())


@pytest.mark.parametrize(
    "raw",
    [
        preset("hysparse-tiny"),
        preset("mimo-7b-tiny"),
        preset("hysparse2-tiny") | {"sparse_bridge": False},
        # The bridge begins at the second full layer, so a sparse layer's oracle may stand before it.
        preset("hysparse2-tiny") | {"sparse_bridge_source": 6},
    ],
    ids=["hysparse", "mimo", "no bridge", "a late source"],
)
@torch.inference_mode()
def test_models_without_an_exit_compute_every_row(raw):
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0).eval()
    tokens, seq = torch.arange(30), Sequences.of_lengths([30])
    found = EarlyExit.of(model.config)
    if raw.get("sparse_bridge_source") == 6:
        assert found is not None  # only the last layers' rows are left out
        assert found.rows(5, 30, 1) == 30
        assert found.rows(7, 30, 1) == 1
    else:
        assert found is None
        assert torch.equal(model.trunk(tokens, seq, wanted=[1]), model.trunk(tokens, seq))
