"""The chat page in a browser: headless Chromium, driven over its debugging pipe.

Needs the program chromium-headless-shell or chromium; skipped without, unless SATEEN_REQUIRE_CHROMIUM is 1.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time

import httpx2 as httpx
import pytest

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Browser:
    """One page of a Chromium that speaks the DevTools protocol over file descriptors 3 and 4."""

    def __init__(self, program, folder):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Descriptors 3 and 4 are taken here; a small process moves the pipes there and becomes Chromium.
        move = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
            "os.execv(sys.argv[3], sys.argv[3:])"
        )
        flags = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe".split()
        )
        words = [str(to_read), str(to_write), program, *flags, f"--user-data-dir={folder}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", move, *words], pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._numbers, self._rest, self.events = itertools.count(1), b"", []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _receive(self):
        while b"\0" not in self._rest:
            data = os.read(self._read, 1 << 16)
            assert data, "the browser ended"
            self._rest += data
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def run(self, script):
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, script):
        """Waits for an expression to be true."""
        for _ in range(400):
            if self.run(f"!!({script})"):
                return
            time.sleep(0.05)
        shown = self.run("document.body.innerText")
        raise AssertionError(f"never true: {script}; the page says {shown[-500:]!r}")

    def keys(self, *names):
        """Presses keys; a text is typed."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9}
        for name in names:
            if name not in codes:
                self.call("Input.insertText", text=name)
                continue
            key = {"key": name, "code": name, "windowsVirtualKeyCode": codes[name]}
            self.call("Input.dispatchKeyEvent", type="keyDown", **key)
            self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def close(self):
        self._session = None
        self.call("Browser.close")
        self._process.wait(20)
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        if os.environ.get("SATEEN_REQUIRE_CHROMIUM") == "1":
            pytest.fail("SATEEN_REQUIRE_CHROMIUM=1, and there is no Chromium in PATH")
        pytest.skip("needs chromium-headless-shell or chromium in PATH")
    one = Browser(found, tmp_path_factory.mktemp("profile"))
    yield one
    one.close()


@pytest.fixture(scope="module")
def server(running, story):
    with running(story(pause_s=0.01)) as one:
        yield one


@pytest.fixture
def page(browser, server):
    browser.events.clear()
    browser.call("Page.navigate", url=server.url)
    browser.until(
        "document.readyState == 'complete' && document.getElementById('model').textContent == 'tiny'"
    )
    return browser


LAST = "document.querySelector('article:last-of-type')"
DONE = f"{LAST} && !document.querySelector('.busy') && {LAST}.classList.contains('assistant')"


def _set(page, **values):
    for name, value in values.items():
        page.run(f"document.getElementById('{name}').value = {json.dumps(value)}")


def test_a_conversation_by_keyboard(page, server):
    _set(page, temperature="0", limit="6", system="be brief")
    page.keys("hello", "Enter")
    page.until(DONE)
    assert page.run("[...document.querySelectorAll('article .text')].map((e) => e.textContent)") == [
        "hello",
        "abcdef",
    ]
    page.keys("more", "Enter")  # the focus is back in the field
    page.until(f"document.querySelectorAll('article').length == 4 && {DONE}")
    note = page.run(f"{LAST}.querySelector('.note').textContent")
    assert re.fullmatch(r"6 tokens · [\d.]+ tokens/s · \d+ read.* · cut at the limit", note)
    said = [("system", "be brief"), ("user", "hello"), ("assistant", "abcdef"), ("user", "more")]
    seen = [{"role": role, "content": content} for role, content in said]
    count = len(server.llm.tokenizer.apply_chat_template(seen, add_generation_prompt=True, begin="\n"))
    assert f" {count} read" in note
    page.run("document.getElementById('reset').click()")
    assert page.run("document.querySelectorAll('article').length") == 0


def test_stop_ends_the_answer(page, server):
    _set(page, temperature="0", limit="1900")
    page.keys("hello", "Enter")
    page.until(f"{LAST} && {LAST}.querySelector('.text').textContent.length > 30")
    page.keys("Escape")
    page.until(DONE)
    assert page.run(f"{LAST}.querySelector('.note').textContent") == "stopped"
    while server.llm.stats()["running"]:
        time.sleep(0.01)
    page.keys("again", "Enter")
    page.until("!document.getElementById('stop').disabled")
    page.run("document.getElementById('stop').click()")
    page.until(DONE)


def test_the_engine_is_watched(page):
    _set(page, temperature="0", limit="1500")
    page.keys("hello", "Enter")
    page.until("document.getElementById('load').textContent.startsWith('1 running')")
    page.until("parseFloat(document.getElementById('speed').textContent) > 0")
    assert re.fullmatch(
        r"[\d.]+ [KM]iB of [\d.]+ [KMG]iB", page.run("document.getElementById('kv').textContent")
    )
    page.keys("Escape")
    page.until(DONE)
    page.until("parseFloat(document.getElementById('acceptance').textContent) > 1")


def test_reasoning_and_calls_are_folded_and_markup_is_text(page, server):
    """What a model says is put in as text: the answer here comes from a page that replaces `fetch`."""
    chunks = [
        {"reasoning_content": "<b>hm</b>"},
        {"content": "<img src=x onerror=alert(1)><script>alert(2)</script>"},
        {
            "tool_calls": [
                {"index": 0, "id": "1", "function": {"name": "<i>f</i>", "arguments": '{"a": "<u>"}'}}
            ]
        },
    ]
    choices = [{"choices": [{"index": 0, "delta": one}]} for one in chunks]
    events = "".join(f"data: {json.dumps(one)}\n\n" for one in choices)
    answers = (
        f"path.startsWith('v1') ? Promise.resolve(new Response({json.dumps(events)})) : real(path, ...rest)"
    )
    page.run(f"{{ const real = window.fetch; window.fetch = (path, ...rest) => {answers}; 0 }}")
    page.keys("x", "Enter")
    page.until(DONE)
    assert page.run(f"{LAST}.querySelector('.text').textContent") == chunks[1]["content"]
    assert page.run(f"{LAST}.querySelector('details.thought').open") is False
    assert page.run(f"{LAST}.querySelector('details.thought pre').textContent") == "<b>hm</b>"
    assert page.run(f"{LAST}.querySelector('details.call').textContent") == 'Calls <i>f</i>{"a": "<u>"}'
    assert page.run("document.querySelectorAll('article :is(b, i, u, img, script)').length") == 0


def test_an_error_is_shown_and_forgotten(page):
    _set(page, limit="5")
    page.keys("x" * 9000, "Enter")
    page.until("document.querySelector('article.error')")
    assert "but the context holds 2048" in page.run("document.querySelector('article.error').textContent")
    _set(page, temperature="0")
    page.keys("hello", "Enter")
    page.until(f"document.querySelectorAll('article').length == 4 && {DONE} && !{LAST}.matches('.error')")


def test_nothing_comes_from_elsewhere_and_nothing_is_complained_about(page, server):
    page.keys("hello", "Enter")
    page.until(DONE)
    page.run("0")
    urls = [
        event["params"]["request"]["url"]
        for event in page.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert urls
    assert all(url.startswith(server.url) for url in urls)
    wrong = [
        event for event in page.events if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert not [event for event in wrong if "favicon" not in json.dumps(event)]
    # The policy holds: a script that somebody smuggles in does not run.
    page.run("window.made = document.createElement('script'); made.textContent = 'window.ran = 1'; 0")
    page.run("document.head.append(made)")
    assert page.run("typeof window.ran") == "undefined"
    needed, given = page.run("[document.documentElement.scrollWidth, innerWidth]")
    assert needed <= given


def test_the_policy_of_the_page(server):
    with httpx.Client(base_url=server.url) as http:
        answer = http.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "http" not in policy
    text = answer.text
    assert not re.findall(
        r"(?:src|href|action)\s*=|https?:|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text
    )
