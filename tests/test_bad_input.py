"""Every mistake on the project's list, made through the command line: one line, exit 2, nothing lost."""

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sateen.checkpoint import hf
from sateen.cli import main
from sateen.data.tokenizer import Tokenizer
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

WORDS = "the warp and the weft of satin cross once in four threads\n"

RECIPE = """
name = "small"
threads = 1
[model]
preset = "mimo-v2-flash-tiny"
overrides = { vocab_size = 300, num_nextn_predict_layers = 1 }
[tokenizer]
vocab_size = 280
[data.text]
kind = "text_dir"
path = "{texts}"
[[stages]]
stage = "pretrain"
tokens = 256
seq_len = 32
tokens_per_batch = 64
checkpoint_every_tokens = 64
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"{i} " + WORDS * 8)
    file = tmp_path / "small.toml"
    file.write_text(RECIPE.replace("{texts}", str(texts)))
    return file


@pytest.fixture
def model(tmp_path) -> Path:
    """A tiny model directory with its tokenizer."""
    folder = tmp_path / "model"
    raw = preset("mimo-v2-flash-tiny") | {"vocab_size": 300, "max_position_embeddings": 64}
    hf.save(Decoder(ModelConfig.from_hf(raw)).init_weights(0), folder)
    tokenizer = Tokenizer.train([WORDS * 20], 280)
    tokenizer.save(folder.parent / "tokenizer")
    for file in (folder.parent / "tokenizer").iterdir():
        file.rename(folder / file.name)
    return folder


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that must exit with 2."""
    capsys.readouterr()
    assert main([str(a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("sateen: error: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_unknown_recipe_key_names_the_nearest(recipe, capsys, tmp_path):
    recipe.write_text(recipe.read_text().replace("seq_len", "sec_len"))
    line = refused(capsys, "train", recipe, "--out", tmp_path / "run")
    assert "small.toml" in line
    assert "sec_len" in line
    assert "did you mean" in line
    assert "seq_len" in line
    assert not (tmp_path / "run").exists()


def test_unknown_model_key_names_the_nearest(model, capsys):
    raw = json.loads((model / "config.json").read_text())
    raw["num_key_value_head"] = raw.pop("num_key_value_heads")
    (model / "config.json").write_text(json.dumps(raw))
    line = refused(capsys, "generate", model, "-p", "the")
    assert "num_key_value_head is not a key" in line
    assert "did you mean num_key_value_heads?" in line


def test_unknown_tensor_is_named(model, capsys):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.extra.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.0.self_attn.extra.weight" in refused(capsys, "generate", model, "-p", "the")


def test_truncated_safetensors_is_named(model, capsys):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    line = refused(capsys, "generate", model, "-p", "the")
    assert str(file) in line
    assert "not a complete safetensors file" in line


def test_tokenizer_larger_than_the_model(model, capsys):
    letters = random.Random(0).choices("abcdefgh ", k=20_000)
    Tokenizer.train(["".join(letters)], 400).save(model.parent / "larger")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model.parent / "larger" / name).replace(model / name)
    line = refused(capsys, "generate", model, "-p", "the")
    assert "400" in line
    assert "300" in line


def test_prompt_longer_than_the_context(model, capsys):
    line = refused(capsys, "generate", model, "-p", WORDS * 10)
    assert "64" in line


def test_run_folder_of_another_recipe(recipe, capsys, tmp_path):
    out = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(out)]) == 0
    before = files_below(out)
    line = refused(capsys, "train", recipe, "--set", "seed=1", "--out", out)
    assert "another recipe" in line
    assert "seed" in line
    assert files_below(out) == before


def test_full_disk_during_a_checkpoint_keeps_the_old_one(recipe, tmp_path):
    """A limit on file sizes stands in for a full disk: the write fails in the same place with an OSError."""
    out = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(out)]) == 0
    more = [sys.executable, "-m", "sateen.cli", "train", str(recipe), "--out", str(out)]
    # A longer budget would be another recipe, so the finished run is made an unfinished one of that recipe.
    settings = (out / "run.toml").read_text()
    (out / "run.toml").write_text(settings.replace("tokens = 256", "tokens = 512", 1))
    progress = json.loads((out / "progress.json").read_text())
    progress["done"] = []
    (out / "progress.json").write_text(json.dumps(progress))
    newest = max((out / "checkpoints").glob("step_*/meta.json"), key=lambda f: int(f.parent.name[5:]))
    state = json.loads(newest.read_text())
    state["progress"]["is_finished"] = False
    newest.write_text(json.dumps(state, indent=1) + "\n")
    kept = files_below(out / "checkpoints")
    assert kept

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [*more, "--set", "stages.0.tokens=512"],
        capture_output=True,
        text=True,
        preexec_fn=small_files,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("sateen: error: ")]
    assert len(errors) == 1
    assert "could not be written" in errors[0]
    assert "resume" in errors[0]
    assert files_below(out / "checkpoints") == kept
