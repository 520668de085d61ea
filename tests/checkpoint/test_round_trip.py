"""Every supported family: what is loaded and saved, or streamed, is what was there, byte for byte."""

from __future__ import annotations

import json

import pytest
import torch

from sateen.checkpoint.convert import main
from sateen.checkpoint.hf import load_model
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.quantize import pack_model, quantize_model
from sateen.models.registry import FAMILIES, preset
from sateen.nn.spec import QuantSpec

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FLASH = {
    "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16, "sliding_window": 9,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
}  # fmt: skip
THEIRS = {  # written by transformers
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "mimo_v2_flash-transformers": ("MiMoV2FlashConfig", FLASH),
}
OURS = {  # transformers has no such model, or drops parts of it
    "mimo": preset("mimo-7b-tiny") | {"num_nextn_predict_layers": 2},
    "mimo_v2_flash-hub": preset("mimo-v2-flash-tiny"),
    "hysparse": preset("hysparse-tiny"),
    "hysparse2": preset("hysparse2-tiny"),
    "complexnet": preset("fairy-tiny"),
    "mimo_audio": preset("mimo-audio-mini") | {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 40, "local_dim": 16, "local_attn_heads": 4,
        "local_ffn_dim": 20, "local_layers": 2, "input_local_layers": 2, "input_local_dim": 16,
        "audio_channels": 3, "speech_vocab_size": "10-8-6", "speech_zeroemb_idx": "9-7-5",
        "delay_pattern": "0-1-2",
    },
}  # fmt: skip
QUANTISED = {
    "mimo-fairy2i": (preset("mimo-7b-tiny"), QuantSpec("fairy2i", stages=2, act="float")),
    "complexnet-phase": (preset("fairy-tiny"), QuantSpec("phase")),
    "hysparse-ternary": (preset("hysparse-tiny"), QuantSpec("ternary")),
    "mimo-int2": (preset("mimo-7b-tiny"), QuantSpec("int2")),
}
CARRIED = {
    "tokenizer.json": b'{"\xc3\xbc": 1}\r\n',
    "tokenizer_config.json": b"{ }",
    "chat_template.jinja": b"{% if tools %}\t\r\n{% endif %}",
    "merges.txt": b"a b\n",
    "generation_config.json": b'{"top_p":0.95}',
    "modeling_mimo.py": b"# theirs\n",
    "LICENSE": b"MIT",
}


def fill(model):
    """No tensor is left at zeros or ones, where a lost one could look like a fresh one."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, tensor in sorted(model.state_dict().items()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype), alpha=0.1)
    return model


def unchanged(folder, tmp_path, contents):
    """Load and save, and stream; both sides have the same tensors, config and carried files."""
    for name, data in CARRIED.items():
        (folder / name).write_bytes(data)
    before, raw = contents(folder), json.loads((folder / "config.json").read_text())
    load_model(folder).save(tmp_path / "loaded")
    assert main(str(folder), str(tmp_path / "streamed")) == 0
    for copy in (tmp_path / "loaded", tmp_path / "streamed"):
        after = contents(copy)
        assert sorted(after) == sorted(before)
        assert [name for name in before if after[name] != before[name]] == []
        assert json.loads((copy / "config.json").read_text()) == raw
        assert {name: (copy / name).read_bytes() for name in CARRIED} == CARRIED
    return before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", THEIRS)
def test_what_transformers_wrote(name, dtype, tmp_path, contents):
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")
    kind, changes = THEIRS[name]
    config = getattr(transformers, kind)(**(SMALL | changes))
    model = fill(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    model.to(dtype).save_pretrained(tmp_path / "model")
    before = unchanged(tmp_path / "model", tmp_path, contents)
    # As many numbers as their model has: nothing was lost on the way to the first directory.
    stored = sum(torch.Size(shape).numel() for _, shape, _ in before.values())
    biases = sum(b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    assert stored == sum(p.numel() for p in model.parameters()) + biases


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OURS)
def test_what_only_we_write(name, dtype, tmp_path, contents):
    raw = OURS[name] | {"torch_dtype": str(dtype).removeprefix("torch.")}
    model = fill(Decoder.build(ModelConfig.from_hf(raw)).init_weights(0)).to(dtype)
    model.save(tmp_path / "model")
    before = unchanged(tmp_path / "model", tmp_path, contents)
    stored = sum(torch.Size(shape).numel() for _, shape, _ in before.values())
    assert stored == sum(t.numel() for t in {id(t): t for t in model.state_dict().values()}.values())
    assert len({data for _, _, data in before.values()}) == len(before)  # no tensor stands in for another


@pytest.mark.parametrize("form", ["masters", "packed"])
@pytest.mark.parametrize("name", QUANTISED)
def test_two_bit_weights(name, form, tmp_path, contents):
    raw, spec = QUANTISED[name]
    model = quantize_model(fill(Decoder.build(ModelConfig.from_hf(raw)).init_weights(0)), spec)
    (pack_model(model) if form == "packed" else model).save(tmp_path / "model")
    before = unchanged(tmp_path / "model", tmp_path, contents)
    assert ("U8" in {dtype for dtype, _, _ in before.values()}) == (form == "packed")


def test_a_speech_model_keeps_its_audio_tokenizer(tmp_path, contents):
    Decoder.build(ModelConfig.from_hf(OURS["mimo_audio"])).init_weights(0).save(tmp_path / "model")
    (tmp_path / "model" / "audio_tokenizer").mkdir()
    (tmp_path / "model" / "audio_tokenizer" / "model.safetensors").write_bytes(b"codebooks")
    unchanged(tmp_path / "model", tmp_path, contents)
    for copy in ("loaded", "streamed"):
        found = tmp_path / copy / "audio_tokenizer" / "model.safetensors"
        assert found.read_bytes() == b"codebooks"


def test_no_family_is_left_out():
    words = {name.split("-")[0] for name in (*THEIRS, *OURS)}
    assert words - {"hysparse2"} == set(FAMILIES)
