"""The sections of `benchmarks/engine.py` with toy engines of known speed: pairs, rates and bars."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import _engine_limits
import pytest
from _engine_bench import SCRIPTS, Bench
from _engine_inputs import Files
from _engine_limits import hybrid, memory, quality, start
from _engine_speed import batch, decode, http, prefill

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
# Its speed says what it was loaded with. Tokens cost 1 / rate seconds, those of a prompt a hundredth.
TOY = """
import sys
sys.path.insert(0, {folder!r})
from _worker import serve
RATES = {rates!r}
options, batch = {{}}, 0
def load(model, threads, **more):
    global rate, kind
    assert threads == 3
    kind = "window" if isinstance(model, dict) and "layer_types" in model else str(model)[-4:]
    kind = more.get("weights", "auto") if kind == "bf16" else kind
    kind = "full" if isinstance(model, dict) and kind != "window" else kind
    rate = RATES[kind]
    return {{"version": "1", "weight_bytes": 1000, "cache_bytes": CACHES.get(kind, 2000)}}
CACHES = {caches!r}
def begin(prompts, num_tokens):
    global batch
    batch += len(prompts)
    return {{"seconds": sum(map(len, prompts)) / rate / 100, "tokens": [1] * len(prompts)}}
def decode(num_tokens):
    return {{"seconds": num_tokens / rate, "tokens": num_tokens * batch}}
def end():
    global batch
    batch = 0
def generate(prompts, num_tokens):
    return {{"seconds": num_tokens / rate, "tokens": num_tokens * len(prompts)}}
def run(prompts, num_tokens, clients, streams):
    assert clients == 16
    speed = rate * (0.8 if streams else 0.9)
    return {{"seconds": num_tokens / speed, "tokens": num_tokens * len(prompts), "cpu_s": 0.1}}
def usage():
    return {{"peak_rss_bytes": {peak}, "cpu_s": 0.0}}
def perplexity(texts, context):
    return {{"perplexity": 20 + {{"auto": 0, "int8": 0.09, "int4": 0.5}}[kind], "tokens": 100}}
def step_perplexity(texts, context):
    return perplexity(texts, context) | {{"nats": [1.0, 2.0, 3.0 + (kind != "auto")]}}
known = (load, begin, decode, end, generate, run, usage, perplexity, step_perplexity)
serve({{action.__name__: action for action in known}})
"""
RATES = {"auto": 60, "int8": 110, "int4": 200, "f16g": 50, "q8_0": 100, "q4_1": 100, "window": 30, "full": 10}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Nine pairs; llama.cpp makes 50 and 100 tokens/s, vLLM 30, transformers 20, ours 60, 110 and 200."""
    (tmp_path / "bf16").mkdir()
    shape = {"num_hidden_layers": 12, "num_key_value_heads": 1, "head_dim": 8}
    (tmp_path / "bf16" / "config.json").write_text(json.dumps(shape))
    # A window of 128 in ten of twelve layers, 2,048 tokens, 4 sequences; the twin has 3 % too much.
    caches = {"window": 4 * (10 * 128 + 2 * 2048) * 32, "full": round(4 * 12 * 2048 * 32 * 1.03)}
    pythons = {}
    for kind, rate in {
        "sateen": 60,
        "sateen serve": 60,
        "llama.cpp": 0,
        "vLLM": 30,
        "transformers": 20,
    }.items():
        file = tmp_path / f"{kind}.py"
        rates = RATES | {"auto": rate}
        file.write_text(TOY.format(folder=str(FOLDER), rates=rates, caches=caches, peak=170_000_000))
        monkeypatch.setitem(SCRIPTS, kind, str(file))
        pythons[kind] = sys.executable
    monkeypatch.setattr("_engine_bench.IDLE_S", 0.01)
    monkeypatch.setattr(_engine_limits, "bytes_of_torch", lambda: 70_000_000)
    paths = [tmp_path / name for name in ("bf16", "m-f16g", "m-q8_0", "m-q4_1")]
    prompts = SimpleNamespace(take=lambda length: [1] * length, text=lambda length: "a" * length)
    return Bench(
        files=Files(*paths, sha256=""), prompts=prompts, pythons=pythons, threads=3, pairs=9, is_quick=True,
        logs=tmp_path,
    )  # fmt: skip


def found(bench):
    return [
        (row["ours"]["name"], row["peer"]["name"], row["ratio"]["median"], row["bar"], row["verdict"])
        for row in bench.rows
    ]


def test_decoding_compares_like_forms_of_the_weights(bench):
    decode(bench)
    twice = [
        ("sateen bf16", "llama.cpp F16", 1.2, 0.9, "holds"),
        ("sateen int8", "llama.cpp Q8_0", 1.1, 1.0, "holds"),
        ("sateen int4", "llama.cpp Q4_1", 2.0, 1.2, "holds"),
    ]
    last = ("sateen bf16", "transformers bf16", 3.0, None, "no bar")
    assert found(bench) == [row for row in twice for _ in range(2)] + [last]
    assert [row["ours"]["median"] for row in bench.rows] == [60, 60, 110, 110, 200, 200, 60]
    assert all(row["idle_cpu_share"][row["peer"]["name"]] == 0 for row in bench.rows)
    assert bench.rows[0]["peak_rss_mb"] == {"sateen bf16": 170, "llama.cpp F16": 170}


def test_a_batch_of_sixteen_counts_all_of_its_tokens(bench):
    batch(bench)
    assert found(bench) == [
        ("sateen bf16", "vLLM bf16", 2.0, 1.5, "holds"),
        ("sateen bf16", "transformers bf16", 3.0, None, "no bar"),
    ]
    assert bench.rows[0]["ours"]["median"] == 16 * 60


def test_prefill_counts_the_prompts_tokens(bench):
    prefill(bench)
    assert found(bench) == [("sateen bf16", "transformers bf16", 3.0, 1.1, "holds")]
    assert bench.rows[0]["ours"]["median"] == 6000


def test_the_server_is_held_against_the_engine_alone(bench):
    http(bench)
    names = "sateen serve", "sateen offline"
    assert found(bench) == [(*names, 0.8, 0.75, "holds"), (*names, 0.9, 0.85, "holds")]
    # 8 tokens at 0.8 of 60 per second, 0.1 s of CPU.
    assert bench.rows[0]["client_cpu_share"]["median"] == pytest.approx(0.1 * 48 / 8)


def test_the_hybrid_is_held_against_its_twin_and_both_against_the_formula(bench):
    hybrid(bench)
    exact, apart, one, four = bench.rows
    assert (exact["value"], exact["verdict"]) == (0, "holds")
    assert (apart["value"], apart["verdict"]) == (pytest.approx(3, abs=1e-4), "fails")
    assert found(SimpleNamespace(rows=[one, four])) == [
        ("sateen hybrid", "sateen full", 3.0, 1.5, "holds"),
        ("sateen hybrid", "sateen full", 3.0, 2.0, "holds"),
    ]
    assert (one["ours"]["median"], four["ours"]["median"]) == (30, 120)


@pytest.mark.parametrize(("torch_bytes", "said"), [(70_000_000, "holds"), (69_990_000, "fails")])
def test_memory_may_be_what_the_parts_add_up_to(bench, torch_bytes, said, monkeypatch):
    """170 MB are in use; 1.4 x 1,000 + 2,000 bytes, torch and 100 MB are allowed."""
    monkeypatch.setattr(_engine_limits, "bytes_of_torch", lambda: torch_bytes)
    memory(bench)
    assert [row["verdict"] for row in bench.rows] == 3 * [said]
    assert bench.rows[0]["weight_bytes"] == 1000


def test_packed_weights_are_held_against_bfloat16_in_both_ways(bench):
    quality(bench)
    first, *rest = bench.rows
    assert (first["verdict"], first["why"]) == ("not measured", "use --demo MODEL")
    assert [(row["what"].split(", ")[2:], row["value"], row["verdict"]) for row in rest] == [
        (["int8", "whole texts"], pytest.approx(0.45), "holds"),
        (["int8", "step by step"], pytest.approx(0.45), "holds"),
        (["int4", "whole texts"], pytest.approx(2.5), "fails"),
        (["int4", "step by step"], pytest.approx(2.5), "fails"),
    ]
    # Differences 0, 0 and 1: a standard deviation of 1 / sqrt(3) over three tokens is a third.
    assert rest[1]["standard_error"] == pytest.approx(100 / 3, abs=1e-3)
    assert "standard_error" not in rest[0]


def test_the_start_is_held_against_importing_torch_and_a_second_and_a_half(bench, monkeypatch):
    """By the test's clock ours takes 1.75 s and torch, which is not imported here, 0.25 s."""
    bench.pairs, clock = 1, iter([0.0, 1.75, 2.0, 2.25, 10.0, 10.25, 20.0, 21.75])
    monkeypatch.setattr(_engine_limits, "FIRST_TOKEN", "print('token')")
    monkeypatch.setattr(_engine_limits, "TORCH", "print()")
    monkeypatch.setattr(_engine_limits, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    start(bench)
    (row,) = bench.rows
    assert (row["ours"]["median"], row["peer"]["median"], row["over_s"]["median"]) == (1.75, 0.25, 1.5)
    assert row["ratio"]["median"] == 1.0
    assert 0 < row["cpu_s"]["sateen"]["median"] < 5
