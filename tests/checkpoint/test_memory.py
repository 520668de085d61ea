"""Peak memory of loading and of streaming conversions, as the system counts it, mapped pages included."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

RAW = {
    "model_type": "llama", "vocab_size": 65536, "hidden_size": 512, "intermediate_size": 2048,
    "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
MEASURE = """
import json, sys
from pathlib import Path
import torch
from sateen.checkpoint.convert import main
from sateen.checkpoint.hf import load_model

def kilobytes(field):
    # Not ru_maxrss: that of a new process begins with the memory of the one it was forked from.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

def load(dtype):
    model = load_model(source, dtype=dtype)
    assert not any(bool(p.detach().view(torch.uint8).any()) for p in model.parameters())  # touch every page

source, out = sys.argv[1:]
load_model("mimo-7b-tiny", dtype="float32").save(out)  # what a first run allocates once
main(out, out, dtype="bfloat16")
before = kilobytes("VmRSS")
steps = {  # in the order of their peaks, since the system tells the highest so far
    "convert": lambda: main(source, out),
    "convert float32": lambda: main(source, out, dtype="float32"),
    "load": lambda: load(None),
    "load float32": lambda: load("float32"),
}
grown = {}
for name, step in steps.items():
    step()
    grown[name] = 1024 * (kilobytes("VmHWM") - before)
print(json.dumps(grown))
"""
SLACK = 40e6  # allocator, libraries loaded late


def shapes():
    layer = {
        "self_attn.q_proj": (512, 512), "self_attn.k_proj": (512, 512), "self_attn.v_proj": (512, 512),
        "self_attn.o_proj": (512, 512), "mlp.gate_proj": (2048, 512), "mlp.up_proj": (2048, 512),
        "mlp.down_proj": (512, 2048), "input_layernorm": (512,), "post_attention_layernorm": (512,),
    }  # fmt: skip
    found = {f"model.layers.{i}.{name}.weight": shape for i in range(10) for name, shape in layer.items()}
    ends = {
        "model.embed_tokens.weight": (65536, 512),
        "model.norm.weight": (512,),
        "lm_head.weight": (65536, 512),
    }
    return found | ends


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory of 197 MB in one file of zeros, which takes no disk where files may be sparse."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "config.json").write_text(json.dumps(RAW))
    header, end = {}, 0
    for name, shape in shapes().items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with (folder / "model.safetensors").open("wb") as out:
        out.write(len(words).to_bytes(8, "little") + words)
        out.truncate(8 + len(words) + end)
    return folder


STORED = sum(2 * math.prod(shape) for shape in shapes().values())
LARGEST = 2 * 65536 * 512
# What is held at most: a model that is kept, and beside it the largest tensor as stored and as it becomes.
BOUNDS = {
    "convert": LARGEST,
    "convert float32": LARGEST + 2 * LARGEST,
    "load": STORED + LARGEST,
    "load float32": 2 * STORED + LARGEST,
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_peak_memory(model, tmp_path):
    command = [sys.executable, "-c", MEASURE, str(model), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown = json.loads(run.stdout.splitlines()[-1])
    for name, most in BOUNDS.items():
        print(f"{name}: {grown[name] / 1e6:.0f} MB of at most {(most + SLACK) / 1e6:.0f}")
        assert grown[name] < most + SLACK
    # The measure sees mapped pages, and the bounds are below what holding too much would take.
    assert grown["load"] > 0.9 * STORED > BOUNDS["convert"] + SLACK
    assert grown["load float32"] > 0.9 * 2 * STORED > BOUNDS["convert float32"] + SLACK
    assert BOUNDS["load float32"] + SLACK < 3 * STORED
