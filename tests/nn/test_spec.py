"""Specs are values: they compare, hash, copy and travel between processes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, replace
from types import MappingProxyType

import pytest

from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.nn.spec import KVLayout


@pytest.mark.parametrize("name", ["mimo-7b-tiny", "mimo-v2-flash-tiny"])
def test_configs_compare_hash_copy_and_pickle(name):
    config = ModelConfig.from_hf(preset(name))
    layer = replace(config.specs[0], options=MappingProxyType({"block": 64}))
    for value in (config, config.mtp, layer):
        assert copy.deepcopy(value) == value
        assert pickle.loads(pickle.dumps(value)) == value
    assert hash(config.mtp) == hash(copy.deepcopy(config.mtp))
    assert len({layer, copy.deepcopy(layer), replace(layer, index=7)}) == 2
    assert layer != replace(layer, options=MappingProxyType({"block": 32}))
    with pytest.raises(FrozenInstanceError):
        layer.index = 3
    with pytest.raises(TypeError):
        layer.options["block"] = 1


def test_a_model_can_be_copied():
    model = Decoder(ModelConfig.from_hf(preset("mimo-v2-flash-tiny"))).init_weights(0)
    twin = copy.deepcopy(model)
    twin.model.norm.weight.data.zero_()
    assert model.model.norm.weight.eq(1).all()
    assert twin.config == model.config


def test_rows_of_each_layout():
    paged, ring, shared = (
        KVLayout(kind, 2, 6, 4, window=5, source=0) for kind in ("paged", "ring", "shared")
    )
    assert [paged.rows(n) for n in (0, 3, 700)] == [0, 3, 700]
    assert [ring.rows(n) for n in (0, 3, 5, 6, 700)] == [0, 3, 5, 5, 5]
    assert [shared.rows(n) for n in (0, 3, 700)] == [0, 0, 0]
    assert ring.rows(700, draft=3) == 8
    assert (paged.row_elements, ring.row_elements, shared.row_elements) == (20, 20, 0)
