"""`sateen convert` where weights keep their form: byte for byte, streamed, and all or nothing."""

from __future__ import annotations

import errno
import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from sateen.checkpoint import write
from sateen.checkpoint.convert import main
from sateen.checkpoint.hf import load_model
from sateen.checkpoint.shards import INDEX
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder

FLASH = {  # rows and columns in whole blocks but for the keys of the full layer, as in the release
    "model_type": "mimo_v2_flash", "vocab_size": 32, "hidden_size": 256, "intermediate_size": 128,
    "num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "sliding_window": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
    "swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "layernorm_epsilon": 1e-5,
    "num_nextn_predict_layers": 1, "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
    "torch_dtype": "bfloat16",
}  # fmt: skip
KEYS = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory, as_fp8):
    folder = tmp_path_factory.mktemp("release") / "model"
    Decoder(ModelConfig.from_hf(FLASH)).init_weights(0).save(folder)
    (folder / "chat_template.jinja").write_bytes("{{ 'ü' }}\r\n".encode())
    as_fp8(folder, per_head=192)
    return folder


def said(caplog):
    return [r.getMessage().partition(": ")[2] for r in caplog.records if r.name == "sateen.checkpoint"]


def test_keep_keeps_every_byte_of_an_fp8_release(release, contents, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(write, "SHARD_BYTES", 200_000)
    with caplog.at_level(logging.INFO):
        assert main(str(release), str(tmp_path / "copy")) == 0
    found = contents(tmp_path / "copy")
    assert found == contents(release)
    assert found[KEYS][0] == "F8_E4M3"
    assert found[f"{KEYS}_scale_inv"][:2] == ("F32", (8, 2))  # 4 heads of 192 rows, not 6 blocks of 128
    stored = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert stored == json.loads((release / "config.json").read_text())
    assert (tmp_path / "copy" / "chat_template.jinja").read_bytes() == "{{ 'ü' }}\r\n".encode()
    weight_map = json.loads((tmp_path / "copy" / INDEX).read_text())["weight_map"]
    assert weight_map.keys() == found.keys()
    assert len(set(weight_map.values())) > 3
    scales = sum(name.endswith("_scale_inv") for name in found)
    assert said(caplog) == [
        f"{len(found) - scales} tensors kept as stored; {scales} are FP8 and keep their scales"
    ]
    a, b = load_model(release).state_dict(), load_model(tmp_path / "copy").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_dtype_dequantises_as_loading_does_and_says_what_it_did(release, contents, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        main(str(release), str(tmp_path / "half"), dtype="float16")
    stored = contents(release)
    codes = [name for name, (dtype, _, _) in stored.items() if dtype == "F8_E4M3"]
    blocks = sum(len(stored[f"{name}_scale_inv"][2]) // 4 for name in codes)
    plain = [n for n, (dtype, _, _) in stored.items() if dtype == "BF16"]
    assert sorted(said(caplog)) == sorted(
        [
            f"{len(codes)} tensors dequantised from FP8 ({blocks} blocks) to float16",
            f"{len(plain)} tensors cast from BF16 to float16",
            "2 tensors stay float32",
        ]
    )
    load_model(release, dtype="float16").save(tmp_path / "loaded")
    assert contents(tmp_path / "half") == contents(tmp_path / "loaded")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float16"
    assert {dtype for dtype, _, _ in contents(tmp_path / "half").values()} == {"F16", "F32"}


@pytest.mark.parametrize("name", ["mimo-7b-tiny", "mimo-v2-flash-tiny", "hysparse-tiny"])
def test_float_models_stream_to_what_loading_and_saving_gives(name, contents, tmp_path):
    load_model(name).save(tmp_path / "wide")
    main(str(tmp_path / "wide"), str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == contents(tmp_path / "wide")
    main(str(tmp_path / "wide"), str(tmp_path / "half"), dtype="bfloat16")
    load_model(tmp_path / "wide", dtype="bfloat16").save(tmp_path / "loaded")
    assert contents(tmp_path / "half") == contents(tmp_path / "loaded")


def test_transformers_words_refuse_scales_that_transformers_would_read_wrongly(release, tmp_path):
    with pytest.raises(ConfigError, match=rf"{KEYS}: .* 8 x 2 FP8 scales .* 768 x 256 .*--dtype bfloat16"):
        main(str(release), str(tmp_path / "theirs"), dialect="transformers")
    assert list(tmp_path.iterdir()) == []
    main(str(release), str(tmp_path / "theirs"), dialect="transformers", dtype="bfloat16")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    assert "quantization_config" not in config


@pytest.fixture(scope="module")
def whole_blocks(tmp_path_factory, as_fp8):
    """An FP8 model of whole blocks, which transformers can hold."""
    folder = tmp_path_factory.mktemp("blocks") / "model"
    raw = FLASH | {"head_dim": 128, "swa_head_dim": 128}
    Decoder(ModelConfig.from_hf(raw)).init_weights(0).save(folder)
    as_fp8(folder)
    return folder


def test_transformers_words_keep_scales_of_whole_blocks(whole_blocks, contents, tmp_path):
    main(str(whole_blocks), str(tmp_path / "theirs"), dialect="transformers")
    assert contents(tmp_path / "theirs") == contents(whole_blocks)
    table = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    before = json.loads((whole_blocks / "config.json").read_text())["quantization_config"]
    assert table == before | {"modules_to_not_convert": table["modules_to_not_convert"]}
    assert "model.layers.1.self_attn.o_proj" in table["modules_to_not_convert"]
    assert "model.layers.1.self_attn.q_proj" not in table["modules_to_not_convert"]
    main(str(tmp_path / "theirs"), str(tmp_path / "back"), dialect="hub")
    assert contents(tmp_path / "back") == contents(whole_blocks)
    a, b = (load_model(place).state_dict() for place in (whole_blocks, tmp_path / "back"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_transformers_opens_fp8_in_its_words(whole_blocks, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads FP8 with the package accelerate")
    main(str(whole_blocks), str(tmp_path / "theirs"), dialect="transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", attn_implementation="eager", dtype=torch.float32
    )
    ids = torch.arange(24)[None] % 32
    with torch.no_grad():
        want = load_model(whole_blocks, dtype="float32")(ids).logits
        got = theirs.float().eval()(ids).logits
    assert float((got - want).norm() / want.norm()) < 1e-4


WRONG = {
    "a missing tensor": lambda t: t.pop("model.norm.weight"),
    "an unknown tensor": lambda t: t.update({"model.nrm.weight": torch.ones(4)}),
    "a wrong shape": lambda t: t.update({"model.norm.weight": torch.ones(255)}),
    "too many scales": lambda t: t.update({f"{KEYS}_scale_inv": torch.ones(5, 2)}),
    "scales of whole numbers": lambda t: t.update({f"{KEYS}_scale_inv": torch.ones(8, 2, dtype=torch.int32)}),
    "bad scales": lambda t: t[f"{KEYS}_scale_inv"].fill_(float("nan")),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("exists", [False, True])
def test_a_wrong_source_leaves_nothing_behind(release, contents, tmp_path, what, exists):
    tensors = load_file(release / "model.safetensors")
    WRONG[what](tensors)
    (tmp_path / "wrong").mkdir()
    save_file(tensors, tmp_path / "wrong" / "model.safetensors")
    (tmp_path / "wrong" / "config.json").write_bytes((release / "config.json").read_bytes())
    (tmp_path / "out").mkdir()
    if exists:
        load_model("mimo-7b-tiny").save(tmp_path / "out" / "model")
        before = contents(tmp_path / "out" / "model")
    with pytest.raises(CheckpointError):
        main(str(tmp_path / "wrong"), str(tmp_path / "out" / "model"), dtype="bfloat16")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == (["model"] if exists else [])
    if exists:
        assert contents(tmp_path / "out" / "model") == before


def test_a_full_disk_leaves_the_old_directory(release, contents, tmp_path, monkeypatch):
    load_model("mimo-7b-tiny").save(tmp_path / "model")
    before = contents(tmp_path / "model")
    monkeypatch.setattr(write, "SHARD_BYTES", 200_000)
    whole, calls = write.write_shard, []

    def full_disk(file, tensors):
        calls.append(file)
        if len(calls) == 3:
            file.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(file, tensors)

    monkeypatch.setattr(write, "write_shard", full_disk)
    with pytest.raises(OSError, match="No space left"):
        main(str(release), str(tmp_path / "model"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert contents(tmp_path / "model") == before


def test_a_model_may_be_converted_in_its_own_place(release, contents, tmp_path):
    main(str(release), str(tmp_path / "model"))
    main(str(tmp_path / "model"), str(tmp_path / "model"), dtype="bfloat16")
    main(str(release), str(tmp_path / "want"), dtype="bfloat16")
    assert contents(tmp_path / "model") == contents(tmp_path / "want")


def test_settings_of_other_forms_are_refused(release, tmp_path):
    with pytest.raises(ConfigError, match="--stages is for --weights fairy2i"):
        main(str(release), str(tmp_path / "out"), stages=2)
    with pytest.raises(ConfigError, match=r"unknown --dtype 'fp16'.*keep"):
        main(str(release), str(tmp_path / "out"), dtype="fp16")
    load_model("mimo-7b-tiny").save(tmp_path / "mimo")
    with pytest.raises(ConfigError, match="--dialect is for mimo_v2_flash"):
        main(str(tmp_path / "mimo"), str(tmp_path / "out"), dialect="hub")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mimo"]
