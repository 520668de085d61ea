"""The published sizes: every tensor of MiMo-V2-Flash and MiMo-7B, by name, shape and dtype, without data.

The lists are written out here from the releases' layouts, not by our models. Files have their headers and
their lengths and hold nothing, so they take no disk.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sateen.checkpoint.inspect import inspect
from sateen.checkpoint.load import check
from sateen.errors import CheckpointError

SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
GLOBAL = (0, 5, 11, 17, 23, 29, 35, 41, 47)


def fp8(name, rows, columns, scale_rows=None):
    scale = (scale_rows or math.ceil(rows / 128), math.ceil(columns / 128))
    return [(name, "F8_E4M3", (rows, columns)), (f"{name}_scale_inv", "F32", scale)]


def flash_attention(prefix, is_global):
    keys, values = (768, 512) if is_global else (1536, 1024)
    found = fp8(f"{prefix}.q_proj.weight", 12288, 4096)
    found += fp8(f"{prefix}.k_proj.weight", keys, 4096, scale_rows=8 if is_global else 12)
    found += fp8(f"{prefix}.v_proj.weight", values, 4096)
    found.append((f"{prefix}.o_proj.weight", "BF16", (4096, 8192)))
    if not is_global:
        found.append((f"{prefix}.attention_sink_bias", "BF16", (64,)))
    return found


def mlp(prefix, width):
    return [
        *fp8(f"{prefix}.gate_proj.weight", width, 4096),
        *fp8(f"{prefix}.up_proj.weight", width, 4096),
        *fp8(f"{prefix}.down_proj.weight", 4096, width),
    ]


def flash_shards():
    """File -> tensors: the ends, one file per layer, one for the MTP layers."""
    files = {
        "model_ends.safetensors": [
            ("model.embed_tokens.weight", "BF16", (152576, 4096)),
            ("lm_head.weight", "BF16", (152576, 4096)),
            ("model.norm.weight", "BF16", (4096,)),
        ]
    }
    for i in range(48):
        layer = f"model.layers.{i}"
        found = [
            (f"{layer}.{norm}.weight", "BF16", (4096,))
            for norm in ("input_layernorm", "post_attention_layernorm")
        ]
        found += flash_attention(f"{layer}.self_attn", i in GLOBAL)
        if i == 0:
            found += mlp(f"{layer}.mlp", 16384)
        else:
            found.append((f"{layer}.mlp.gate.weight", "F32", (256, 4096)))
            found.append((f"{layer}.mlp.gate.e_score_correction_bias", "F32", (256,)))
            for e in range(256):
                found += mlp(f"{layer}.mlp.experts.{e}", 2048)
        files[f"model_{i}.safetensors"] = found
    files["model_mtp.safetensors"] = []
    for i in range(3):
        head = f"model.mtp.layers.{i}"
        norms = ("enorm", "hnorm", "input_layernorm", "pre_mlp_layernorm", "final_layernorm")
        files["model_mtp.safetensors"] += [(f"{head}.{norm}.weight", "BF16", (4096,)) for norm in norms]
        files["model_mtp.safetensors"].append((f"{head}.eh_proj.weight", "BF16", (4096, 8192)))
        files["model_mtp.safetensors"] += flash_attention(f"{head}.self_attn", is_global=False)
        files["model_mtp.safetensors"] += mlp(f"{head}.mlp", 16384)
    return files


FLASH = {
    "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "", "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True, "attention_bias": False, "attention_chunk_size": 128,
    "attention_dropout": 0.0, "attention_value_scale": 0.707, "head_dim": 192, "v_head_dim": 128,
    "num_attention_heads": 64, "num_key_value_heads": 4, "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8, "swa_head_dim": 192, "swa_v_head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "hybrid_block_size": None, "num_hidden_layers": 48,
    "hybrid_layer_pattern": [int(i not in GLOBAL) for i in range(48)], "moe_layer_freq": [0] + 47 * [1],
    "intermediate_size": 16384, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": None, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "routed_scaling_factor": None, "layernorm_epsilon": 1e-5, "partial_rotary_factor": 0.334,
    "rope_theta": 5000000, "swa_rope_theta": 10000, "sliding_window": 128, "sliding_window_size": 128,
    "max_position_embeddings": 262144, "tie_word_embeddings": False, "use_cache": True,
    "vocab_size": 152576, "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip


def mimo_layer(prefix, norms):
    shapes = {
        "self_attn.q_proj.weight": (4096, 4096), "self_attn.q_proj.bias": (4096,),
        "self_attn.k_proj.weight": (1024, 4096), "self_attn.k_proj.bias": (1024,),
        "self_attn.v_proj.weight": (1024, 4096), "self_attn.v_proj.bias": (1024,),
        "self_attn.o_proj.weight": (4096, 4096), "mlp.gate_proj.weight": (11008, 4096),
        "mlp.up_proj.weight": (11008, 4096), "mlp.down_proj.weight": (4096, 11008),
    }  # fmt: skip
    shapes |= {f"{norm}.weight": (4096,) for norm in norms}
    return [(f"{prefix}.{name}", "BF16", shape) for name, shape in shapes.items()]


def mimo_head(k):
    norms = ("token_layernorm", "hidden_layernorm", "input_layernorm", "post_attention_layernorm",
             "final_layernorm")  # fmt: skip
    join = (f"model.mtp_layers.{k}.input_proj.weight", "BF16", (4096, 8192))
    return [join, *mimo_layer(f"model.mtp_layers.{k}", norms)]


def mimo_shards():
    """Four files of 9 layers, as the release has four shards."""
    files = {}
    for part in range(4):
        found = []
        for i in range(9 * part, 9 * part + 9):
            found += mimo_layer(f"model.layers.{i}", ("input_layernorm", "post_attention_layernorm"))
        files[f"model-{part + 1:05}-of-00004.safetensors"] = found
    first, *_, last = files
    files[first].append(("model.embed_tokens.weight", "BF16", (151680, 4096)))
    files[last] += mimo_head(0)
    files[last] += [
        ("model.norm.weight", "BF16", (4096,)),
        ("lm_head.weight", "BF16", (151680, 4096)),
    ]
    return files


MIMO = {
    "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True,
    "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 640000, "rope_scaling": None, "max_position_embeddings": 32768,
    "max_window_layers": 36, "sliding_window": 32768, "use_sliding_window": False, "use_mrope": False,
    "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 151680,
    "torch_dtype": "bfloat16", "num_nextn_predict_layers": 1,
}  # fmt: skip


def write(folder, files, config=None):
    """Headers, an index, and files of the right length with nothing in them."""
    folder.mkdir()
    weight_map = {}
    for file, tensors in files.items():
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape in sorted(tensors, key=lambda tensor: -SIZES[tensor[1]]):
            begin, end = end, end + math.prod(shape) * SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        words = json.dumps(header).encode()
        words += b" " * (-len(words) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(words).to_bytes(8, "little") + words)
            out.truncate(8 + len(words) + end)
        weight_map |= {name: file for name, _, _ in tensors}
    total = {"total_size": sum(math.prod(s) * SIZES[d] for t in files.values() for _, d, s in t)}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": total, "weight_map": weight_map})
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def on_disk(folder):
    return sum(512 * file.stat().st_blocks for file in folder.iterdir())


@pytest.fixture(scope="module")
def flash(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("flash") / "MiMo-V2-Flash", flash_shards(), FLASH)
    if on_disk(folder) > 2**28:
        pytest.skip("this file system has no sparse files")
    return folder


def test_every_tensor_of_the_309b_release_finds_its_place(flash):
    tensors = {name: (dtype, shape) for t in flash_shards().values() for name, dtype, shape in t}
    stored = check(flash)
    assert all(parameter.is_meta for parameter in stored.model.parameters())
    scales = {name for name in tensors if name.endswith("_scale_inv")}
    experts = 47 * 256 * 3 * 2
    assert len(tensors) == experts + 9 * 7 + 39 * 8 + 48 * 2 + 6 + 47 * 2 + 3 + 3 * 20 == 72_826
    assert set(stored.files.where) == tensors.keys() - scales
    assert set(stored.scales.files.where) == scales
    assert stored.places.keys() == tensors.keys() - scales
    assert stored.model.num_mtp_heads == 3
    assert len({parameter for parameter, _ in stored.places.values()}) == len(stored.model.state_dict())


LOOK = """
import json, sys
from pathlib import Path
from sateen.checkpoint.inspect import inspect
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
found = inspect(sys.argv[1], context=[32768])
print(json.dumps({"found": found, "kilobytes": peak() - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_inspect_gives_the_published_totals_in_little_memory(flash):
    sizes = {
        name: (dtype, math.prod(shape))
        for tensors in flash_shards().values()
        for name, dtype, shape in tensors
    }
    # A router's selection bias is a number that training sets, not a parameter.
    counted = {n: size for n, (_, size) in sizes.items() if not n.endswith(("_scale_inv", "correction_bias"))}
    mtp = sum(size for name, size in counted.items() if ".mtp." in name)
    experts = sum(size for name, size in counted.items() if ".experts." in name)
    total = sum(counted.values()) - mtp
    assert (round(total / 1e9, 2), round(mtp / 3e9, 4)) == (308.78, 0.3293)  # 309B; 0.33B per MTP layer
    active = total - experts + experts * 8 // 256
    assert round(active / 1e9, 2) == 15.45
    by_dtype: dict[str, int] = {}
    for dtype, size in sizes.values():
        by_dtype[dtype] = by_dtype.get(dtype, 0) + size * SIZES[dtype]
    run = subprocess.run([sys.executable, "-c", LOOK, str(flash)], capture_output=True, text=True, check=True)
    printed = json.loads(run.stdout)
    assert printed["found"]["parameters"] == {"total": total, "mtp": mtp, "active": active}
    assert printed["found"]["weight_bytes"] == by_dtype
    assert printed["kilobytes"] < 400_000  # of 313 GB


def test_one_wrong_shape_among_all_is_named(flash, tmp_path):
    name = "model.layers.40.mlp.experts.200.down_proj.weight"
    wrong = flash_shards()["model_40.safetensors"]
    at = next(i for i, tensor in enumerate(wrong) if tensor[0] == name)
    wrong[at] = name, "F8_E4M3", (4096, 2049)
    for file in flash.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "model_40.safetensors").unlink()
    (write(tmp_path / "part", {"model_40.safetensors": wrong}) / "model_40.safetensors").rename(
        tmp_path / "model_40.safetensors"
    )
    with pytest.raises(
        CheckpointError, match=r"model_40\.safetensors: .*experts\.200\.down_proj.*\(4096, 2049\)"
    ):
        check(tmp_path)


def test_mimo_7b_and_its_separate_heads(tmp_path):
    folder = write(tmp_path / "MiMo-7B-Base", mimo_shards(), MIMO)
    tensors = [tensor for found in mimo_shards().values() for tensor in found]
    assert len(tensors) == 36 * 12 + 3 + 16
    stored = check(folder)
    assert set(stored.files.where) == stored.places.keys() == {name for name, _, _ in tensors}
    assert not stored.scales
    found = inspect(folder, context=[32768])
    assert found["parameters"] == {"total": 7_622_619_136, "mtp": 210_790_400, "active": 7_622_619_136}
    assert found["weight_bytes"] == {"BF16": 2 * 7_833_409_536}
    heads = write(tmp_path / "MiMo-7B-MTPs", {"model.safetensors": mimo_head(1) + mimo_head(2)})
    joined = check(folder, mtp=heads)
    assert joined.model.num_mtp_heads == 3
    assert len(joined.files.where) == len(tensors) + 32
