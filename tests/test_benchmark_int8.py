"""`benchmarks/_int8_prefill.py`: rounds that are kept, rows that go on, rows that stay."""

from __future__ import annotations

import json

import _int8_prefill
import int8_attention
import pytest
import torch
from _int8_prefill import COMPARED, LONG, Rounds, prefill


@pytest.fixture
def calls(monkeypatch):
    """Sides that take as many milliseconds as they ran times, those of torch twice as long."""
    made = []

    def attentions(N, H, causal):
        return {name: (N, H, causal, name) for pair in COMPARED for name in pair}

    def seconds(side):
        def once(_):
            made.append(side)
            return float(made.count(side) * (2 if "sdpa" in side[3] else 1))

        return once

    monkeypatch.setattr(_int8_prefill, "attentions", attentions)
    monkeypatch.setattr(_int8_prefill, "seconds", seconds)
    return made


def rounds_in(folder, revision="a", is_dirty=False):
    return Rounds(folder / "build" / "rounds.json", revision, is_dirty=is_dirty)


def test_a_run_goes_on_where_an_earlier_one_ended(calls, tmp_path):
    first = prefill([2048], [64], 3, rounds_in(tmp_path))
    assert len(first) == 2 * len(COMPARED)
    assert len(calls) == 2 * 5 * (1 + 3)  # with and without a mask, five sides, one warm-up
    assert [one["verdict"] for one in first[:3]] == ["too few pairs (3 of 9)"] * 2 + ["no bar"]
    assert first[0]["ratio"]["median"] == 2.0
    assert (first[0]["bar"], first[0]["target"], first[0]["revision"]) == (1.5, 2.5, "a")
    calls.clear()
    again = prefill([2048], [64], 9, rounds_in(tmp_path))
    assert len(calls) == 2 * 5 * (1 + 6)
    assert again[0]["pairs"] == 9
    assert again[0]["verdict"] == "holds"
    calls.clear()
    assert prefill([2048], [64], 9, rounds_in(tmp_path)) == again
    assert calls == []


@pytest.mark.parametrize("changed", [{"revision": "b"}, {"is_dirty": True}])
def test_rounds_of_another_revision_do_not_count(changed, calls, tmp_path):
    rounds = rounds_in(tmp_path)
    rounds.tested = True
    prefill([LONG], [64], 2, rounds)
    assert len(calls) == 2 * 5 * 2  # long prompts are not warmed up
    assert rounds_in(tmp_path).tested
    other = rounds_in(tmp_path, **changed)
    assert not other.tested
    assert other.of("8192 tokens, 8 heads of 64, no mask") == {}
    prefill([LONG], [64], 2, other)
    assert len(calls) == 2 * 2 * 5 * 2


def test_rounds_on_more_threads_do_not_count(calls, tmp_path, monkeypatch):
    rounds = rounds_in(tmp_path)
    rounds.tested = True
    assert prefill([LONG], [64], 2, rounds)[0]["threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    other = rounds_in(tmp_path)
    assert other.tested
    assert other.of("8192 tokens, 8 heads of 64, no mask") == {}


def test_without_time_no_round_begins_and_short_rows_are_left_out(calls, tmp_path, capsys):
    assert prefill([LONG], [64], 9, rounds_in(tmp_path), stop_s=-1.0) == []
    assert calls == []
    assert "the same command goes on" in capsys.readouterr().err


def test_sides_take_turns_in_who_begins(calls, tmp_path):
    prefill([LONG], [64], 2, rounds_in(tmp_path))
    names = [side[3] for side in calls[:10]]
    assert names[:5] == names[:4:-1]


def test_only_the_measured_rows_are_replaced():
    def one(what, value, peer="sdpa"):
        return {"what": what, "ours": {"name": "int8"}, "peer": {"name": peer}, "value": value}

    old = [one("16384 tokens, 8 heads of 64, causal", 1), one("1024 tokens, 8 heads of 64", 2)]
    new = [one("1024 tokens, 8 heads of 64", 3), one("2048 tokens, 8 heads of 64", 4)]
    assert [row["value"] for row in int8_attention.merged(old, new)] == [3, 4, 1]
    step = "one token after {}, 9 query and 3 key/value heads of 64"
    old = [one(step.format(8192), 1), one(step.format(8192), 2, "bfloat16 rows")]
    new = [one(step.format(16384), 3), one(step.format(8192), 4)]
    assert [row["value"] for row in int8_attention.merged(old, new)] == [4, 2, 3]


def test_other_parts_stay_in_the_file(calls, tmp_path, monkeypatch):
    out = tmp_path / "out.json"
    monkeypatch.setattr(int8_attention, "ROUNDS", tmp_path / "rounds.json")
    monkeypatch.setattr(int8_attention, "revision", lambda: "a")
    rounds = Rounds(tmp_path / "rounds.json", "a", is_dirty=False)
    rounds.tested = True
    rounds.save()
    monkeypatch.setattr(int8_attention, "is_dirty", lambda *_: False)
    words = ["x", "--only", "prefill", "--tokens", "2048", "--channels", "64", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    assert int8_attention.main() == 0
    document = json.loads(out.read_text())
    assert [one["verdict"] for one in document["prefill"][:2]] == ["holds"] * 2
    document["decode"] = ["kept"]
    out.write_text(json.dumps(document))
    monkeypatch.setattr("sys.argv", [*words[:4], "1024", *words[5:]])
    assert int8_attention.main() == 0
    later = json.loads(out.read_text())
    assert later["decode"] == ["kept"]
    assert [one["what"].split()[0] for one in later["prefill"]] == ["1024"] * 6 + ["2048"] * 6
    assert later["parts"]["prefill"]["command"].endswith(f"1024 --channels 64 --out {out}")
