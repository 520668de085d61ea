"""recipes/fairy-tiny.toml and its twin in a few steps: they learn, are saved, packed, loaded and generate."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import sateen
from sateen.config import Silent, load_recipe
from sateen.models.quantize import linear_bytes, pack_model
from sateen.run import run_recipe
from sateen.train.metrics import read_metrics

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WORDS = ["warp", "weft", "loom", "thread", "satin", "weave", "silk", "cotton", "shuttle", "reed", "heddle"]
TWIN = ["fairy-tiny-twin.toml"]


def method(name):
    return [f'model.overrides.quantization_config={{quant_method="{name}"}}']


def check_greedy(folder, model):
    """The engine's greedy tokens are the model's best ones, or as good as those, in one forward over all."""
    params = sateen.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (got,) = sateen.LLM(folder).generate(["warp weft loom " * 20], params)
    chosen = torch.tensor(got.outputs[0].token_ids)
    ids = torch.tensor([[*got.prompt_token_ids, *chosen.tolist()]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(got.prompt_token_ids) - 1 : -1]
    assert len(chosen) == 12
    assert float((logits.amax(-1) - logits.gather(1, chosen[:, None])[:, 0]).max()) < 0.05


@pytest.mark.parametrize(
    ("overlays", "sets", "kind"),
    [
        ([], [], "phase"),
        ([], method("none"), None),
        (TWIN, [], None),
        (TWIN, method("ternary"), "ternary"),
        (TWIN, method("int2"), "int2"),
    ],
    ids=["complex-2bit", "complex", "real", "real-ternary", "real-int2"],
)
def test_a_shortened_run_learns_and_its_packed_weights_generate(overlays, sets, kind, tmp_path):
    texts, rng = tmp_path / "texts", random.Random(0)
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=250)))
    shortened = [
        f'data.docs={{kind="text_dir", path="{texts}"}}', "tokenizer.vocab_size=300",
        "model.overrides.num_hidden_layers=2", "model.overrides.hidden_size=64",
        "model.overrides.intermediate_size=160",
        "stages.pretrain.tokens=16384", "stages.pretrain.seq_len=128",
        "stages.pretrain.tokens_per_batch=1024",
        "stages.pretrain.schedule.warmup_tokens=1024", "stages.pretrain.schedule.decay_tokens=6144",
    ]  # fmt: skip
    config = load_recipe([RECIPES / name for name in ("fairy-tiny.toml", *overlays)], shortened + sets)
    run_recipe(config, tmp_path / "run", Silent())
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[0] > 6.1  # ln(1024): every token is as likely as the others
    assert losses[-1] < 4.0

    model = sateen.load_model(tmp_path / "run" / "model")
    quant = model.config.quant
    assert (quant.method if quant else None) == kind
    folder = tmp_path / "run" / "model"
    if kind is None:
        check_greedy(folder, model)
        return
    pack_model(model).save(tmp_path / "packed")
    again = sateen.load_model(tmp_path / "packed")
    check_greedy(tmp_path / "packed", model)
    # Two layers of 64 x 64 and 160 x 64: four matrices of 64 rows, two of 160, padded to 192, and one of 64
    # rows; every row of 64 or 160 columns is padded to 256, of which four fit a byte.
    rows = 2 * (4 * 64 + 2 * 192 + 64)
    scales = 2 if kind == "phase" else 1
    assert linear_bytes(again)["bytes"] == rows * 64 + 14 * 4 * scales
    ids = torch.randint(300, (1, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        masters, codes = model(ids).logits, again(ids).logits
    # Not exact: a last bit that differs may turn over an activation's int8 code, in a token here and there.
    assert float((codes - masters).norm() / masters.norm()) < 1e-3
