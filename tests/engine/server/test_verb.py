"""`sateen serve` as processes see it: the address on stdout, the end by SIGTERM, what is refused before."""

from __future__ import annotations

import inspect
import os
import signal
import socket
import subprocess
import sys

import httpx2 as httpx
import pytest

from sateen.cli import main
from sateen.engine.int8_layers import BUDGET
from sateen.engine.server import faces
from sateen.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, story):
    llm = story()
    path = tmp_path_factory.mktemp("model") / "m"
    llm.model.save(path)
    llm.tokenizer.save(path)
    return str(path)


def _start(*words, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "sateen.cli", "serve", *words, "--port", "0"],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_server_from_start_to_end(folder):
    """An answer in work at SIGTERM is finished; the process prints its address and ends with 0."""
    with _start(
        folder, "--served-model-name", "mine", "--max-model-len", "1024", SATEEN_API_KEY="secret"
    ) as process:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with httpx.Client(base_url=url, headers={"authorization": "Bearer secret"}, timeout=60) as http:
            (card,) = http.get("/v1/models").json()["data"]
            assert (card["id"], card["max_model_len"]) == ("mine", 1024)
            assert httpx.get(f"{url}/v1/models").status_code == 401
            body = {"prompt": "p", "max_tokens": 200, "temperature": 0, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
        talk = process.stderr.read()
        assert "no new requests; waiting up to 30 s for answers in work" in talk
        assert "Traceback" not in talk


def test_flags_of_the_caches_reach_the_engine(monkeypatch):
    class Stop(Exception):
        pass

    made = []

    def spy(model, **settings):
        made.append(settings)
        raise Stop

    monkeypatch.setattr("sateen.engine.engine.LLM", spy)
    words = ["serve", "x", "--port", "0", "--kv-cache-dtype", "int8"]
    for more in ([], ["--attention", "float", "--int8-budget", "0.03"]):
        with pytest.raises(Stop):
            main([*words, *more])
    keys = "attention", "kv_cache_dtype", "int8_budget"
    assert [tuple(one[key] for key in keys) for one in made] == [
        ("auto", "int8", BUDGET),
        ("float", "int8", 0.03),
    ]
    assert inspect.signature(faces.serve).parameters["int8_budget"].default == BUDGET


def test_a_taken_port_is_told_before_the_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["serve", "no-such-model", "--port", str(other.getsockname()[1])]) == 2
    assert "in use; give another --port" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setattr(faces, "PACKAGES", ("fastapi", "no_such_package"))
    assert main(["serve", "m"]) == 1
    assert "serve needs no-such-package; run: pip install 'sateen[serve]'" in capsys.readouterr().err


def test_an_address_that_others_reach_is_warned_about(monkeypatch, caplog):
    with pytest.raises(CheckpointError, match="no-such-model"):
        faces.serve("no-such-model", host="0.0.0.0", port=0)
    assert "0.0.0.0 can be reached from other machines, and there is no --api-key" in caplog.text
    caplog.clear()
    with pytest.raises(CheckpointError, match="no-such-model"):
        faces.serve("no-such-model", host="0.0.0.0", port=0, api_key="k")
    assert not caplog.text


@pytest.mark.parametrize("key", ["", " a", "a\n", "é"])
def test_keys_that_a_header_cannot_carry(key):
    with pytest.raises(ConfigError, match="the API key must be printable ASCII"):
        faces.serve("m", api_key=key)


def test_a_wrong_port(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "m", "--port", "70000"])
    assert "70000 should be from 0 to 65535" in capsys.readouterr().err
