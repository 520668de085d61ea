"""MTP heads that come in a directory of their own: found, checked, joined without a change of a byte."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from sateen.checkpoint.convert import main
from sateen.checkpoint.hf import load_model
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

MIMO = preset("mimo-7b-tiny") | {"num_nextn_predict_layers": 3}
FLASH = preset("mimo-v2-flash-tiny")


def is_later_head(name):
    return any(f".{path}.{k}." in name for path in ("mtp_layers", "mtp.layers") for k in (1, 2))


@pytest.fixture(params=[MIMO, FLASH], ids=lambda raw: raw["model_type"])
def split(request, tmp_path):
    """A model with three heads, split as the release is: `main` keeps the first, `heads` has the others."""
    Decoder(ModelConfig.from_hf(request.param)).init_weights(5).save(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    raw = json.loads((tmp_path / "whole" / "config.json").read_text())
    for part, kept in (("main", False), ("heads", True)):
        (tmp_path / part).mkdir()
        some = {name: t for name, t in tensors.items() if is_later_head(name) is kept}
        save_file(some, tmp_path / part / "model.safetensors")
    (tmp_path / "main" / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    (tmp_path / "main" / "tokenizer.json").write_text("{}")
    return tmp_path


def test_the_main_directory_is_a_model_with_one_head(split):
    assert load_model(split / "main").num_mtp_heads == 1


def test_joined_heads_are_those_of_the_whole_model(split, caplog):
    with caplog.at_level(logging.INFO, logger="sateen.checkpoint"):
        model = load_model(split / "main", mtp=split / "heads")
    assert f"{split / 'heads'}: MTP heads 1 to 2 behind 1 of the model's own" in caplog.text
    whole = load_model(split / "whole")
    assert model.num_mtp_heads == 3
    assert model.config.mtp == whole.config.mtp
    assert model.config.raw["num_nextn_predict_layers"] == 3
    ours, theirs = model.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert load_model(split / "main", mtp=split / "heads", device="meta").num_mtp_heads == 3


def test_joining_on_disk_changes_no_byte(split, contents):
    assert main(str(split / "main"), str(split / "joined"), mtp=str(split / "heads")) == 0
    assert contents(split / "joined") == contents(split / "main") | contents(split / "heads")
    assert contents(split / "joined") == contents(split / "whole")
    raw = json.loads((split / "main" / "config.json").read_text())
    joined = json.loads((split / "joined" / "config.json").read_text())
    assert joined == raw | {"num_nextn_predict_layers": 3}
    assert (split / "joined" / "tokenizer.json").read_text() == "{}"
    load_model(split / "joined").save(split / "again")
    assert contents(split / "again") == contents(split / "joined")


def test_a_config_without_the_number_gets_it(split):
    config = split / "main" / "config.json"
    raw = json.loads(config.read_text())
    del raw["num_nextn_predict_layers"]
    config.write_text(json.dumps(raw))
    assert load_model(split / "main").num_mtp_heads == 1
    main(str(split / "main"), str(split / "joined"), mtp=str(split / "heads"))
    assert json.loads((split / "joined" / "config.json").read_text())["num_nextn_predict_layers"] == 3
    assert load_model(split / "joined").num_mtp_heads == 3


def test_fp8_heads_keep_their_scales(tmp_path, contents, as_fp8):
    Decoder(ModelConfig.from_hf(FLASH)).init_weights(5).save(tmp_path / "whole")
    as_fp8(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    raw = json.loads((tmp_path / "whole" / "config.json").read_text())
    for part, kept in (("main", False), ("heads", True)):
        (tmp_path / part).mkdir()
        some = {name: t for name, t in tensors.items() if is_later_head(name) is kept}
        save_file(some, tmp_path / part / "model.safetensors")
    (tmp_path / "main" / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    main(str(tmp_path / "main"), str(tmp_path / "joined"), mtp=str(tmp_path / "heads"))
    assert contents(tmp_path / "joined") == contents(tmp_path / "whole")
    assert json.loads((tmp_path / "joined" / "config.json").read_text()) == raw
    a = load_model(tmp_path / "main", mtp=tmp_path / "heads").state_dict()
    b = load_model(tmp_path / "whole").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in b)


def change(tensors, what):
    path = "mtp_layers" if any("mtp_layers" in name for name in tensors) else "mtp.layers"
    if what == "duplicate":
        return {name.replace(f"{path}.1.", f"{path}.0."): t for name, t in tensors.items()}
    if what == "gap":
        return {name: t for name, t in tensors.items() if f"{path}.1." not in name}
    if what == "foreign":
        return tensors | {"lm_head.weight": torch.ones(4, 4)}
    name = f"model.{path}.2.input_layernorm.weight"
    if what == "missing":
        return {key: t for key, t in tensors.items() if key != name}
    return tensors | {name: torch.ones(7)}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("duplicate", r"heads: holds MTP heads 0, 2 for a model that has 1 .* from 1 without a gap"),
        ("gap", r"heads: holds MTP heads 2 for a model that has 1"),
        ("foreign", r"heads: holds lm_head\.weight, which belongs to no MTP head"),
        ("missing", r"1 tensors are missing: model\.mtp.layers\.2\.input_layernorm\.weight"),
        ("shape", r"input_layernorm\.weight has shape \(7,\), the config asks for"),
    ],
)
def test_heads_that_do_not_fit_are_refused_and_nothing_is_written(split, what, says):
    file = split / "heads" / "model.safetensors"
    save_file(change(load_file(file), what), file)
    before = sorted(entry.name for entry in split.iterdir())
    with pytest.raises(CheckpointError, match=says):
        load_model(split / "main", mtp=split / "heads")
    with pytest.raises(CheckpointError, match=says):
        main(str(split / "main"), str(split / "joined"), mtp=str(split / "heads"))
    assert sorted(entry.name for entry in split.iterdir()) == before


def test_heads_of_a_model_without_any_are_refused(split):
    llama = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    Decoder(ModelConfig.from_hf(llama)).init_weights(0).save(split / "llama")
    with pytest.raises(CheckpointError, match="model_type 'llama' takes no MTP heads"):
        load_model(split / "llama", mtp=split / "heads")
    with pytest.raises(ConfigError, match="mtp adds heads to a stored model; the preset"):
        load_model("mimo-7b-tiny", mtp=split / "heads")
    with pytest.raises(CheckpointError, match=r"nowhere: no \.safetensors file"):
        load_model(split / "main", mtp=split / "nowhere")
