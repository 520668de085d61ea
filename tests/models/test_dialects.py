"""Both spellings of MiMo-V2-Flash's config: the same model, and transformers reads what we write for it."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest
import torch

from sateen.checkpoint.convert import main
from sateen.checkpoint.hf import load_model
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.mimo_v2_flash_dialects import in_dialect, misread_by_transformers
from sateen.models.registry import preset

FLASH = {
    "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16, "sliding_window": 9,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "routed_scaling_factor": 2.5,
}  # fmt: skip


def test_the_published_config_survives_both_ways():
    config = ModelConfig.from_hf(preset("mimo-v2-flash"))
    theirs = in_dialect(config, "transformers")
    assert theirs.raw["sliding_window"] == 129
    assert "hybrid_layer_pattern" not in theirs.raw
    again = in_dialect(theirs, "hub")
    assert again.raw["sliding_window"] == again.raw["sliding_window_size"] == 128
    assert theirs.layers() == again.layers() == config.layers()
    assert theirs.mtp == again.mtp == config.mtp
    assert {key: again.raw.get(key) for key in config.raw} == config.raw


def test_transformers_reads_what_was_converted(build, tokens, assert_close, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    theirs = build("MiMoV2FlashConfig", FLASH)
    assert main(str(tmp_path), str(tmp_path / "hub"), dialect="hub") == 0
    raw = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert raw["hybrid_layer_pattern"] == [0, 1, 1, 1, 1, 0]
    assert (raw["sliding_window"], raw["swa_num_key_value_heads"]) == (8, 2)
    assert main(str(tmp_path / "hub"), str(tmp_path / "back"), dialect="transformers") == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    ids = tokens(2, 33)
    with torch.no_grad():
        want = theirs(ids).logits
        assert_close(again.float().eval()(ids).logits, want)
        for name in ("hub", "back"):
            assert_close(load_model(tmp_path / name)(ids).logits, want)


@pytest.mark.parametrize(
    ("changes", "misread"),
    [
        ({}, []),
        ({"num_nextn_predict_layers": 2}, []),
        ({"rope_theta": 1000}, ["rope_theta"]),
        ({"layernorm_epsilon": 1e-2}, ["rms_norm_eps"]),
        ({"partial_rotary_factor": 0.5}, ["rotary_dim"]),
        ({"sliding_window_size": None}, ["window"]),
        ({"swa_num_key_value_heads": 4}, ["num_key_value_heads"]),
        ({"add_swa_attention_sink_bias": False}, ["has_sink"]),
        ({"moe_layer_freq": [1] * 6}, ["moe"]),
        ({"rope_scaling": {"type": "default"}}, ["rope_scaling"]),
        ({"rope_scaling": None}, ["rope_scaling"]),
    ],
)
@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
def test_transformers_misreads_of_the_hubs_words_what_we_say(
    changes, misread, hub, randomise, tokens, assert_close, tmp_path
):
    transformers = pytest.importorskip("transformers")
    del hub["rope_scaling"]
    config = ModelConfig.from_hf(hub | {"model_type": "mimo_v2_flash"} | changes)
    assert misread_by_transformers(config) == misread
    ours = Decoder(config).eval()
    randomise(sorted(ours.state_dict().items()))
    ours.save(tmp_path)
    ids = tokens(1, 33)
    theirs = None
    with torch.no_grad(), contextlib.suppress(KeyError, TypeError, RuntimeError):
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        theirs = opened.float().eval()(ids).logits
    want = ours(ids).logits.detach()
    if misread:
        assert theirs is None or float((theirs - want).norm() / want.norm()) > 1e-2
    else:
        assert_close(theirs, want)


def test_heads_stay_and_a_line_says_that_transformers_drops_them(tmp_path, caplog):
    raw = preset("mimo-v2-flash-tiny")
    Decoder(ModelConfig.from_hf(raw)).init_weights(0).save(tmp_path / "hub")
    with caplog.at_level(logging.WARNING):
        main(str(tmp_path / "hub"), str(tmp_path / "theirs"), dialect="transformers")
    assert "transformers drops them on load" in caplog.text
    assert load_model(tmp_path / "theirs").num_mtp_heads == raw["num_nextn_predict_layers"]


@pytest.mark.parametrize(
    ("raw", "dialect", "says"),
    [
        (preset("mimo-v2-flash-tiny"), "hubb", "unknown dialect 'hubb'; did you mean hub"),
        (preset("mimo-7b"), "hub", "--dialect is for mimo_v2_flash.*this is mimo"),
        (
            preset("mimo-v2-flash-tiny") | {"add_full_attention_sink_bias": True},
            "transformers",
            "layer 0 of this model cannot be written in transformers words",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(raw, dialect, says):
    with pytest.raises(ConfigError, match=says):
        in_dialect(ModelConfig.from_hf(raw), dialect)


@pytest.mark.parametrize(("changes", "named"), [({}, None), ({"rope_theta": 1000}, "misread rope_theta of")])
def test_hub_words_that_transformers_would_misread_are_named(changes, named, tmp_path, caplog):
    config = ModelConfig.from_hf(preset("mimo-v2-flash-tiny") | changes)
    Decoder(config).init_weights(0).save(tmp_path / "model")
    assert main(str(tmp_path / "model"), str(tmp_path / "hub"), dialect="hub") == 0
    found = [text for text in caplog.messages if "transformers would misread" in text]
    assert len(found) == (named is not None)
    assert all(named in text for text in found)
