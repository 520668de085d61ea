"""Two thousand damaged model directories: one error of ours each, that names a file; or a sound load."""

from __future__ import annotations

import copy
import json
import random
import struct

import pytest

from sateen.checkpoint import hf
from sateen.checkpoint.hf import load_model
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
ODD = [None, -1, 0, 1, 2, 3.5, 1e30, "", "x", [], [1], {}, {"a": 1}, True, "fp8", {"quant_method": "fp8"}]


@pytest.fixture(scope="module", params=[LLAMA, FLASH], ids=["llama", "flash"])
def sound(request, tmp_path_factory):
    """A directory of several shards, as bytes by file name."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    patch = pytest.MonkeyPatch()
    patch.setattr(hf, "SHARD_BYTES", 3000)
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


def test_a_damaged_directory_is_an_error_of_ours_or_loads(sound, tmp_path):
    rng = random.Random(0)
    tensors = [name for name in sound if name.endswith(".safetensors")]
    (folder := tmp_path / "model").mkdir()
    refused = 0
    for _ in range(TRIALS):
        files = dict(sound)
        for _ in range(rng.choice([1, 1, 1, 2])):
            what = rng.randrange(5)
            if what == 0:
                files["config.json"] = odd_json(rng, sound["config.json"])
            elif what == 1:
                files[hf.INDEX] = odd_json(rng, sound[hf.INDEX])
            elif what == 2:
                name = rng.choice(tensors)
                files[name] = odd_header(rng, sound[name])
            else:
                name = rng.choice(list(sound))
                files[name] = odd_bytes(rng, sound[name])
        for name, data in files.items():
            (folder / name).write_bytes(data)
        said = refusal(folder, rng.choice(["cpu", "meta"]))
        refused += said is not None
        assert said is None or (
            "\n" not in said and "config.json" in said.replace(str(folder), "config.json")
        )
    assert refused > TRIALS / 2
