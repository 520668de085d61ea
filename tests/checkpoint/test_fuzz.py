"""Thousands of damaged model directories: one error of ours each, that names a file; or a sound load.

Some are converted instead of loaded: what the destination held stays until a whole model replaces it.
"""

from __future__ import annotations

import copy
import json
import math
import random
import struct

import pytest

from sateen.checkpoint import write
from sateen.checkpoint.convert import main
from sateen.checkpoint.hf import load_model
from sateen.checkpoint.shards import INDEX
from sateen.errors import SateenError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
FLASH = {
    "model_type": "mimo_v2_flash", "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16,
    "num_hidden_layers": 2, "hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "sliding_window": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 6, "v_head_dim": 4,
    "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_head_dim": 6, "swa_v_head_dim": 4,
    "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4, "layernorm_epsilon": 1e-5,
    "num_nextn_predict_layers": 1, "rope_theta": 5e6, "swa_rope_theta": 1e4, "partial_rotary_factor": 0.334,
    "quantization_config": None,
}  # fmt: skip
TRIALS = 1000  # for each of two families
FP8_TRIALS = 400
ODD = [None, -1, 0, 1, 2, 3.5, 1e30, "", "x", [], [1], {}, {"a": 1}, True, "fp8", {"quant_method": "fp8"}]


@pytest.fixture(scope="module", params=[LLAMA, FLASH], ids=["llama", "flash"])
def sound(request, tmp_path_factory):
    """A directory of several shards, as bytes by file name."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    patch = pytest.MonkeyPatch()
    patch.setattr(write, "SHARD_BYTES", 3000)
    Decoder(ModelConfig.from_hf(request.param)).init_weights(0).save(folder)
    patch.undo()
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def odd_json(rng, text):
    """The same JSON with one value, key or list somewhere in it changed."""
    tree = json.loads(text)
    node, steps = tree, rng.randrange(4)
    while steps and isinstance(node, dict | list) and node:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], dict | list):
            break
        node, steps = node[key], steps - 1
    if isinstance(node, dict) and node:
        key = rng.choice(list(node))
        what = rng.randrange(4)
        if what == 0:
            del node[key]
        elif what == 1:
            node[key[:-1] + rng.choice("xyz_")] = node.pop(key)
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    elif isinstance(node, list) and node:
        node[rng.randrange(len(node))] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(tree).encode()


def odd_bytes(rng, data):
    """The same bytes with some flipped, cut off, doubled or put in."""
    data = bytearray(data)
    what = rng.randrange(4)
    at = rng.randrange(min(len(data), 600))
    if what == 0:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
    elif what == 1:
        del data[rng.randrange(len(data)) :]
    elif what == 2:
        data[at:at] = data[at : at + rng.randrange(1, 40)]
    else:
        del data[at : at + rng.randrange(1, 8)]
    return bytes(data)


def odd_header(rng, data):
    """A safetensors file whose header is sound JSON and says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    header = odd_json(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def refusal(folder, device):
    """What the loader says against a directory, None where it loads; any error but ours comes through."""
    try:
        load_model(folder, device=device)
    except SateenError as error:
        return str(error)
    return None


def conversion_refusal(rng, folder, out):
    """What a streaming conversion says, None where it wrote a model; never half of one."""
    before = files_of(out)
    try:
        main(str(folder), str(out), dtype=rng.choice(["keep", "keep", "bfloat16", "float32"]))
    except SateenError as error:
        assert files_of(out) == before
        return str(error)
    finally:
        assert sorted(place.name for place in out.parent.iterdir()) == ["model", "out"]
    load_model(out, device="meta")
    return None


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def outcome(rng, modes, folder, out):
    """What loading on the CPU, looking at headers alone or converting says; None where it is done."""
    mode = rng.choice(modes)
    said = conversion_refusal(rng, folder, out) if mode == "convert" else refusal(folder, mode)
    assert said is None or ("\n" not in said and "config.json" in said.replace(str(folder), "config.json"))
    return said


class Place:
    """A directory that is made to hold given files; only those that differ are written."""

    def __init__(self, folder):
        self.folder, self.holds = folder, {}
        folder.mkdir()

    def put(self, files):
        for name, data in files.items():
            if self.holds.get(name) != data:
                (self.folder / name).write_bytes(data)
        self.holds = files


def test_a_damaged_directory_is_an_error_of_ours_or_loads(sound, tmp_path):
    rng = random.Random(0)
    tensors = [name for name in sound if name.endswith(".safetensors")]
    place, out = Place(tmp_path / "model"), Place(tmp_path / "out").folder
    refused = 0
    for _ in range(TRIALS):
        files = dict(sound)
        for _ in range(rng.choice([1, 1, 1, 2])):
            what = rng.randrange(5)
            if what == 0:
                files["config.json"] = odd_json(rng, sound["config.json"])
            elif what == 1:
                files[INDEX] = odd_json(rng, sound[INDEX])
            elif what == 2:
                name = rng.choice(tensors)
                files[name] = odd_header(rng, sound[name])
            else:
                name = rng.choice(list(sound))
                files[name] = odd_bytes(rng, sound[name])
        place.put(files)
        refused += outcome(rng, ["cpu", "meta", "convert"], place.folder, out) is not None
    assert refused > TRIALS / 2


@pytest.fixture(scope="module")
def fp8(tmp_path_factory, as_fp8):
    """The smaller family in FP8, in several shards, as bytes by file name."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    Decoder(ModelConfig.from_hf(FLASH)).init_weights(0).save(folder)
    as_fp8(folder)
    patch = pytest.MonkeyPatch()
    patch.setattr(write, "SHARD_BYTES", 1000)
    main(str(folder), str(folder))
    patch.undo()
    return files_of(folder)


def odd_scales(rng, data):
    """A shard some of whose scales have another value, dtype, shape or name, or are gone."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in header if name.endswith("_scale_inv")]
    for name in rng.sample(names, min(len(names), rng.randrange(1, 3))):
        entry = header[name]
        begin, end = entry["data_offsets"]
        what = rng.randrange(5)
        if what == 0:
            odd = rng.choice([0.0, -1.0, math.nan, math.inf, -math.inf, 1e-45, 3e38])
            body[begin:end] = struct.pack("<f", odd) * ((end - begin) // 4)
        elif what == 1:
            entry["dtype"] = rng.choice(["I32", "U8", "BF16", "F64", "F8_E4M3", "I64", "X"])
        elif what == 2:
            entry["shape"] = rng.choice([[], [1], [2, 1], [1, 1, 1], [1, 2], [0, 1], [-1, 1], [10**12, 1]])
        elif what == 3:
            header[name[: rng.randrange(1, len(name))]] = header.pop(name)
        else:
            del header[name]
    words = json.dumps(header).encode()
    return struct.pack("<Q", len(words)) + words + bytes(body)


def test_damaged_scales_are_an_error_of_ours_and_leave_no_half(fp8, tmp_path):
    rng = random.Random(1)
    shards = [name for name in fp8 if b"_scale_inv" in fp8[name] and name.endswith(".safetensors")]
    assert len(shards) > 3
    place, out = Place(tmp_path / "model"), Place(tmp_path / "out").folder
    refused = 0
    for _ in range(FP8_TRIALS):
        files = dict(fp8)
        for name in rng.sample(shards, rng.randrange(1, 3)):
            files[name] = odd_scales(rng, fp8[name])
        place.put(files)
        refused += outcome(rng, ["cpu", "meta", "convert", "convert"], place.folder, out) is not None
    assert refused > FP8_TRIALS / 2
