"""What several files about stored models need: bytes of directories, and directories in FP8."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file


def read_contents(folder):
    """Tensor name -> (dtype, shape, bytes), whatever its shard; headers are parsed here, by hand."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                assert name not in found, f"{name} is in two files"
                found[name] = entry["dtype"], tuple(entry["shape"]), data[start + begin : start + end]
    return found


@pytest.fixture(scope="session")
def contents():
    return read_contents


def store_as_fp8(folder, per_head=None):
    """Turns a saved float32 MiMo-V2-Flash into FP8 with a scale per 128 x 128 block, as the release is.

    `per_head`: rows of a head, where the key projections of full layers restart their blocks at every head.
    """
    tensors = load_file(folder / "model.safetensors")
    kinds = json.loads((folder / "config.json").read_text())["hybrid_layer_pattern"]
    full = {f"model.layers.{i}.self_attn.k_proj.weight" for i, kind in enumerate(kinds) if kind == 0}
    for name, weight in list(tensors.items()):
        if not name.endswith("_proj.weight") or name.endswith(("o_proj.weight", "eh_proj.weight")):
            tensors[name] = weight if ".mlp.gate." in name else weight.bfloat16()
            continue
        rows, columns = weight.shape
        step = per_head if per_head and name in full else rows
        groups = [(a, min(a + 128, h + step)) for h in range(0, rows, step) for a in range(h, h + step, 128)]
        codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
        scale = torch.zeros(len(groups), -(-columns // 128))
        for g, (a, b) in enumerate(groups):
            for c in range(scale.shape[1]):
                part = weight[a:b, c * 128 : c * 128 + 128]
                scale[g, c] = part.abs().max() / 448
                codes[a:b, c * 128 : c * 128 + 128] = (part / scale[g, c]).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def as_fp8():
    return store_as_fp8
