"""What an engine's caches do to a text, and the receipt that says so."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sateen.data.text import Document
from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import ConfigError
from sateen.eval.faces import main
from sateen.eval.perplexity import perplexity
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset
from sateen.receipt import Receipt

TEXT = "the quick brown fox jumps over the lazy dog. " * 6
DOCUMENTS = [Document("one", TEXT), Document("two", TEXT[5:90]), Document("three", TEXT[40:200])]
SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights, large enough that rounding to int8 shows."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train([TEXT] * 4, 280)
    config = ModelConfig.from_hf(preset("mimo-7b-tiny") | {"vocab_size": 300})
    model = Decoder(config).init_weights(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "v_proj.weight", "o_proj.weight")):
                weight.mul_(4)
    model.save(path / "m")
    tokenizer.save(path / "m")
    (path / "text.txt").write_text(TEXT)
    return path


def engine(folder: Path, **changes: object) -> LLM:
    return LLM(folder / "m", draft="none", max_model_len=256, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form", [{"kv_cache_dtype": "int8", "attention": "int8"}, {"kv_cache_dtype": "bf16"}]
)
def test_perplexity_through_the_caches_is_that_of_the_engines_own_answers(
    folder: Path, form: dict[str, str]
) -> None:
    """The truth: log-probabilities of prompts as a request gets them."""
    llm = engine(folder, **form)
    assert llm.tokenizer is not None
    got = perplexity(llm.model, llm.tokenizer, DOCUMENTS, context=256, cache=llm.cache)
    ids = [[llm.tokenizer.eos_id, *llm.tokenizer.encode(document.text)] for document in DOCUMENTS]
    nats = 0.0
    for one in ids:
        rows = llm.generate([one], SCORED)[0].prompt_logprobs
        assert rows is not None
        nats -= sum(row[token].logprob for row, token in zip(rows[1:], one[1:], strict=True) if row)
    count = sum(len(one) - 1 for one in ids)
    assert got.num_tokens == count
    served = math.exp(nats / count)
    plain = perplexity(llm.model, llm.tokenizer, DOCUMENTS, context=256)
    assert got.perplexity == pytest.approx(served, rel=1e-5)
    assert abs(got.perplexity - served) < abs(got.perplexity - plain.perplexity) / 5
    usage = llm.stats()["cache"]
    assert usage["used_pages"] == usage["used_slots"] == 0


def test_a_cache_too_small_for_all_takes_documents_in_turn(folder: Path) -> None:
    small = engine(folder, kv_cache_dtype="fp32", max_num_seqs=2, num_pages=5)
    assert small.tokenizer is not None
    documents = DOCUMENTS * 3
    got = perplexity(small.model, small.tokenizer, documents, context=256, cache=small.cache)
    want = perplexity(small.model, small.tokenizer, documents, context=256)
    assert got.num_tokens == want.num_tokens
    assert got.perplexity == pytest.approx(want.perplexity, rel=1e-5)


def test_the_receipt_names_layers_in_floating_point(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = engine(folder, kv_cache_dtype="int8", attention="int8").stats()["int8_attention"]["errors"]
    budget = sorted(errors.values())[-2]
    largest = max(errors, key=errors.get)
    out = tmp_path / "out"
    settings = {"text": str(folder / "text.txt"), "attention": "int8", "kv_cache_dtype": "int8"}
    assert main(str(folder / "m"), **settings, int8_budget=budget, receipt=str(out), json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    receipt = Receipt.read(out)
    assert printed == receipt.quality
    assert receipt.quality["int8_attention"] == {
        "attention": "int8", "kv_cache_dtype": "int8", "budget": budget,
        "probe_tokens": receipt.quality["int8_attention"]["probe_tokens"],
        "errors": errors, "float_layers": [largest],
    }  # fmt: skip
    quality, twin = receipt.quality, receipt.quality["twin"]
    assert quality["perplexity"] != twin["perplexity"]
    rose = quality["perplexity"] > twin["perplexity"]
    assert [row["what"] for row in receipt.worse] == (["bits per byte", "perplexity"] if rose else [])
    weights = sum(x.numel() * x.itemsize for x in engine(folder).model.parameters())
    assert receipt.bytes["weights"] == weights
    assert f"floating point: {largest}" in (out / "RECEIPT.md").read_text()
    assert f"--int8-budget {budget:g}" in receipt.commands[0]
    # The same again, for people; the folder's receipt is of this kind and may be replaced.
    assert main(str(folder / "m"), **settings, int8_budget=budget, receipt=str(out)) == 0
    text = capsys.readouterr().out
    assert f"layers in floating point: {largest}" in text
    assert f"({twin['perplexity']:.4f} in floating point)" in text


def test_receipts_of_training_are_not_replaced(folder: Path, tmp_path: Path) -> None:
    Receipt(source={"kind": "recipe"}).write(tmp_path)
    with pytest.raises(ConfigError, match="receipt of another kind"):
        main(str(folder / "m"), text=str(folder / "text.txt"), receipt=str(tmp_path))
    with pytest.raises(ConfigError, match="not for --lm-eval"):
        main(str(folder / "m"), lm_eval=["arc"], receipt=str(tmp_path))
    with pytest.raises(ConfigError, match="not for --tasks audio"):
        main(str(folder / "m"), tasks=["audio"], kv_cache_dtype="int8")


def test_without_flags_nothing_goes_through_a_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(str(folder / "m"), text=str(folder / "text.txt"), json=True)
    assert set(json.loads(capsys.readouterr().out)) == {"bits_per_byte", "perplexity"}
