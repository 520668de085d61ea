"""`generate` and `chat` as processes see them: what goes to stdout, what to stderr, what ends them."""

from __future__ import annotations

import io
import itertools
import json

import pytest
import torch

from sateen.cli import main
from sateen.data.tokenizer import Tokenizer
from sateen.engine import faces
from sateen.errors import ConfigError, RequestError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, drafting_model):
    """A model that says the alphabet from any letter, and from `a` in a new line; it never ends its turn."""
    tokenizer = Tokenizer.train(["assistant user system "] * 20, 262)
    letters = [tokenizer.token_id(c) for c in "abcdefghijklmnopqrstuvwxyz"]
    successors = dict(itertools.pairwise(letters))
    successors[tokenizer.encode("\n")[0]] = letters[0]
    model = drafting_model("mimo-v2-flash-tiny", strength=0.0, vocab_size=264, successors=successors)
    path = tmp_path_factory.mktemp("model")
    model.save(path / "m")
    tokenizer.save(path / "m")
    return str(path / "m")


def test_generate_prints_the_continuation(folder, capsys):
    faces.generate(folder, "p", max_tokens=6)
    out, err = capsys.readouterr()
    assert out == "qrstuv\n"
    assert "6 tokens" in err
    assert "tokens/s" in err
    assert "tokens per pass (drafts accepted: 100%" in err


def test_generate_json(folder, capsys):
    faces.generate(folder, "p", max_tokens=9, draft="mtp", json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["prompt"], result["text"], result["finish_reason"]) == (
        "p",
        "qrstuvwxy",
        "length",
    )
    assert (result["prompt_tokens"], len(result["token_ids"])) == (1, 9)
    assert result["draft"] == {
        "acceptance_length": 4.0,
        "acceptance_by_position": [1.0, 1.0, 1.0],
    }
    faces.generate(folder, "p", max_tokens=9, draft="none", json=True)
    assert json.loads(capsys.readouterr().out)["draft"]["acceptance_by_position"] == []


def test_int8_flags_reach_the_engine(folder, capsys, monkeypatch):
    made = []
    original = faces.LLM

    def spy(*args, **settings):
        made.append(original(*args, **settings))
        return made[-1]

    monkeypatch.setattr(faces, "LLM", spy)
    words = ["generate", folder, "-p", "p", "--max-tokens", "6", "--attention", "int8"]
    assert main([*words, "--kv-cache-dtype", "int8"]) == 0
    assert capsys.readouterr().out == "qrstuv\n"
    assert (made[0].cache.attention, made[0].cache.dtype) == ("int8", torch.int8)
    assert main([*words, "--kv-cache-dtype", "int8", "--int8-budget", "1e-9", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["int8_attention"]
    assert told["budget"] == 1e-9
    assert told["float_layers"] == list(told["errors"]) != []


def test_chat_over_a_pipe(folder, capsys, monkeypatch):
    asked = []
    original = Tokenizer.apply_chat_template

    def spy(self, messages, *args, **kwargs):
        asked.append([message["content"] for message in messages])
        return original(self, messages, *args, **kwargs)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nagain\n\n/reset\n/what\nnew\n/quit\nunread\n"))
    faces.chat(folder, max_tokens=3, temperature=0.0)
    out, err = capsys.readouterr()
    # The template ends with "assistant\n", after which this model begins the alphabet.
    assert out == "abc\nabc\nabc\n"
    assert asked == [["hello"], ["hello", "abc", "again"], ["new"]]
    assert "new conversation" in err
    assert "unknown command /what; /reset begins a new conversation, /quit ends" in err
    assert "9 tokens" in err


def test_chat_ends_with_its_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    faces.chat(folder, max_tokens=2, temperature=0.0)
    assert capsys.readouterr().out == "ab\n"


def test_a_line_beyond_the_context_is_an_error_in_a_pipe(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ab " * 3000))
    with pytest.raises(RequestError, match="but the context holds 2048"):
        faces.chat(folder)


def test_a_model_without_tokenizer_cannot_talk(tmp_path, flash):
    flash.save(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json to read text with"):
        faces.generate(str(tmp_path / "m"), "x")
