"""FP8 blocks: every tiling dequantises exactly, and the codes tell which tiling a file uses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sateen.checkpoint import fp8
from sateen.checkpoint.fp8 import choose_rows, dequantize, row_readings
from sateen.checkpoint.hf import load_model
from sateen.errors import CheckpointError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder


def quantize(weight: np.ndarray, groups: list[range], num_scale_rows: int):
    """Codes and scales of a writer that scales each group of rows and 128 columns to 448, in a plain loop."""
    rows, columns = weight.shape
    codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.ones(num_scale_rows, -(-columns // 128))
    real = np.zeros_like(weight)
    for g, group in enumerate(groups):
        for c in range(scale.shape[1]):
            part = weight[group.start : group.stop, c * 128 : (c + 1) * 128]
            s = np.float32(np.abs(part).max() / 448)
            code = torch.from_numpy(part / s).to(torch.float8_e4m3fn)
            codes[group.start : group.stop, c * 128 : (c + 1) * 128] = code
            scale[g, c] = float(s)
            real[group.start : group.stop, c * 128 : (c + 1) * 128] = code.float().numpy() * s
    return codes, scale, real


GROUPS = {  # 768 rows in 4 heads of 192, 8 rows of scales
    "block": [range(i, i + 128) for i in range(0, 768, 128)],
    "head": [range(h + a, h + b) for h in range(0, 768, 192) for a, b in ((0, 128), (128, 192))],
    "even": [range(i, i + 96) for i in range(0, 768, 96)],
}


@pytest.mark.parametrize("reading", GROUPS)
def test_every_reading_of_eight_scale_rows(reading):
    weight = np.random.default_rng(0).standard_normal((768, 300)).astype(np.float32)
    codes, scale, real = quantize(weight, GROUPS[reading], 8)
    assert list(row_readings("k", 768, 8, 192)) == ["block", "head", "even"]
    rows = choose_rows("k", codes, 8, 192)
    expected = [next(g for g, group in enumerate(GROUPS[reading]) if r in group) for r in range(768)]
    assert rows.tolist() == expected
    np.testing.assert_array_equal(dequantize("k", codes, scale, torch.float32, head_dim=192).numpy(), real)
    half = dequantize("k", codes, scale, torch.bfloat16, head_dim=192)
    assert torch.equal(half, torch.from_numpy(real).to(torch.bfloat16))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("reading", GROUPS)
def test_weights_are_dequantised_where_their_codes_are(reading, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    weight = np.random.default_rng(2).standard_normal((768, 200)).astype(np.float32)
    codes, scale, real = quantize(weight, GROUPS[reading], 8)
    # Whatever takes the default device instead of the codes' is on meta here and fails.
    with torch.device("meta"):
        found = dequantize("k", codes.to(device), scale, torch.float32, head_dim=192)
    assert found.device.type == device
    np.testing.assert_array_equal(found.cpu().numpy(), real)


def test_more_rows_than_a_strip_holds(monkeypatch):
    monkeypatch.setattr(fp8, "STRIP", 1000)
    weight = np.random.default_rng(3).standard_normal((768, 130)).astype(np.float32)
    groups = [range(h + a, h + b) for h in range(0, 768, 192) for a, b in ((0, 128), (128, 192))]
    codes, scale, real = quantize(weight, groups, len(groups))
    np.testing.assert_array_equal(dequantize("k", codes, scale, torch.float32, head_dim=192).numpy(), real)


@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (200, 130), (1, 1), (128, 129)])
def test_plain_blocks(rows, columns):
    weight = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
    groups = [range(i, min(i + 128, rows)) for i in range(0, rows, 128)]
    codes, scale, real = quantize(weight, groups, len(groups))
    np.testing.assert_array_equal(dequantize("k", codes, scale, torch.float32).numpy(), real)


def test_codes_that_do_not_tell_are_refused():
    codes = torch.full((768, 128), 3.0).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"do not tell which.*block 0%, head 0%, even 0%"):
        dequantize("k", codes, torch.ones(8, 1), torch.float32, head_dim=192)
    full = torch.full((768, 128), 448.0).to(torch.float8_e4m3fn)
    with pytest.raises(CheckpointError, match=r"do not tell which.*block 100%"):
        dequantize("k", full, torch.ones(8, 1), torch.float32, head_dim=192)


@pytest.mark.parametrize(
    ("codes", "scale", "says"),
    [
        (torch.zeros(4, 4), torch.ones(1, 1), "float8_e4m3fn matrices; got torch.float32"),
        (torch.zeros(4, 4).to(torch.float8_e5m2), torch.ones(1, 1), "got torch.float8_e5m2"),
        (torch.zeros(300, 4).to(torch.float8_e4m3fn), torch.ones(2, 1), "k: 300 rows have 2 rows.*need 3"),
        (torch.zeros(4, 300).to(torch.float8_e4m3fn), torch.ones(1, 2), "300 columns need 3"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.zeros(1, 1), "finite and above 0"),
        (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.full((1, 1), torch.nan), "finite and above 0"),
    ],
)
def test_what_does_not_fit_is_refused(codes, scale, says):
    with pytest.raises(CheckpointError, match=says):
        dequantize("k", codes, scale, torch.float32)


FLASH = {  # heads of 192 and 4 of them for keys, as in the release, so that both tilings occur
    "model_type": "mimo_v2_flash", "vocab_size": 32, "hidden_size": 200, "intermediate_size": 136,
    "num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "sliding_window": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
    "swa_num_attention_heads": 8, "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "layernorm_epsilon": 1e-5,
    "num_nextn_predict_layers": 1, "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
}  # fmt: skip
TABLE = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
KEY = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A directory stored as the release is, FP8 but for outputs, norms, router and ends, and its numbers."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    Decoder(ModelConfig.from_hf(FLASH)).init_weights(0).save(folder)
    stored, real = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(stored.items()):
        if not name.endswith("_proj.weight") or name.endswith(("o_proj.weight", "eh_proj.weight")):
            real[name] = tensor
            continue
        rows = tensor.shape[0]
        groups = [range(i, min(i + 128, rows)) for i in range(0, rows, 128)]
        if name == KEY:
            groups = GROUPS["head"]
        codes, scale, numbers = quantize(tensor.numpy(), groups, len(groups))
        stored[name], stored[f"{name}_scale_inv"], real[name] = codes, scale, torch.from_numpy(numbers)
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**FLASH, "quantization_config": TABLE}))
    return folder, real


def test_a_release_in_fp8_loads_as_its_real_numbers(release, tmp_path):
    folder, real = release
    load_model(folder, dtype="float32").save(tmp_path / "float32")
    written = load_file(tmp_path / "float32" / "model.safetensors")
    assert written.keys() == real.keys()
    assert [n for n in real if not torch.equal(written[n], real[n])] == []
    assert "quantization_config" not in json.loads((tmp_path / "float32" / "config.json").read_text())
    weights = load_model(folder).state_dict()  # nobody says: bfloat16 for what was FP8, the rest as stored
    assert torch.equal(weights[KEY], real[KEY].to(torch.bfloat16))
    assert weights["model.layers.1.mlp.gate.weight"].dtype == torch.float32
    load_model(folder, device="meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_release_in_fp8_loads_on_a_gpu_with_the_same_bits(release):
    there = load_model(release[0], device="cuda").state_dict()
    assert all(torch.equal(there[name].cpu(), t) for name, t in load_model(release[0]).state_dict().items())


@pytest.mark.parametrize(
    ("says", "changes", "table"),
    [
        (f"{KEY}: 768 rows have 5 rows", {f"{KEY}_scale_inv": torch.ones(5, 2)}, {}),
        ("200 columns need 2", {f"{KEY}_scale_inv": torch.ones(8, 3)}, {}),
        (f"{KEY} is F8_E4M3; readable: F64", {f"{KEY}_scale_inv": None}, {}),
        (f"{KEY} is F32; readable: F8_E4M3", {KEY: torch.ones(768, 200)}, {}),
        (r"weight_block_size \[64, 64\]", {}, {"weight_block_size": [64, 64]}),
        ("not account for: model.norm.scale_inv", {"model.norm.scale_inv": torch.ones(1)}, {}),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_damaged_releases_are_refused(release, tmp_path, says, changes, table, device):
    stored = load_file(release[0] / "model.safetensors") | changes
    save_file({n: t for n, t in stored.items() if t is not None}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**FLASH, "quantization_config": TABLE | table}))
    with pytest.raises(CheckpointError, match=says):
        load_model(tmp_path, device=device)
