"""Our server and its clients as a side of `engine.py`; JSON lines in and out.

The server is a process of its own; the clients are tasks of this one and share its thread, so that what they
cost can be told apart. They speak plain HTTP with the standard library, a connection per request.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from _worker import serve, version

SERVER: subprocess.Popen[str] | None = None
HOST, PORT = "", 0


def load(model: str, threads: int, **options: Any) -> dict[str, Any]:
    """Starts `sateen serve` and waits until it answers; it computes with OMP_NUM_THREADS threads."""
    global SERVER, HOST, PORT
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "sateen.cli", "serve", model, "--port", "0", *words]
    began = time.perf_counter()
    SERVER = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert SERVER.stdout is not None
    address = SERVER.stdout.readline().strip()
    if not address:
        raise RuntimeError(f"sateen serve ended with {SERVER.wait()} before it answered")
    HOST, port = address.removeprefix("http://").rsplit(":", 1)
    PORT = int(port)
    return {"load_s": time.perf_counter() - began, "version": version("sateen")}


def run(prompts: list[list[int]], num_tokens: int, clients: int, *, streams: bool) -> dict[str, Any]:
    """All prompts through `/v1/completions`, so many at a time; `cpu_s` is what the clients cost."""

    async def everything() -> int:
        waiting = iter(prompts)
        return sum(await asyncio.gather(*(client(waiting, num_tokens, streams) for _ in range(clients))))

    began, cpu = time.perf_counter(), time.process_time()
    tokens = asyncio.run(everything())
    return {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - cpu, "tokens": tokens}


async def client(waiting: Iterator[list[int]], num_tokens: int, streams: bool) -> int:
    """Sends prompts one after another until none is left; returns the tokens that came back."""
    tokens = 0
    for prompt in waiting:
        body: dict[str, Any] = {
            "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True
        }  # fmt: skip
        if streams:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection(HOST, PORT)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        try:
            tokens += await (streamed(reader) if streams else whole(reader))
        finally:
            writer.close()
            await writer.wait_closed()
    return tokens


async def whole(reader: asyncio.StreamReader) -> int:
    """The tokens that a plain answer counts."""
    await headers(reader)
    return int(json.loads(await reader.read())["usage"]["completion_tokens"])


async def streamed(reader: asyncio.StreamReader) -> int:
    """The tokens that the last event of a stream counts; every event is parsed, as a client would."""
    await headers(reader)
    usage: dict[str, int] = {}
    while size := int(await reader.readline(), 16):
        for event in (await reader.readexactly(size + 2)).split(b"\n\n"):
            text = event.strip().removeprefix(b"data: ")
            if text and text != b"[DONE]":
                chunk = json.loads(text)
                if "error" in chunk:
                    raise RuntimeError(f"a stream ended with {chunk['error']}")
                usage = chunk.get("usage") or usage
    return usage["completion_tokens"]


async def headers(reader: asyncio.StreamReader) -> None:
    """Reads up to the body.

    Raises:
        RuntimeError: the status is not 200.
    """
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").splitlines()
    if lines[0].split()[1] != "200":
        raise RuntimeError(f"{lines[0]}: {(await reader.read()).decode(errors='replace')[:500]}")


if __name__ == "__main__":
    try:
        serve({"load": load, "run": run})
    finally:
        if SERVER is not None:
            SERVER.terminate()
            SERVER.wait()
