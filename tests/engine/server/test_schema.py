"""Requests made up from our OpenAPI file: whatever is sent, no answer is a 5xx and errors have one form."""

from __future__ import annotations

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings

OPERATIONS = [
    ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"), ("/v1/models", "GET"),
    ("/v1/models/{model}", "GET"), ("/health", "GET"), ("/metrics", "GET"), ("/stats", "GET"), ("/", "GET"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(running, story):
    with running(story(max_model_len=64, max_num_seqs=2), max_choices=8) as one:
        yield one


@pytest.fixture(scope="module")
def schema(server):
    import schemathesis

    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_operations(schema):
    found = {
        (operation.ok().path, operation.ok().method.upper()) for operation in schema.get_all_operations()
    }
    assert found == set(OPERATIONS)


# A request without a body cannot be wrong.
CASES = [(*one, mode) for mode in ("POSITIVE", "NEGATIVE") for one in OPERATIONS if "POST" in (mode, *one)]
CASES += [(*one, "POSITIVE") for one in OPERATIONS if one[1] == "GET"]


@pytest.mark.parametrize(("path", "method", "mode"), CASES, ids=map(" ".join, CASES))
def test_no_server_error(server, schema, path, method, mode):
    from schemathesis import GenerationMode

    seen = set()

    @given(case=schema[path][method].as_strategy(generation_mode=GenerationMode[mode]))
    @settings(
        max_examples=50 if method == "POST" else 10, deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(case):
        answer = case.call(timeout=60)
        seen.add(answer.status_code)
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    check()
    if method == "POST":
        assert 400 in seen
    assert httpx.get(f"{server.url}/health").status_code == 200
