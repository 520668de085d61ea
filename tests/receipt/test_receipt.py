"""Receipts: the fixed keys, what is refused, files, tables and comparison."""

import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from sateen.receipt import Receipt, ReceiptError, hardware, main, versions

FULL: dict[str, Any] = {
    "schema": 1,
    "source": {"kind": "recipe", "path": "recipes/demo.toml", "sha256": "ab"},
    "seeds": {"run": 0},
    "hardware": {"cpu": "a cpu", "cores": 2, "memory_bytes": 3 * 2**30, "gpu": None},
    "versions": {"python": "3.11"},
    "quality": {
        "bits_per_byte": 1.5,
        "perplexity": 12345.6,
        "tasks": {"recall": {"accuracy": 0.25, "n": 200, "chance": 0.1}},
        "baselines": {"gzip": 2.1},
        "twin": {"bits_per_byte": 1.75, "tasks": {"recall": {"accuracy": 0.5, "n": 200, "chance": 0.1}}},
    },
    "bytes": {
        "weights": 1536,
        "kv_bytes_per_token": [
            {"layer_kind": "full_attention", "num_layers": 2, "context": 4096, "bytes": 512}
        ],
        "kv_allocated": [{"context": 4096, "bytes": 2 * 2**20}],
    },
    "speed": [{"what": "decode", "unit": "tokens/s", "median": 80.0, "p25": 79.0, "p75": 81.5, "n": 5}],
    "draft": {"acceptance_length": 1.6, "acceptance_by_position": [0.6]},
    "worse": [{"what": "recall", "before": 0.5, "after": 0.25}],
    "commands": ["sateen eval runs/demo"],
}


def changed(path: str, value: Any) -> str:
    """FULL as JSON with one value replaced or added."""
    table = json.loads(json.dumps(FULL))
    inner: Any = table
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[int(key) if key.isdecimal() else key]
    inner[last] = value
    return json.dumps(table)


def refusal(text: str) -> str:
    with pytest.raises(ReceiptError) as caught:
        Receipt.from_json(text, "a.json")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_json_keeps_every_value_and_the_order_of_keys() -> None:
    receipt = Receipt.from_json(json.dumps(FULL))
    assert json.loads(receipt.to_json()) == FULL
    assert list(json.loads(receipt.to_json())) == list(FULL)
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_a_receipt_of_nothing_measured_has_every_key() -> None:
    table = json.loads(Receipt(source={"kind": "preset"}).to_json())
    assert list(table) == list(FULL)
    assert Receipt.from_json(json.dumps(table)).quality == {}


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("schema", 2, "schema 2 is not known; this version reads 1"),
        ("schema", "1", "schema '1' is not known; this version reads 1"),
        (
            "qualty",
            {},
            "qualty is not a receipt key; did you mean quality? (known: schema, source, seeds, hardware, "
            "versions, quality, bytes, speed, draft, worse, commands)",
        ),
        (
            "quality.twin.perplexty",
            3,
            "quality.twin.perplexty is not a receipt key; did you mean perplexity? "
            "(known: bits_per_byte, perplexity, tasks, baselines)",
        ),
        (
            "quality.tasks.recall.acuracy",
            1,
            "quality.tasks.recall.acuracy is not a receipt key; did you mean accuracy? "
            "(known: accuracy, n, chance)",
        ),
        (
            "speed.0.mean",
            1,
            "speed.0.mean is not a receipt key; did you mean median? "
            "(known: what, unit, median, p25, p75, n)",
        ),
        ("bytes.weights", "1", "bytes.weights should be a number, not str '1'"),
        ("quality.perplexity", True, "quality.perplexity should be a number, not bool True"),
        ("seeds.run", 1.5, "seeds.run should be a whole number, not float 1.5"),
        ("seeds.run", None, "seeds.run should be a whole number, not NoneType None"),
        ("source.kind", 1, "source.kind should be text, not int 1"),
        ("speed", {}, "speed should be a list, not dict {}"),
        ("quality", [], "quality should be an object, not list []"),
        ("commands", [1], "commands.0 should be text, not int 1"),
        (
            "draft.acceptance_by_position",
            ["a"],
            "draft.acceptance_by_position.0 should be a number, not str 'a'",
        ),
    ],
)
def test_each_mistake_has_its_sentence(path: str, value: Any, sentence: str) -> None:
    assert refusal(changed(path, value)) == f"a.json: {sentence}"


def test_missing_keys_and_other_json_are_refused() -> None:
    short = {key: value for key, value in FULL.items() if key not in ("speed", "draft")}
    assert refusal(json.dumps(short)).startswith("a.json: no speed, draft; a receipt has schema, source, ")
    assert refusal("[]") == "a.json: a receipt is a JSON object, not list []"
    assert refusal("{").startswith("a.json: not valid JSON: ")


def test_writing_checks_as_reading_does() -> None:
    with pytest.raises(ReceiptError, match=r"quality\.ppl is not a receipt key"):
        Receipt(source={}, quality={"ppl": 1.0}).to_json()
    with pytest.raises(ReceiptError, match="a value is nan or infinite"):
        Receipt(source={}, quality={"perplexity": math.inf}).to_json()


def test_a_refused_receipt_leaves_the_old_files(tmp_path: Path) -> None:
    Receipt.from_json(json.dumps(FULL)).write(tmp_path)
    with pytest.raises(ReceiptError):
        Receipt(source={}, quality={"perplexity": math.nan}).write(tmp_path)
    assert Receipt.read(tmp_path) == Receipt.read(tmp_path / "receipt.json")
    assert json.loads((tmp_path / "receipt.json").read_text()) == FULL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RECEIPT.md", "receipt.json"]


def test_reading_where_there_is_none_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ReceiptError) as caught:
        Receipt.read(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}: no receipt.json here; give one, or a run or model folder that has it"
    )


def test_markdown_shows_every_number_in_a_table() -> None:
    text = Receipt.from_json(json.dumps(FULL)).to_markdown()
    for row in (
        "| recall | 0.5 | 0.25 |",
        "| bits per byte | 1.5 | - | - | 1.75 |",
        "| perplexity | 12,346 | - | - | - |",
        "| recall: accuracy | 0.25 | 0.1 | 200 | 0.5 |",
        "| baseline gzip: bits per byte | 2.1 | - | - | - |",
        "| weights | 1.50 KiB |",
        "| KV per token, 2 x full_attention, context 4,096 | 512 B |",
        "| KV allocated, context 4,096 | 2.00 MiB |",
        "| decode (tokens/s) | 80 | 79 | 81.5 | 5 |",
        "| tokens per pass of the main model | 1.6 |",
        "| draft token 1 accepted | 0.6 |",
        "| CPU | a cpu, 2 cores |",
        "| memory | 3.00 GiB |",
        "| GPU | none |",
        "| seed of run | 0 |",
    ):
        assert row in text.splitlines()
    assert "```sh\nsateen eval runs/demo\n```" in text


INT8 = {
    "attention": "int8",
    "kv_cache_dtype": "int8",
    "budget": 0.05,
    "probe_tokens": 512,
    "errors": {"model.layers.0.self_attn": 0.0123, "model.layers.1.self_attn": 0.0789},
    "float_layers": ["model.layers.1.self_attn"],
}


def test_layers_that_fall_back_are_named_with_their_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = Receipt.from_json(changed("quality.int8_attention", INT8))
    assert receipt.quality["int8_attention"] == INT8
    assert Receipt.from_json(receipt.to_json()) == receipt
    lines = receipt.to_markdown().splitlines()
    assert "| model.layers.0.self_attn | 0.0123 | integers |" in lines
    assert "| model.layers.1.self_attn | 0.0789 | floating point |" in lines
    assert "| int8 attention: largest error of a layer | 0.0789 | - | - | - |" in lines
    assert any("budget of 0.05" in line and line.endswith(": model.layers.1.self_attn.") for line in lines)
    none = Receipt.from_json(changed("quality.int8_attention", INT8 | {"float_layers": []}))
    assert "floating point: none." in none.to_markdown()
    receipt.write(tmp_path)
    assert main(str(tmp_path), str(tmp_path), json=True) == 0
    rows = {row["what"]: row["first"] for row in json.loads(capsys.readouterr().out)}
    assert rows["int8 attention: layers in floating point"] == 1
    assert "errors.a should be a number" in refusal(changed("quality.int8_attention", {"errors": {"a": "b"}}))
    assert "did you mean budget?" in refusal(changed("quality.int8_attention", {"buget": 1}))


def test_markdown_of_nothing_measured_says_so() -> None:
    text = Receipt(source={"kind": "preset", "path": "tiny"}).to_markdown()
    assert text.startswith("# Receipt\n\nMade from preset `tiny`.\n")
    assert text.count("Not measured.") == 6
    assert "## What got worse\n\nNothing that was measured." in text


def test_a_pipe_in_a_name_does_not_break_the_table() -> None:
    text = Receipt(source={}, quality={"baselines": {"a|b": 1}}).to_markdown()
    assert "| baseline a\\|b: bits per byte | 1 | - | - |" in text.splitlines()


def test_the_verb_shows_one_receipt_or_compares_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder, text in ((a, json.dumps(FULL)), (b, changed("bytes.weights", 768))):
        folder.mkdir()
        Receipt.from_json(text).write(folder)
    assert main(str(a), json=True) == 0
    assert json.loads(capsys.readouterr().out) == FULL
    assert main(str(a)) == 0
    assert capsys.readouterr().out == (a / "RECEIPT.md").read_text()
    assert main(str(a), str(b)) == 0
    assert "| weights (bytes) | 1,536 | 768 | 0.500 |" in capsys.readouterr().out.splitlines()
    assert main(str(a), str(b), json=True) == 0
    rows = {row["what"]: (row["first"], row["second"]) for row in json.loads(capsys.readouterr().out)}
    assert rows["weights (bytes)"] == (1536, 768)
    assert rows["decode (tokens/s)"] == (80.0, 80.0)
    assert rows["acceptance length (tokens)"] == (1.6, 1.6)


def test_the_machine_is_described_by_the_system_itself() -> None:
    found = hardware()
    assert set(found) == {"cpu", "cores", "memory_bytes", "gpu"}
    assert found["cpu"].strip()
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert 2**28 < found["memory_bytes"] <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = versions()
    assert known["python"] == platform.python_version()
    assert known["torch"] == importlib.metadata.version("torch")
    Receipt(source={}, hardware=found, versions=known).to_json()
