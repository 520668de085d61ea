"""Many clients at once, some of which leave: every answer is right and nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import random
import time

import httpx2 as httpx

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_REQUESTS, NUM_CLIENTS = 150, 24


async def _ask(client, dice):
    """One request of a random kind; its text and what it should be, or None where the client left."""
    start, count = dice.randrange(20), dice.randrange(1, 6)
    filler = "-" * dice.choice([0, 3, 70, 300])
    body = {"prompt": filler + LETTERS[start], "max_tokens": count, "temperature": 0}
    expected = LETTERS[start + 1 : start + 1 + count]
    kind = dice.choice(["whole", "stream", "leave", "leave at once"])
    if kind == "whole":
        answer = await client.post("/v1/completions", json=body)
        return answer.json()["choices"][0]["text"], expected
    if kind == "leave at once":
        task = asyncio.create_task(client.post("/v1/completions", json=body | {"max_tokens": 500, "n": 2}))
        await asyncio.sleep(dice.random() / 20)
        task.cancel()
        return None
    if kind == "leave":
        body |= {"max_tokens": 500, "ignore_eos": True}
    pieces = 0
    text = ""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                pieces += 1
                if kind == "leave" and pieces == 2:
                    return None
    return text, expected


async def _all(url):
    dice = random.Random(7)
    places = asyncio.Semaphore(NUM_CLIENTS)
    limits = httpx.Limits(max_connections=NUM_CLIENTS + 8)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:

        async def one():
            async with places:
                return await _ask(client, dice)

        return await asyncio.gather(*(one() for _ in range(NUM_REQUESTS)))


def test_answers_are_right_and_nothing_leaks(running, story):
    llm = story(max_num_seqs=6, num_pages=40, max_model_len=1024)
    with running(llm) as server:
        found = asyncio.run(_all(server.url))
        told = [one for one in found if one is not None]
        assert len(told) > NUM_REQUESTS // 4
        assert [text for text, _ in told] == [expected for _, expected in told]
        stats = llm.stats()
        while stats["running"] or stats["waiting"]:
            time.sleep(0.02)
            stats = llm.stats()
        assert stats["aborted"] > 20
        assert stats["cache"]["used_pages"] == stats["cache"]["used_slots"] == 0
        assert server.service.engine.is_alive
        assert not server.service.engine._work
        assert not server.service.engine._places
