"""`benchmarks/_worker.py` and `_peer_http.py`: engines in processes of their own, and clients of a server."""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import _peer_http
import pytest
from _engine_bench import state
from _worker import Worker, WorkerError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PEER = """
import os, sys, time
sys.path.insert(0, {folder!r})
from _worker import serve
def double(x):
    print("from python")
    os.system("echo from a child")
    return {{"x": 2 * x}}
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
def fail(): raise KeyError("nothing")
def die():
    print("last words", file=sys.stderr)
    os._exit(3)
serve({{"double": double, "work": work, "fail": fail, "die": die}})
"""


@pytest.fixture
def peer(tmp_path):
    (tmp_path / "peer.py").write_text(PEER.format(folder=str(FOLDER)))
    worker = Worker("peer", [sys.executable, tmp_path / "peer.py"], log=tmp_path / "log")
    yield worker
    worker.close()


def test_a_worker_answers_and_what_libraries_print_does_not_disturb_it(peer):
    assert peer.ask("double", x=21) == {"x": 42}
    assert peer.ask("double", x=1) == {"x": 2}
    peer.close()
    assert peer.log.read_text().splitlines().count("from a child") == 2


def test_a_workers_exception_is_ours_and_it_goes_on(peer):
    with pytest.raises(WorkerError, match="peer: 'nothing'") as caught:
        peer.ask("fail")
    assert (caught.value.kind, caught.value.worker, state(caught.value)) == ("KeyError", "peer", "failed")
    assert peer.ask("double", x=2) == {"x": 4}


def test_a_worker_that_dies_is_told_with_its_last_words(peer):
    with pytest.raises(WorkerError, match="ended with 3 at `die`: last words"):
        peer.ask("die")


def test_a_workers_usage_is_that_of_its_process(peer):
    before = peer.ask("usage")
    peer.ask("work", seconds=0.3)
    found = peer.ask("usage")
    status = Path(f"/proc/{peer._process.pid}/status").read_text()
    (peak,) = (int(text.split()[1]) * 1024 for text in status.splitlines() if text.startswith("VmHWM"))
    assert 1e6 < found["rss_bytes"] <= found["peak_rss_bytes"] <= peak
    # Linux counts in hundredths of a second, and the question itself costs some.
    assert 0.25 <= found["cpu_s"] - before["cpu_s"] <= 1.0


def test_there_is_no_worker_without_its_program(tmp_path):
    with pytest.raises(WorkerError, match="no-such-python: No such file") as caught:
        Worker("peer", [tmp_path / "no-such-python"], log=tmp_path / "log")
    assert state(caught.value) == "failed"


class Completions(BaseHTTPRequestHandler):
    """`max_tokens` tokens for every prompt, plain or as chunked events; counts who is in at once."""

    protocol_version = "HTTP/1.1"
    lock, inside, most, bodies = threading.Lock(), 0, 0, []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock:
            type(self).inside += 1
            type(self).most = max(self.most, self.inside)
            self.bodies.append(body)
        time.sleep(0.05)
        with self.lock:
            type(self).inside -= 1
        if body["prompt"] == [0]:
            self.answer(400, b'{"error": "no"}')
        elif body.get("stream"):
            usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
            events = [{"choices": [{"text": "a\n\nb"}]}, usage, "[DONE]"]
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in events:
                text = event if isinstance(event, str) else json.dumps(event)
                data = f"data: {text}\n\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.write(b"0\r\n\r\n")
        else:
            usage = {"completion_tokens": body["max_tokens"]}
            self.answer(200, json.dumps({"choices": [], "usage": usage}).encode())

    def answer(self, code, data):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def completions(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(_peer_http, "HOST", "127.0.0.1")
    monkeypatch.setattr(_peer_http, "PORT", server.server_port)
    monkeypatch.setattr(Completions, "bodies", [])
    monkeypatch.setattr(Completions, "most", 0)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("streams", [False, True])
def test_the_clients_send_every_prompt_once_and_count_what_comes_back(completions, streams):
    prompts = [[number, 7] for number in range(1, 8)]
    said = _peer_http.run(prompts, num_tokens=5, clients=3, streams=streams)
    assert said["tokens"] == 35
    assert Completions.most == 3
    assert sorted(body["prompt"] for body in Completions.bodies) == prompts
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in Completions.bodies)
    assert said["cpu_s"] < said["seconds"]


def test_a_refused_request_ends_the_measurement(completions):
    with pytest.raises(RuntimeError, match=r"400 Bad Request: \{\"error\": \"no\"\}"):
        _peer_http.run([[0]], num_tokens=5, clients=1, streams=False)
