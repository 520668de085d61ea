"""Chats through OpenAI's own client: the template, reasoning and tool calls, whole and as streams.

How texts are taken apart is tested in tests/data/test_dialogue.py; here that nothing is lost on the way.
"""

from __future__ import annotations

import json

import openai
import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": "hello"}]}


GREEDY = {"model": "tiny", "temperature": 0}


@pytest.fixture(scope="module")
def server(running, story):
    with running(story()) as one:
        yield one


@pytest.fixture(scope="module")
def create(server):
    return server.client.chat.completions.create


def _begin(text):
    """Makes the prompt end with this text."""
    return {"extra_body": {"chat_template_kwargs": {"begin": text}}}


def _join(stream):
    """What a stream adds up to: contents, reasonings and calls of choice 0, and its end."""
    content = reasoning = ""
    calls, end, last = [], None, None
    for chunk in stream:
        last = chunk
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or ():
                assert call.index == len(calls)
                calls.append((call.id, call.function.name, call.function.arguments))
            end = choice.finish_reason or end
    return content, reasoning, calls, end, last


def test_a_turn(create, server):
    done = create(**ASKED, max_tokens=5)
    message = done.choices[0].message
    assert (message.role, message.content, message.tool_calls) == ("assistant", "abcde", None)
    assert done.choices[0].finish_reason == "length"
    assert done.usage.prompt_tokens == len(
        server.llm.tokenizer.apply_chat_template(ASKED["messages"], add_generation_prompt=True, begin="\n")
    )
    content, reasoning, calls, end, _ = _join(create(**ASKED, max_tokens=5, stream=True))
    assert (content, reasoning, calls, end) == ("abcde", "", [], "length")


def test_max_completion_tokens_wins_where_it_stands_alone(create):
    assert create(**ASKED, max_completion_tokens=3).choices[0].message.content == "abc"
    with pytest.raises(openai.BadRequestError, match="max_tokens and max_completion_tokens differ"):
        create(**ASKED, max_completion_tokens=3, max_tokens=4)


@pytest.mark.parametrize("begin", ["!", "<think>"], ids=["the model opens it", "the prompt opened it"])
def test_reasoning_stands_apart(create, begin):
    done = create(**ASKED, **_begin(begin))
    message = done.choices[0].message
    assert (message.content, message.reasoning_content) == ("It is four.", "Two and two.")
    assert done.choices[0].finish_reason == "stop"
    assert done.usage.completion_tokens_details.reasoning_tokens == 1
    content, reasoning, calls, end, last = _join(
        create(**ASKED, **_begin(begin), stream=True, stream_options={"include_usage": True})
    )
    assert (content, reasoning, calls, end) == ("It is four.", "Two and two.", [], "stop")
    assert last.usage == done.usage.model_copy(
        update={"prompt_tokens_details": last.usage.prompt_tokens_details}
    )


def test_a_tool_is_called(create):
    done = create(**ASKED, **_begin("?"), tools=[WEATHER])
    (call,) = done.choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Paris"})
    assert done.choices[0].finish_reason == "tool_calls"
    assert done.choices[0].message.content is None
    content, _, ((name, *rest),), end, _ = _join(create(**ASKED, **_begin("?"), tools=[WEATHER], stream=True))
    assert (content, end, rest) == ("", "tool_calls", ["weather", '{"city": "Paris"}'])
    assert name.startswith("call_")
    assert name != call.id


@pytest.mark.parametrize(
    "settings", [{}, {"tools": [WEATHER], "tool_choice": "none"}], ids=["none", "unwanted"]
)
def test_without_tools_a_call_is_text(create, settings):
    text = "<tool_call>\n<function=weather>\n<parameter=city>Paris</parameter>\n</function>\n</tool_call>"
    assert create(**ASKED, **_begin("?"), **settings).choices[0].message.content == text
    assert _join(create(**ASKED, **_begin("?"), **settings, stream=True))[0] == text


def test_a_conversation_with_a_call_goes_back_in(create, server):
    """What the client's own objects send back is accepted, and the template sees it."""
    first = create(**ASKED, **_begin("?"), tools=[WEATHER])
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]},
        first.choices[0].message.model_dump(),
        {"role": "tool", "tool_call_id": first.choices[0].message.tool_calls[0].id, "content": "rain"},
    ]
    done = create(model="tiny", messages=messages, temperature=0, max_tokens=3)
    assert done.choices[0].message.content == "abc"
    seen = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hel\nlo"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}],
        },
        {"role": "tool", "content": "rain"},
    ]
    ids = server.llm.tokenizer.apply_chat_template(seen, add_generation_prompt=True, begin="\n")
    assert done.usage.prompt_tokens == len(ids)


def test_tags_that_are_special_tokens_are_found(running, story):
    """Texts leave special tokens out, unless the answer's format needs them."""
    with running(story(has_special_tags=True)) as server:
        create = server.client.chat.completions.create
        message = create(**ASKED, **_begin("!")).choices[0].message
        assert (message.content, message.reasoning_content) == ("It is four.", "Two and two.")
        assert _join(create(**ASKED, **_begin("?"), tools=[WEATHER], stream=True))[3] == "tool_calls"
        told = create(**ASKED, **_begin("!"), logprobs=True).choices[0].logprobs.content
        assert [entry.token for entry in told][:2] == ["<think>", "Two and two."]
        assert (
            server.client.completions.create(**GREEDY, prompt="!", max_tokens=2).choices[0].text
            == "Two and two."
        )


def test_several_answers_and_logprobs(create):
    done = create(**ASKED, max_tokens=4, n=2, logprobs=True, top_logprobs=2)
    for choice in done.choices:
        told = choice.logprobs.content
        assert [entry.token for entry in told] == list("abcd")
        assert [bytes(entry.bytes) for entry in told] == [b"a", b"b", b"c", b"d"]
        assert all(len(entry.top_logprobs) == 2 for entry in told)
        assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in told)
    told = {0: [], 1: []}
    for chunk in create(**ASKED, max_tokens=4, n=2, logprobs=True, top_logprobs=2, stream=True):
        for choice in chunk.choices:
            told[choice.index] += choice.logprobs.content if choice.logprobs else []
    for choice in done.choices:
        assert [entry.token for entry in told[choice.index]] == list("abcd")
        assert [e.logprob for e in told[choice.index]] == pytest.approx(
            [e.logprob for e in choice.logprobs.content], abs=1e-5
        )


def test_a_schema_shapes_the_answer(create):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    done = create(**ASKED, response_format=shape, max_tokens=60)
    assert json.loads(done.choices[0].message.content)["a"] in (1, 2)
    with pytest.raises(openai.BadRequestError, match="opens the model's reasoning"):
        create(**ASKED, **_begin("<think>"), response_format={"type": "json_object"})


def test_a_repeated_prompt_is_cached(create):
    asked = {**ASKED, "messages": [{"role": "user", "content": "word " * 100}]}
    counts = [create(**asked, max_tokens=2).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    assert counts[0] == 0
    assert counts[1] > 200


def _called(arguments):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function}
    return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}


JSON = {"response_format": {"type": "json_object"}}
PICTURE = [{"type": "image_url", "image_url": {"url": "x"}}]
STRICT = {"type": "function", "function": {"name": "f", "strict": True}}
REFUSED = {
    "an unread variable": ({"chat_template_kwargs": {"enable_x": True}}, "does not read 'enable_x'"),
    "a fixed variable": ({"chat_template_kwargs": {"tools": []}}, "cannot set tools"),
    "reasoning_effort": ({"reasoning_effort": "low"}, "does not read 'reasoning_effort'"),
    "a forced call": ({"tools": [WEATHER], "tool_choice": "required"}, "'none' or 'auto'"),
    "a choice without tools": ({"tool_choice": "auto"}, "tool_choice needs tools"),
    "one call": ({"tools": [WEATHER], "parallel_tool_calls": False}, "parallel_tool_calls is False"),
    "tools and a form": ({"tools": [WEATHER], **JSON}, "exclude each other"),
    "two forms": ({"regex": "a", **JSON}, "give one"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "needs a schema"),
    "top_logprobs alone": ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
    "many logprobs": ({"logprobs": True, "top_logprobs": 21}, "accepted: 0 to 20"),
    "strict tools": ({"tools": [STRICT]}, "tools.0.function.strict"),
    "old functions": ({"functions": [{"name": "f"}]}, "functions is not supported"),
    "stored answers": ({"store": True}, "store is not supported"),
    "sound": ({"modalities": ["text", "audio"]}, "modalities is not supported"),
    "a typo": ({"temprature": 1}, "did you mean temperature"),
    "no messages": ({"messages": []}, "messages: List should have at least 1 item"),
    "a picture": ({"messages": [{"role": "user", "content": PICTURE}]}, "messages"),
    "an unknown role": ({"messages": [{"role": "boss", "content": "x"}]}, "messages.0.role"),
    "no content": ({"messages": [{"role": "user"}]}, "has no content"),
    "no JSON object": (_called("[1"), "accepted: a JSON object as text"),
    "what the template cannot read": (_called("{}"), "cannot render"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_served_is_refused(create, settings, message):
    with pytest.raises(openai.BadRequestError) as refusal:
        create(**{"messages": ASKED["messages"], "model": "tiny"}, extra_body=settings)
    assert message in refusal.value.body["message"]
    assert refusal.value.body["type"] == "invalid_request_error"


def test_fields_that_change_nothing_are_accepted(create):
    same = {
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "modalities": ["text"],
    }
    assert (
        create(**ASKED, max_tokens=3, extra_body=same | {"prediction": None}).choices[0].message.content
        == "abc"
    )
