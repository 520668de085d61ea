"""What `sateen inspect` says about directories made by hand: files that lack, contradict, surprise."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sateen.checkpoint.file_notes import file_notes
from sateen.checkpoint.hf import load_model
from sateen.checkpoint.inspect import inspect, main
from sateen.checkpoint.load import check
from sateen.data.tokenizer import Tokenizer
from sateen.errors import CheckpointError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset


@pytest.fixture
def folder(tmp_path):
    """A directory without a trap in its files: model, tokenizer, template, equal end tokens."""
    tokenizer = Tokenizer.train(["a few words to learn from, and a few more words"], 270)
    raw = preset("mimo-7b-tiny") | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
    Decoder(ModelConfig.from_hf(raw)).init_weights(0).save(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    words = {"eos_token_id": [tokenizer.eos_id]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(words))
    return tmp_path / "model"


def change(file, **words):
    file.write_text(json.dumps(json.loads(file.read_text()) | words))


def test_a_complete_directory_has_no_notes(folder):
    assert file_notes(check(folder)) == []


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("tokenizer.json", "no tokenizer here: prompts are token ids"),
        ("tokenizer_config.json", "the tokenizer is not usable: .* has no tokenizer_config.json"),
        ("generation_config.json", "no generation_config.json here: other programs take their own"),
    ],
)
def test_missing_files_are_named(missing, says, folder):
    (folder / missing).unlink()
    (line,) = file_notes(check(folder))
    assert re.search(says, line)


def test_a_slow_tokenizer_is_named(folder):
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    (line,) = file_notes(check(folder))
    assert "only the files of a slow tokenizer, which are carried but not read" in line


def test_a_missing_template_is_named_and_a_template_file_counts(folder):
    change(folder / "tokenizer_config.json", chat_template=None)
    assert file_notes(check(folder)) == ["no chat template here: chat needs one, plain prompts do not"]
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert file_notes(check(folder)) == []


def test_end_tokens_that_differ_are_listed(folder):
    change(folder / "generation_config.json", eos_token_id=[0, 2])
    change(folder / "config.json", eos_token_id=5)
    assert file_notes(check(folder)) == [
        "end tokens differ: [5] in config.json, [0] in tokenizer_config.json, [0, 2] in "
        "generation_config.json; ours end at those of config.json and of the tokenizer"
    ]
    change(folder / "config.json", eos_token_id=None)
    change(folder / "generation_config.json", eos_token_id=None)
    assert file_notes(check(folder)) == []  # who says nothing contradicts nobody


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (+3, "3 rows of the vocabulary have no token; sampling leaves them out"),
        (-3, "the tokenizer has 3 tokens more than the vocabulary: they cannot be embedded"),
    ],
)
def test_another_vocabulary_than_the_tokenizers_is_named(rows, says, folder):
    raw = json.loads((folder / "config.json").read_text())
    raw["vocab_size"] += rows
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0)
    model.source = folder
    model.save(folder)
    assert file_notes(check(folder)) == [says]


def test_several_dtypes_are_counted(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, folder / "model.safetensors")
    assert file_notes(check(folder)) == [
        f"tensors have several dtypes (1 F16, {len(tensors) - 1} F32); loading keeps them unless a dtype is "
        "asked for"
    ]


def test_rounded_routers_are_named(tmp_path):
    load_model("mimo-v2-flash-tiny").save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert "routers are stored as BF16; the release keeps them in F32" in file_notes(check(tmp_path))


@pytest.mark.parametrize("per_head", [None, 192])
def test_fp8_scales_are_counted_and_their_tiling_is_found(per_head, as_fp8, tmp_path):
    raw = preset("mimo-v2-flash-tiny") | {"head_dim": 192, "num_key_value_heads": 4, "hidden_size": 512}
    model = Decoder(ModelConfig.from_hf(raw))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator).pow_(3)  # few large ones, so that blocks differ
    model.save(tmp_path)
    as_fp8(tmp_path, per_head)
    notes = file_notes(check(tmp_path))
    assert any(re.match(r"\d+ weights are FP8 blocks; loading makes them bfloat16", line) for line in notes)
    odd = [line for line in notes if "of scales" in line or "FP8 scales" in line]
    if per_head is None:
        assert odd == []
    else:
        assert odd == [
            "2 weights of 768 rows have 8 rows of scales instead of 6; the codes of "
            "model.layers.0.self_attn.k_proj.weight say that they are read by head"
        ]


def test_notes_of_files_stand_before_those_of_the_config(folder, capsys):
    (folder / "generation_config.json").unlink()
    found = inspect(folder)
    assert found["traps"][0].startswith("no generation_config.json here")
    assert "q, k and v have biases" in found["traps"][1]
    assert main(str(folder), json=True) == 0
    assert json.loads(capsys.readouterr().out)["traps"] == found["traps"]
    assert main(str(folder)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith("3 layers: 3 see all earlier tokens; 1 MTP head guesses further tokens;")
    assert [line.removeprefix("note: ") for line in out if line.startswith("note: ")] == found["traps"]


def test_a_broken_generation_config_is_an_error_that_names_it(folder):
    (folder / "generation_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: a JSON object is expected"):
        file_notes(check(folder))
