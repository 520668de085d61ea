"""What a server refuses and how: always OpenAI's error object, and it goes on serving."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
ASKED = {"model": "tiny", "prompt": "p", "max_tokens": 1500, "temperature": 0}
LONG = ASKED | {"ignore_eos": True}


@pytest.fixture(scope="module")
def server(running, story):
    with running(story(pause_s=0.002)) as one:
        yield one


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def _post(http, body, path=COMPLETE, **headers):
    """Sends a body as it is."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=data, headers={"content-type": "application/json", **headers})


def _refused(answer, status, message="", param=None):
    """Checks that an answer is an error of this kind; returns it."""
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert message in error["message"]
    if param is not None:
        assert error["param"] == param
    return error


def _idle(server):
    """Waits until nothing is in work; returns the pages that are still taken."""
    for _ in range(600):
        stats = server.llm.stats()
        if not stats["running"] and not stats["waiting"]:
            return stats["cache"]["used_pages"]
        time.sleep(0.05)
    raise AssertionError("requests do not end")


BROKEN = {
    "nothing": (b"", "body"),
    "no JSON": (b"{", "the body is not JSON"),
    "half a text": (b'{"prompt": "p', "the body is not JSON"),
    "no UTF-8": (b'{"prompt": "\xff\xfe"}', ""),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', "half of a surrogate pair"),
    "an array": (b"[1]", "the body"),
    "a number": (b"7", "the body"),
    "deep nesting": (b"[" * 100_000, ""),
    "deep nesting in a field": (b'{"prompt": "p", "x": ' + b"[" * 5000 + b"]" * 5000 + b"}", ""),
    "a huge number": (b'{"prompt": "p", "max_tokens": ' + b"9" * 5000 + b"}", ""),
    "NaN": (b'{"prompt": "p", "temperature": NaN}', "temperature"),
    "infinity": (b'{"prompt": "p", "top_p": Infinity}', "top_p"),
    "overflow": (b'{"prompt": "p", "temperature": 1e999}', "temperature"),
}


@pytest.mark.parametrize(("body", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("path", [COMPLETE, CHAT])
def test_broken_bodies(http, path, body, message):
    _refused(_post(http, body, path), 400, message if path == COMPLETE else "")


WRONG = {
    "no prompt": ({}, "prompt"),
    "an empty text": ({"prompt": ""}, None),
    "an empty list": ({"prompt": []}, "prompt"),
    "an empty prompt in a list": ({"prompt": [[]]}, "prompt"),
    "mixed prompts": ({"prompt": ["a", 5]}, "prompt"),
    "a token that is none": ({"prompt": [5000]}, None),
    "a negative token": ({"prompt": [-1]}, "prompt"),
    "a text for a number": ({"prompt": "p", "max_tokens": "5"}, "max_tokens"),
    "a float for a count": ({"prompt": "p", "max_tokens": 5.5}, "max_tokens"),
    "true for a number": ({"prompt": "p", "temperature": True}, "temperature"),
    "no tokens": ({"prompt": "p", "max_tokens": 0}, "max_tokens"),
    "fewer than none": ({"prompt": "p", "max_tokens": -1}, "max_tokens"),
    "a cold temperature": ({"prompt": "p", "temperature": -0.1}, "temperature"),
    "top_p 0": ({"prompt": "p", "top_p": 0}, "top_p"),
    "top_k -2": ({"prompt": "p", "top_k": -2}, "top_k"),
    "n 0": ({"prompt": "p", "n": 0}, "n"),
    "n 129": ({"prompt": "p", "n": 129}, "n"),
    "an empty stop": ({"prompt": "p", "stop": [""]}, "stop"),
    "a negative seed": ({"prompt": "p", "seed": -1}, "seed"),
    "a penalty": ({"prompt": "p", "presence_penalty": 3}, "presence_penalty"),
    "a bias of nothing": ({"prompt": "p", "logit_bias": {"x": 1}}, "logit_bias"),
    "a bias out of the vocabulary": ({"prompt": "p", "logit_bias": {"99999": 1}}, None),
    "many logprobs": ({"prompt": "p", "logprobs": 21}, "logprobs"),
    "a suffix": ({"prompt": "p", "suffix": "x"}, "suffix"),
    "best_of": ({"prompt": "p", "best_of": 2}, "best_of"),
    "an unknown field": ({"prompt": "p", "max_token": 5}, "max_token"),
    "options of no stream": ({"prompt": "p", "stream_options": {"include_usage": True}}, "stream_options"),
    "an unknown option": ({"prompt": "p", "stream": True, "stream_options": {"x": 1}}, "stream_options"),
    "a schema that is none": (
        {"prompt": "p", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        None,
    ),
    "an endless schema": (
        {
            "prompt": "p",
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/x"}}},
        },
        None,
    ),
    "a broken regex": ({"prompt": "p", "regex": "("}, None),
}


@pytest.mark.parametrize(("body", "param"), WRONG.values(), ids=WRONG)
def test_wrong_fields(http, body, param):
    _refused(_post(http, body), 400, "", param)


def test_prompts_that_do_not_fit(http):
    error = _refused(_post(http, {"prompt": "ab " * 3000}), 400, "but the context holds 2048")
    assert error["code"] == "context_length_exceeded"
    chat = {"messages": [{"role": "user", "content": "ab " * 3000}]}
    _refused(_post(http, chat, CHAT), 400, "but the context holds 2048")
    _refused(_post(http, {"prompt": ["p"] * 1000, "n": 2}), 400, "asks for 2000 completions")


def test_an_unknown_model(http):
    error = _refused(_post(http, {"model": "gpt", "prompt": "p"}), 404, "there is no model 'gpt'", "model")
    assert error["code"] == "model_not_found"


def test_large_bodies(http):
    """Far beyond the limit too the client reads the refusal, and the next request works."""
    for size in (1 << 20, 10 << 20):
        error = _refused(_post(http, {"prompt": "a" * size}), 413, "larger than this server accepts")
        assert error["code"] == "request_too_large"

    def pieces():
        yield b'{"prompt": "'
        for _ in range(40):
            yield b"a" * 50_000

    answer = http.post(COMPLETE, content=pieces(), headers={"content-type": "application/json"})
    _refused(answer, 413)
    assert _post(http, {"prompt": "p", "max_tokens": 1}).status_code == 200


def test_only_json_is_read(http):
    """A page of another origin can send text, and a form, without the browser asking first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        _refused(_post(http, {"prompt": "p"}, **{"content-type": kind}), 415, "must be JSON")
    assert (
        _post(
            http, {"prompt": "p", "max_tokens": 1}, **{"content-type": "application/json; charset=utf-8"}
        ).status_code
        == 200
    )


def test_routes_that_are_none(http):
    _refused(http.get("/v1/nothing"), 404)
    _refused(http.get(COMPLETE), 405)
    _refused(http.post("/health"), 405)
    assert http.get("/docs").status_code == 404  # FastAPI's page loads scripts from elsewhere


def test_health_stats_and_metrics(http, server):
    assert http.get("/health").json() == {"status": "ok"}
    before = _samples(http)
    _post(http, {"prompt": ["p", "d"], "max_tokens": 5, "n": 2, "temperature": 0})
    _post(http, {"prompt": []})
    after = _samples(http)

    def grew(name, **labels):
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grew("sateen_http_requests_total", route=COMPLETE, status="200") == 1
    assert grew("sateen_http_requests_total", route=COMPLETE, status="400") == 1
    assert grew("sateen_prompt_tokens_total") == 2
    assert grew("sateen_generated_tokens_total") == 20
    assert grew("sateen_time_to_first_token_seconds_count") == 4
    assert after["sateen_requests_running", ()] == after["sateen_requests_waiting", ()] == 0
    assert after["sateen_acceptance_length", ()] > 1.5  # the heads of this model draft well
    for layer_kind in ("full_attention", "sliding_attention"):
        layers = [one for one in server.llm.allocated_layers() if one["layer_kind"] == layer_kind]
        told = after["sateen_kv_allocated_bytes", (("layer_kind", layer_kind),)]
        assert told == sum(one["bytes"] for one in layers) > 0
    pages = sum(after["sateen_kv_pages", (("state", state),)] for state in ("used", "cached", "free"))
    assert pages == server.llm.cache.num_pages
    stats = http.get("/stats").json()
    assert stats["model"] == "tiny"
    assert stats["kv_used_bytes"].keys() == stats["kv_allocated_bytes"].keys()


def test_layers_above_the_int8_budget_are_told(story, running):
    llm = story(kv_cache_dtype="int8", int8_budget=1e-9)
    with running(llm) as one, httpx.Client(base_url=one.url, timeout=60) as http:
        found = http.get("/stats").json()["int8_attention"]
        samples = _samples(http)
    assert found == llm.stats()["int8_attention"]
    layers = [f"model.layers.{i}.self_attn" for i in range(llm.model.config.num_hidden_layers)]
    assert found["float_layers"] == list(found["errors"]) == layers
    assert samples["sateen_int8_attention_budget", ()] == 1e-9
    assert samples["sateen_int8_attention_layers", (("form", "floats"),)] == len(layers)
    for layer, error in found["errors"].items():
        assert samples["sateen_int8_attention_error", (("layer", layer),)] == error > 0


def _samples(http):
    text = http.get("/metrics").text
    families = text_string_to_metric_families(text)
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in families
        for one in family.samples
    }


def test_a_client_that_leaves_ends_its_request(http, server):
    tokens = server.llm.stats()["generated_tokens"]
    with http.stream("POST", COMPLETE, json=LONG | {"stream": True, "n": 2}) as answer:
        for _, line in zip(range(3), answer.iter_lines(), strict=False):
            assert line == "" or line.startswith("data: ")
    assert _idle(server) == 0
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:  # not a stream
        body = json.dumps(LONG).encode()
        head = [f"POST {COMPLETE} HTTP/1.1", "Host: x", "Content-Type: application/json"]
        raw.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        while not server.llm.stats()["running"]:
            time.sleep(0.01)
    assert _idle(server) == 0
    assert server.llm.stats()["generated_tokens"] - tokens < 3 * 1500
    assert server.llm.stats()["aborted"] >= 3


def test_a_key_is_asked_for(running, story):
    with (
        running(story(), api_key="sésame".encode().hex()) as server,
        httpx.Client(base_url=server.url) as http,
    ):
        assert (
            server.client.completions.create(model="tiny", prompt="p", max_tokens=1).usage.completion_tokens
            == 1
        )
        for headers in ({}, {"authorization": "Bearer no"}, {"authorization": server.client.api_key}):
            for path in ("/v1/models", "/metrics", "/stats", "/openapi.json"):
                _refused(http.get(path, headers=headers), 401, "API key")
            _refused(_post(http, {"prompt": "p"}, **headers), 401)
        assert http.get("/health").status_code == 200
        assert http.get("/").status_code == 200
        answer = _post(http, {"prompt": "p"}, authorization=b"Bearer \xff")
        _refused(answer, 401)


def test_another_sites_name_is_refused(running, story):
    with running(story(), only_local_names=True) as server, httpx.Client(base_url=server.url) as http:
        port = server.url.rpartition(":")[2]
        for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
            assert http.get("/health", headers={"host": host}).status_code == 200
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "[x]",
        ):
            _refused(http.get("/stats", headers={"host": host}), 403, "neither localhost nor an address")


def test_a_full_queue_and_a_deadline(running, story):
    llm = story(max_num_seqs=1, max_waiting=1, pause_s=0.002)
    with running(llm) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        with ThreadPoolExecutor() as pool, http.stream("POST", COMPLETE, json=LONG | {"stream": True}):
            waiting = pool.submit(_post, http, {"prompt": "p", "max_tokens": 1})
            while not llm.stats()["waiting"]:
                time.sleep(0.01)
            answer = _post(http, {"prompt": "p"})
            error = _refused(answer, 429, "waiting")
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        assert waiting.result().status_code == 200
    with (
        running(story(pause_s=0.01), deadline_s=0.05) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        _refused(_post(http, LONG), 504, "longer than this server allows")
        text = _post(http, LONG | {"stream": True}).text
        last, done = text.strip().split("\n\n")[-2:]
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(server.client.completions.create(**ASKED, extra_body={"ignore_eos": True}, stream=True))


def test_drain_finishes_what_is_in_work(running, story):
    with running(story(pause_s=0.02)) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        with http.stream("POST", COMPLETE, json=LONG | {"stream": True, "max_tokens": 300}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.drain()
            with httpx.Client(base_url=server.url) as other:
                _refused(_post(other, {"prompt": "p"}), 503, "shutting down")
                _refused(other.get("/health"), 503)
            told = [line for line in lines if line]
            assert told[-1] == "data: [DONE]"
            assert json.loads(told[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.thread.join(60)
        with pytest.raises(httpx.ConnectError):
            http.get("/health")


def test_drain_has_an_end(running, story):
    with (
        running(story(pause_s=0.01), drain_s=0.2) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        with http.stream("POST", COMPLETE, json=LONG | {"stream": True, "n": 8}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.drain()
            told = [line for line in lines if line]
        assert json.loads(told[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
        server.thread.join(60)
        assert not server.service.engine.is_alive


def test_a_failing_engine_is_told(running, story, monkeypatch, caplog):
    llm = story()
    with running(llm) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        monkeypatch.setattr(llm, "step", lambda: 1 / 0)
        _refused(_post(http, {"prompt": "p"}), 503, "the engine has failed")
        _refused(_post(http, {"prompt": "p"}), 503, "the engine has failed")
        _refused(http.get("/health"), 503, "the engine has failed")
    assert "ZeroDivisionError" in caplog.text
