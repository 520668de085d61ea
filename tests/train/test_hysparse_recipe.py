"""recipes/hysparse-tiny.toml and its twin in a few steps: they learn, are saved, loaded and generate."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import sateen
from sateen.config import Silent, load_recipe
from sateen.run import run_recipe
from sateen.train.metrics import read_metrics

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
WORDS = ["warp", "weft", "loom", "thread", "satin", "weave", "silk", "cotton", "shuttle", "reed", "heddle"]


@pytest.mark.parametrize(
    ("overlays", "preset", "oracles"),
    [([], "hysparse-tiny", 2), (["hysparse-tiny-twin.toml"], "hysparse-tiny", 0), ([], "hysparse2-tiny", 3)],
    ids=["hysparse", "twin", "hysparse2"],
)
def test_a_shortened_run_learns_and_its_checkpoint_generates(overlays, preset, oracles, tmp_path):
    texts, rng = tmp_path / "texts", random.Random(0)
    texts.mkdir()
    for i in range(40):
        (texts / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=250)))
    shortened = [
        f"model.preset={preset}",
        f'data.docs={{kind="text_dir", path="{texts}"}}', "tokenizer.vocab_size=300",
        "stages.pretrain.tokens=12288", "stages.pretrain.seq_len=128",
        "stages.pretrain.tokens_per_batch=1024",
        "stages.pretrain.schedule.warmup_tokens=1024", "stages.pretrain.schedule.decay_tokens=4096",
    ]  # fmt: skip
    config = load_recipe([RECIPES / name for name in ("hysparse-tiny.toml", *overlays)], shortened)
    run_recipe(config, tmp_path / "run", Silent())
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[0] > 6.1  # ln(512) or ln(1024): every token is as likely as the others
    assert losses[-1] < 4.5

    folder = tmp_path / "run" / "model"
    model = sateen.load_model(folder)
    kinds = [spec.attention for spec in model.config.layers()]
    assert kinds.count("oracle_attention") == oracles
    model.save(tmp_path / "again")
    params = sateen.SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    prompt = "warp weft loom " * 20
    first, second = (
        sateen.LLM(place).generate([prompt], params)[0] for place in (folder, tmp_path / "again")
    )
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    # Past the window and the first pages: greedy tokens are those of one forward over everything before them.
    tokens = [*first.prompt_token_ids, *first.outputs[0].token_ids]
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    start = len(first.prompt_token_ids) - 1
    assert logits[start:-1].argmax(-1).tolist() == first.outputs[0].token_ids
