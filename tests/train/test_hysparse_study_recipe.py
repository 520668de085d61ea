"""The study's recipe in a few steps: every arm trains on answers and text, is saved, loaded and asked."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest

import sateen
from sateen.config import Silent, load_recipe
from sateen.data.long_context import MultiKey, long_task
from sateen.data.token_file import TokenFile
from sateen.data.tokenizer import Tokenizer
from sateen.eval.long_context import retrieval
from sateen.run import run_recipe
from sateen.train.metrics import read_metrics

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = ["".join(letters) for letters in product("bdfgk", "aeiou", "lmnrst")]
OTHERS = ["WARP", "WEFT", "LOOM", "SILK", "REED", "SATIN", "SHUTTLE"]
ARMS = {
    "full": (["hysparse-study-full.toml"], [], 0),
    "hysparse": ([], [], 1),
    "hysparse2": (["hysparse-study-2.toml"], [], 2),
    "own-kv": ([], ["model.overrides.share_kv_sa=false"], 1),
    "shared-in-both": ([], ["model.overrides.share_kv_swa=true"], 1),
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Words in capitals, and a document of the words that keys and values are drawn from."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for i in range(20):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(OTHERS, k=250)))
    (folder / "names.txt").write_text(" ".join(rng.sample(NAMES * 8, 8 * len(NAMES))))
    return folder


@pytest.mark.parametrize("arm", ARMS)
def test_a_shortened_arm_trains_and_answers_are_all_that_is_trained(arm, texts, tmp_path):
    overlays, sets, oracles = ARMS[arm]
    shortened = [
        f'data.docs={{kind="text_dir", path="{texts}", heldout_share=0.1}}', "tokenizer.vocab_size=460",
        "model.overrides.hidden_size=64", "model.overrides.head_dim=16", "model.overrides.v_head_dim=16",
        "model.overrides.intermediate_size=96", "model.overrides.vocab_size=460",
        "stages.pairs.tokens=4096", "stages.pairs.tokens_per_batch=1024",
        "stages.pairs.schedule.warmup_tokens=0",
        "stages.hops.tokens=1024", "stages.hops.tokens_per_batch=1024",
        "stages.near.tokens=1024", "stages.near.tokens_per_batch=1024", "stages.mixed.tokens=1024",
        "stages.far.tokens=1024", "stages.far.tokens_per_batch=1024", "stages.mixed.tokens_per_batch=1024",
        "dtype=float32",
    ]  # fmt: skip
    names = load_recipe([RECIPES / "hysparse-study.toml"]).data
    shortened += [f"data.{name}.num_examples=30" for name in names if name != "docs"]
    shortened += [f"data.{name}.parameters.num_words=64" for name in names if name != "docs"]
    shortened += ["data.multikey.parameters.num_keys=16", "data.vt.parameters.num_chains=8",
                  "data.vt.parameters.num_queries=8", "data.cwe.parameters.other_repeats=15"]  # fmt: skip
    paths = [RECIPES / name for name in ("hysparse-study.toml", *overlays)]
    config = load_recipe(paths, [*shortened, *sets])
    run_recipe(config, tmp_path / "run", Silent())
    rows = read_metrics(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["pairs"] * 4 + ["hops", "near", "far", "mixed"]
    assert rows[3]["loss"] < rows[0]["loss"]
    assert "heldout_bits_per_byte" in rows[-1]

    file = TokenFile(tmp_path / "run" / "data" / "pairs")
    tokenizer = Tokenizer.load(tmp_path / "run" / "model")
    ids = file.document(0).tolist()
    targets = file.targets[file.offsets[0] : file.offsets[1]].tolist()
    lines = tokenizer.decode(ids[1:-1]).split("\n")
    answers = [line.split()[2] for line in lines if line.startswith("? ")]
    trained = [tokenizer.decode([i]).strip() for i, is_target in zip(ids, targets, strict=True) if is_target]
    assert trained == answers
    assert len(answers) == 5

    model = sateen.load_model(tmp_path / "run" / "model")
    kinds = [spec.attention for spec in model.config.layers()]
    assert kinds.count("oracle_attention") == oracles
    task = long_task(MultiKey, tokenizer, ["OH MY 12."], num_keys=4, num_queries=4, length=200)
    assert 0 <= retrieval(model, tokenizer, task, documents=2, seed=0).accuracy < 1
