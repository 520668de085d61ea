"""Replies taken apart: worked by hand, and the same however they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sateen.data.dialogue import Reply, ReplyParser, ToolCall, parse_reply, parse_value

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "run",
            "parameters": {
                "type": "object",
                "properties": {
                    "command": {"type": "string"},
                    "seconds": {"type": "integer"},
                    "share": {"type": "number"},
                    "is_quiet": {"type": "boolean"},
                    "options": {"type": "object"},
                    "words": {"type": "array"},
                    "limit": {"type": ["integer", "null"]},
                    "either": {"anyOf": [{"type": "number"}, {"type": "string"}]},
                },
            },
        },
    }
]
RUN = (
    "<tool_call>\n<function=run>\n<parameter=command>pwd &amp;&amp; ls</parameter>\n</function>\n</tool_call>"
)
PWD = ToolCall("run", {"command": "pwd && ls"})


def call(**parameters):
    inner = "\n".join(f"<parameter={key}>{value}</parameter>" for key, value in parameters.items())
    return f"<tool_call>\n<function=run>\n{inner}\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ("", "", "", ()),
        ("Paris.", "", "Paris.", ()),
        ("  a < b\n\n", "", "  a < b\n\n", ()),
        ("<think>\nSix by seven.\n</think>\n\n42\n", "Six by seven.", "42\n", ()),
        ("\n <think>x</think>y", "x", "y", ()),
        ("<think>\n\n</think>\n\nyes", "", "yes", ()),
        ("<think>a <b> </thin </think>  c", "a <b> </thin ", "  c", ()),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>", ()),
        ("say <think>x</think>", "", "say <think>x</think>", ()),
        ("a</think>b", "", "a</think>b", ()),
        (RUN, "", "", (PWD,)),
        (f"<think>look</think>\n\nI look.\n\n{RUN}\n", "look", "I look.", (PWD,)),
        (f"{RUN}\n{RUN}", "", "", (PWD, PWD)),
        (f"one\n{RUN}\ntwo\n{RUN}\n\nthree", "", "onetwothree", (PWD, PWD)),
        (f"<think>a {RUN} b</think>c", f"a {RUN} b", "c", ()),
        ("<tool_call><function=now></function></tool_call>", "", "", (ToolCall("now", {}),)),
        ("<tool_call> <function= now > </function> </tool_call>", "", "", (ToolCall("now", {}),)),
        ("<tool_call><function=f><parameter=a>\n x\n</parameter></function></tool_call>", "", "",
         (ToolCall("f", {"a": "\n x\n"}),)),
        ("<tool_call><function=f><parameter=a>1</parameter><parameter=a>2</parameter></function></tool_call>",
         "", "", (ToolCall("f", {"a": "2"}),)),
    ],
)  # fmt: skip
def test_replies_worked_by_hand(text, reasoning, content, calls):
    assert parse_reply(text, TOOLS) == Reply(reasoning, content, calls)


MALFORMED = [
    "<tool_call>", "<tool_call>\n<function=run>", RUN[:-1], RUN.replace("</function>", ""),
    RUN.replace("</parameter>", ""), RUN.replace("<function=run>", "<function=>"),
    RUN.replace("<function=run>", "<function= >"),
    RUN.replace("<function=run>", "run"), RUN.replace("</function>", "</function> and more"),
    RUN.replace("<parameter", "or <parameter"), "<tool_call>{\"name\": \"run\"}</tool_call>", "</tool_call>",
    "<tool_call></tool_call>", "<tool_call <function=run></function></tool_call>", "<TOOL_CALL>" + RUN[11:],
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_what_keeps_no_format_comes_back_as_text(text):
    assert parse_reply(f"so:\n\n{text}\n") == Reply("", f"so:\n\n{text}\n", ())


def test_a_call_behind_a_broken_one_is_found():
    assert parse_reply(f"<tool_call>\nwait: {RUN} done") == Reply("", "<tool_call>\nwait:  done", (PWD,))


def test_unfinished_replies():
    assert parse_reply("<think>six by\n") == Reply("six by\n", "", ())
    assert parse_reply("<think>six by</thi") == Reply("six by</thi", "", ())
    assert parse_reply("<thin") == Reply("", "<thin", ())
    assert parse_reply(f"now\n{RUN[:60]}") == Reply("", f"now\n{RUN[:60]}", ())


def test_a_prompt_that_opened_the_reasoning():
    assert parse_reply("\nsix\n</think>\n\n42", is_thinking=True) == Reply("six", "42", ())
    assert parse_reply("<think>\nsix\n</think>\n\n42", is_thinking=True) == Reply("six", "42", ())
    assert parse_reply("six", is_thinking=True) == Reply("six", "", ())


def test_arguments_have_the_types_of_the_schema():
    got = parse_reply(
        call(command="12", seconds="12", share="2.5", is_quiet="True", words='["a", 1]',
             options='{"a": {"b": null}}', limit="null", either="0.5", other="7"), TOOLS,
    )  # fmt: skip
    assert got.tool_calls[0].arguments == {
        "command": "12", "seconds": 12, "share": 2.5, "is_quiet": True, "words": ["a", 1],
        "options": {"a": {"b": None}}, "limit": None, "either": 0.5, "other": "7",
    }  # fmt: skip
    bare = [TOOLS[0]["function"]]
    assert parse_reply(call(seconds="-3", either="x"), bare).tool_calls[0].arguments == {
        "seconds": -3,
        "either": "x",
    }
    assert parse_reply(call(seconds="3")).tool_calls[0].arguments == {"seconds": "3"}


@pytest.mark.parametrize(
    ("text", "types", "value"),
    [
        ("twelve", ["integer"], "twelve"), ("1.5", ["integer"], "1.5"), ("true", ["integer"], "true"),
        ("1", ["boolean"], "1"), ("maybe", ["boolean"], "maybe"), ("FALSE", ["boolean"], False),
        ("3", ["number"], 3), ("1e2", ["number"], 100.0), ("NaN", ["number"], "NaN"),
        ("-Infinity", ["number"], "-Infinity"), ("1e999", ["number"], "1e999"), ("1_0", ["integer"], "1_0"),
        ("[1e999]", ["array"], "[1e999]"), ("{}", ["array"], "{}"), ("[1,", ["array"], "[1,"),
        ("9" * 5000, ["integer"], "9" * 5000), ("[" * 100_000, ["array"], "[" * 100_000),
        ("null", ["string"], None), ("Null", ["string"], "Null"), (" 4\n", ["integer"], 4),
        ("&lt;b&gt; &#39;", ["string"], "<b> '"), ("[1, &quot;a&quot;]", ["array"], [1, "a"]),
        ("7", ["null", "boolean", "integer"], 7), ("x", ["null", "integer"], "x"), ("7", ["unheard"], "7"),
    ],
)  # fmt: skip
def test_values(text, types, value):
    got = parse_value(text, types)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    "tools",
    [
        [{}], [{"function": None}], [{"function": {"name": "run"}}], [{"name": "run", "parameters": []}],
        [{"name": "run", "parameters": {"properties": {"command": None}}}],
        [{"name": "run", "parameters": {"properties": {"command": {"type": 5, "anyOf": None}}}}],
    ],
)  # fmt: skip
def test_schemas_without_types_leave_texts(tools):
    assert parse_reply(RUN, tools).tool_calls == (PWD,)


def test_text_is_told_as_soon_as_it_is_clear():
    parser = ReplyParser()
    pieces = (
        "<thi", "nk>a", "b\n", "\nc</thi", "nk>\n", "\nd <tool", " <", "b\n",
        RUN[:30], RUN[30:-1], ">", "\n", "e",
    )  # fmt: skip
    told = [[(part.reasoning, part.content, part.call) for part in parser.feed(text)] for text in pieces]
    assert told == [
        [], [("a", "", None)], [("b", "", None)], [("\n\nc", "", None)], [], [("", "d ", None)],
        [("", "<tool ", None)], [("", "<b", None)], [], [], [("", "", PWD)], [], [("", "e", None)],
    ]  # fmt: skip
    assert parser.finish() == []


ATOMS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=run>", "</function>", "</parameter>",
    "<parameter=seconds>", "\n", "\n\n", " ", "<", "</", "12", "null", "a", "é", RUN, RUN + "\n",
    call(seconds="12"),
]  # fmt: skip
REPLIES = st.lists(st.sampled_from(ATOMS) | st.text(max_size=3), max_size=14).map("".join)


def parse_in_pieces(pieces, is_thinking):
    parser = ReplyParser(TOOLS, is_thinking=is_thinking)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    assert all(sum(map(bool, (part.reasoning, part.content, part.call))) == 1 for part in parts)
    return Reply(
        "".join(part.reasoning for part in parts),
        "".join(part.content for part in parts),
        tuple(part.call for part in parts if part.call),
    )


@given(text=REPLIES, cuts=st.lists(st.integers(0, 400), max_size=30), is_thinking=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_cutting_changes_nothing(text, cuts, is_thinking):
    whole = parse_reply(text, TOOLS, is_thinking=is_thinking)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert parse_in_pieces([text[a:b] for a, b in pairwise(edges)], is_thinking) == whole
    assert parse_in_pieces(text, is_thinking) == whole


@given(text=REPLIES)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_without_calls_nothing_is_lost(text):
    whole = parse_reply(text, TOOLS)
    if whole.tool_calls:
        return
    opened = text.lstrip()
    if not opened.startswith("<think>"):
        assert whole == Reply("", text, ())
        return
    said, closed, rest = opened.removeprefix("<think>").partition("</think>")
    assert whole.reasoning == (said.strip("\n") if closed else said.lstrip("\n"))
    assert whole.content == rest.lstrip("\n")


def test_without_reading_calls_they_are_text():
    text = "<tool_call><function=f></function></tool_call>"
    parser = ReplyParser(reads_calls=False)
    parts = [*parser.feed("<think>\nhm\n</think>\n\n" + text[:9]), *parser.feed(text[9:]), *parser.finish()]
    assert "".join(part.reasoning for part in parts) == "hm"
    assert "".join(part.content for part in parts) == text
    assert all(part.call is None for part in parts)
