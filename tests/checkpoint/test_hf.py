"""Hugging Face directories in and out: bit-identical round trips, refusals with names, failed saves."""

from __future__ import annotations

import errno
import json
import logging

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sateen.checkpoint import hf, write
from sateen.checkpoint.hf import load_model, save
from sateen.checkpoint.shards import INDEX
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
FLASH = preset("mimo-v2-flash-tiny") | {"vocab_size": 64, "moe_intermediate_size": 8, "intermediate_size": 16}


def fresh(raw, seed=0):
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "bias" in name:
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "model"
    fresh(LLAMA).save(place)
    return place


def edit(folder, change):
    """Rewrites the directory's only shard after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def contents(folder):
    """Every stored tensor, whatever its shard, with its bytes."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (a handle, not a dict)
                tensor = shard.get_tensor(name)
                found[name] = (
                    tensor.dtype,
                    tensor.shape,
                    tensor.contiguous().view(torch.uint8).numpy().tobytes(),
                )
    return found


@pytest.mark.parametrize("raw", [LLAMA, FLASH, preset("mimo-7b-tiny")], ids=lambda raw: raw["model_type"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_save_after_load_is_bit_identical_and_keeps_the_config(raw, dtype, tmp_path):
    raw = raw | {"zebra": {"stripes": [1, None]}, "auto_map": {"AutoModel": "x.Y"}, "torch_dtype": "float32"}
    fresh(raw, seed=3).save(tmp_path / "first")
    (tmp_path / "first" / "tokenizer.json").write_text('{"ü": 1}\r\n', newline="")
    model = load_model(tmp_path / "first", dtype=dtype)
    model.save(tmp_path / "second")
    if dtype is None:
        assert contents(tmp_path / "second") == contents(tmp_path / "first")
    load_model(tmp_path / "second").save(tmp_path / "third")
    assert contents(tmp_path / "third") == contents(tmp_path / "second")
    for copy in ("second", "third"):
        stored = json.loads((tmp_path / copy / "config.json").read_text())
        # The one key that a cast makes untrue follows the tensors.
        assert stored == raw | {"torch_dtype": str(dtype or torch.float32).removeprefix("torch.")}
        assert list(stored) == list(raw)
        assert (tmp_path / copy / "tokenizer.json").read_bytes() == (
            tmp_path / "first" / "tokenizer.json"
        ).read_bytes()
    again = load_model(tmp_path / "second")
    assert again.config.specs == model.config.specs
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.dtype == b.dtype, name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("shard_bytes", [1, 20_000])
def test_sharding_splits_and_rejoins(shard_bytes, tmp_path, monkeypatch):
    model = fresh(FLASH)
    model.save(tmp_path / "whole")
    monkeypatch.setattr(write, "SHARD_BYTES", shard_bytes)
    model.save(tmp_path / "parts")
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / INDEX).read_text())
    whole = contents(tmp_path / "whole")
    assert contents(tmp_path / "parts") == whole
    assert set(index["weight_map"]) == set(whole)
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in whole.values())
    for file in files:
        tensors = load_file(tmp_path / "parts" / file)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= shard_bytes
    for (name, a), b in zip(
        load_model(tmp_path / "parts").state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_routers_stay_float32_under_bfloat16(tmp_path):
    fresh(FLASH).save(tmp_path / "model")
    for model in (
        load_model(tmp_path / "model", dtype="bfloat16"),
        load_model("mimo-v2-flash-tiny", dtype="bfloat16"),
    ):
        kept = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
        layers = range(1, 6)
        assert kept == {
            f"model.layers.{i}.mlp.gate.{x}" for i in layers for x in ("weight", "e_score_correction_bias")
        }
        others = {tensor.dtype for name, tensor in model.state_dict().items() if name not in kept}
        assert others == {torch.bfloat16}
        assert model(torch.arange(20)[None]).logits.dtype == torch.bfloat16
    stored = load_model(tmp_path / "model").state_dict()
    low = load_model(tmp_path / "model", dtype="bfloat16").state_dict()
    for name, tensor in stored.items():
        assert torch.equal(low[name], tensor.to(low[name].dtype)), name


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    fresh(LLAMA | {"tie_word_embeddings": True}).save(tmp_path / "model")
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    model = load_model(tmp_path / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # Some writers repeat the tied matrix.
    edit(tmp_path / "model", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    again = load_model(tmp_path / "model")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_heads_are_counted_from_tensor_names_when_the_config_is_silent(tmp_path):
    fresh(FLASH).save(tmp_path / "model")
    raw = {key: value for key, value in FLASH.items() if key != "num_nextn_predict_layers"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    model = load_model(tmp_path / "model")
    assert model.num_mtp_heads == 3
    model.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "model")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == raw


def test_a_truncated_file_is_named(folder):
    file = folder / "model.safetensors"
    for keep in (file.stat().st_size - 1, 100, 0):
        file.write_bytes(file.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete safetensors file"):
            load_model(folder)


def test_unknown_and_missing_tensors_are_named_with_the_nearest(folder):
    def rename(tensors):
        tensors["model.layers.0.self_attn.q_prj.weight"] = tensors.pop(
            "model.layers.0.self_attn.q_proj.weight"
        )

    edit(folder, rename)
    with pytest.raises(CheckpointError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "1 tensors the config does not account for: model.layers.0.self_attn.q_prj.weight" in message
    assert "did you mean model.layers.0.self_attn.q_proj.weight?" in message
    assert "1 tensors are missing: model.layers.0.self_attn.q_proj.weight" in message


def test_a_missing_expert_is_named(tmp_path):
    fresh(FLASH).save(tmp_path / "model")
    gone = "model.layers.2.mlp.experts.5.up_proj.weight"
    edit(tmp_path / "model", lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=f"1 tensors are missing: {gone}"):
        load_model(tmp_path / "model")


def test_a_wrong_shape_names_both_shapes(folder):
    edit(folder, lambda t: t.update({"model.norm.weight": torch.ones(17)}))
    for device in ("cpu", "meta"):
        with pytest.raises(
            CheckpointError, match=r"model\.norm\.weight has shape \(17,\), the config asks for \(16,\)"
        ):
            load_model(folder, device=device)


@pytest.mark.parametrize(("dtype", "code"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int32, "I32")])
def test_an_unreadable_dtype_is_refused(folder, dtype, code):
    edit(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"model.norm.weight is {code}; readable: F64, F32, BF16, F16"):
        load_model(folder)


def test_a_shard_that_the_index_names_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
    fresh(FLASH).save(tmp_path / "model")
    gone = next(file for file in (tmp_path / "model").glob("model-00003*"))
    gone.unlink()
    with pytest.raises(CheckpointError, match=rf"names files that are not there: .*{gone.name}"):
        load_model(tmp_path / "model")


def test_a_damaged_index_is_named(folder):
    for text in ("{", '{"weights": {}}', "[]"):
        (folder / INDEX).write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json: not a safetensors index"):
            load_model(folder)
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is not in this file"):
        load_model(folder)


def test_config_mistakes_name_the_file(folder):
    config = folder / "config.json"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(raw | {"model_type": "lama"}))
    with pytest.raises(ConfigError, match=r"config\.json: unknown model_type 'lama'; did you mean llama\?"):
        load_model(folder)
    wrong = {
        ("num_atention_heads" if key == "num_attention_heads" else key): value for key, value in raw.items()
    }
    config.write_text(json.dumps(wrong))
    with pytest.raises(
        ConfigError, match=r"config\.json: num_atention_heads is not a key .* did you mean num_attention_"
    ):
        load_model(folder)
    config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)
    config.write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object is expected"):
        load_model(folder)


def test_places_without_a_model_say_what_is_accepted(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no config\.json here; a model is a directory .* preset \(.*mimo-7b"
    ):
        load_model(tmp_path / "nowhere")
    (tmp_path / "run.toml").write_text("")
    with pytest.raises(CheckpointError, match="this run has no checkpoint yet"):
        load_model(tmp_path)
    fresh(LLAMA).save(tmp_path / "model")
    assert load_model(tmp_path).source == tmp_path / "model"
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file here"):
        load_model(tmp_path)


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(
        ConfigError, match="dtype 'fp32' is not accepted; accepted: float32, bfloat16, float16"
    ):
        load_model(folder, dtype="fp32")


def test_a_preset_above_half_of_the_free_memory_is_refused_with_its_size(monkeypatch):
    monkeypatch.setattr(hf, "free_bytes", lambda device: 20 * 2**30)
    # 7,833,409,536 parameters in 2 bytes are 14.6 GiB.
    with pytest.raises(
        CheckpointError, match=r"preset mimo-7b needs 14\.6 GiB .* more than half of the 20\.0 GiB free"
    ):
        load_model("mimo-7b", dtype="bfloat16")
    assert load_model("mimo-7b", device="meta").lm_head.weight.is_meta
    assert not load_model("mimo-7b-tiny").lm_head.weight.is_meta


def test_free_memory_is_a_plausible_number():
    assert 2**26 < hf.free_bytes(torch.device("cpu")) < 2**50


def test_presets_come_with_reproducible_weights():
    first, second = load_model("mimo-7b-tiny"), load_model("mimo-7b-tiny")
    weights = first.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weights, second.model.layers[0].mlp.up_proj.weight)
    assert float(weights.std().detach()) == pytest.approx(0.02, rel=0.05)
    assert first.model.norm.weight.eq(1).all()
    assert first.model.layers[0].self_attn.q_proj.bias.eq(0).all()
    assert not first.training


def test_meta_reads_no_data_but_checks_everything(folder):
    model = load_model(folder, device="meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    edit(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing: model\.norm\.weight"):
        load_model(folder, device="meta")


def test_a_failed_save_leaves_the_old_directory(folder, monkeypatch):
    before = contents(folder)
    model = fresh(LLAMA, seed=9)
    monkeypatch.setattr(write, "SHARD_BYTES", 4000)
    calls = []

    whole_shard = write.write_shard

    def full_disk(file, tensors):
        calls.append(file)
        if len(calls) == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_shard(file, tensors)

    monkeypatch.setattr(write, "write_shard", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(model, folder)
    assert len(calls) == 3
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert contents(folder) == before
    load_model(folder)


def test_saving_over_a_model_replaces_all_of_it(folder, monkeypatch):
    other = fresh(LLAMA, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(write, "SHARD_BYTES", 4000)
        other.save(folder)
    assert (folder / INDEX).is_file()
    model = load_model(folder)
    model.save(folder)  # over the directory it came from
    assert sorted(entry.name for entry in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]
    assert torch.equal(load_model(folder).lm_head.weight, other.lm_head.weight)


def test_saving_never_deletes_a_directory_that_is_not_a_model(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="exists and is not a model directory"):
        fresh(LLAMA).save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(CheckpointError, match="exists and is not a model directory"):
        fresh(LLAMA).save(tmp_path / "thesis.tex")


def test_unused_keys_of_a_checkpoint_are_logged_once(folder, caplog):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"zebra": 1}))
    with caplog.at_level(logging.INFO, logger="sateen.models"):
        load_model(folder)
    assert [r.getMessage() for r in caplog.records] == [f"{folder / 'config.json'}: kept but not used: zebra"]


def test_config_names_the_dtype_of_the_saved_tensors(tmp_path):
    raw = preset("mimo-7b-tiny") | {"torch_dtype": "float32"}
    hf.save(Decoder(ModelConfig.from_hf(raw)).init_weights(0), tmp_path / "wide")
    hf.save(hf.load_model(tmp_path / "wide", dtype="bfloat16"), tmp_path / "narrow")
    assert json.loads((tmp_path / "narrow" / "config.json").read_text()) == raw | {"torch_dtype": "bfloat16"}


def test_a_null_where_a_number_belongs_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"wrong type.*hidden_size"):
        ModelConfig.from_hf(preset("mimo-7b-tiny") | {"hidden_size": None})


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path):
    hf.save(Decoder(ModelConfig.from_hf(preset("mimo-7b-tiny"))).init_weights(0), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, tmp_path / "m" / "other.safetensors")
    with pytest.raises(
        CheckpointError, match=r"other\.safetensors: model\.norm\.weight is in model\.safetensors too"
    ):
        hf.load_model(tmp_path / "m")
