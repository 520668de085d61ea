"""Text that grows by whole characters, and stop strings that begin in one token and end in another."""

from __future__ import annotations

import itertools

import pytest

from sateen.data.tokenizer import Tokenizer
from sateen.engine.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, the end"] * 50, 270)


def feed(tokenizer, ids, stop=(), **settings):
    """(text after each token, what `push` returned for each, the detokenizer)."""
    stream = Detokenizer(tokenizer, [], stop, **settings)
    texts, found = [], []
    for token in ids:
        found.append(stream.push(token))
        texts.append(stream.text)
        if found[-1]:
            break
    stream.finish()
    return texts, found, stream


def test_the_text_is_the_decoding_of_all_tokens(tokenizer):
    text = "the mat, naïve 猫 🐈 the end"
    ids = tokenizer.encode(text)
    texts, found, stream = feed(tokenizer, ids)
    assert stream.text == text == tokenizer.decode(ids)
    assert not any(found)
    assert all("\ufffd" not in part for part in texts)
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))


def test_an_unfinished_character_shows_only_at_the_end(tokenizer):
    ids = tokenizer.encode("the 🐈")[:-1]
    texts, _, stream = feed(tokenizer, ids)
    assert texts[-1] == "the "
    assert stream.text == tokenizer.decode(ids)
    assert stream.text.endswith("\ufffd")


def test_context_of_the_prompt_is_not_part_of_the_text(tokenizer):
    stream = Detokenizer(tokenizer, tokenizer.encode("the cat sat on"), ())
    for token in tokenizer.encode(" the mat"):
        stream.push(token)
    stream.finish()
    assert stream.text == " the mat"


@pytest.mark.parametrize("stop", [["mat,"], ["t, the e"], ["zzz", "at,"], ["t,", "mat, the"]])
def test_stop_strings_cross_token_borders(tokenizer, stop):
    text = "the cat sat on the mat, the end"
    ids = tokenizer.encode(text)
    # The first to be complete ends the text, not the first to begin.
    _, earliest = min((text.find(s) + len(s), text.find(s)) for s in stop if s in text)
    _, found, stream = feed(tokenizer, ids, stop)
    assert stream.text == text[:earliest]
    assert found[-1] in stop
    assert not any(found[:-1])


def test_single_bytes_stop_too(tokenizer):
    """Each token is one byte: every stop string crosses a border."""
    ids = [tokenizer.token_id(c) for c in "xyzzyx"]
    _, found, stream = feed(tokenizer, ids, ["zzy"])
    assert (stream.text, found) == ("xy", [None, None, None, None, "zzy"])


def test_what_a_stop_string_may_take_back_is_not_sendable(tokenizer):
    stream = Detokenizer(tokenizer, [], ["abcd"])
    sendable = []
    for c in "xxabx":
        stream.push(tokenizer.token_id(c))
        sendable.append(stream.sendable())
    assert sendable == [0, 0, 0, 1, 2]
    stream.finish()
    assert stream.sendable() == 5


def test_special_tokens_leave_no_text(tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    ids = [*tokenizer.encode("the"), end, *tokenizer.encode(" mat")]
    assert feed(tokenizer, ids)[2].text == "the mat"
    assert feed(tokenizer, ids, skips_special=False)[2].text == "the<|im_end|> mat"


@pytest.mark.parametrize("text", ["the 🐈 sat", "猫猫 mat", "naïve"])
def test_a_stop_string_of_characters_that_tokens_split(tokenizer, text):
    """Every character beyond ASCII is several tokens; the stop string ends inside the text's own."""
    ids = tokenizer.encode(text)
    for start, end in itertools.combinations(range(len(text) + 1), 2):
        stop = text[start:end]
        _, found, stream = feed(tokenizer, ids, [stop, "never"])
        at = text.find(stop)
        assert (stream.text, found[-1]) == (text[:at], stop)
        # The token that completes the stop string is the last one taken.
        assert tokenizer.decode(ids[: len(found)]).startswith(text[: at + len(stop)])
        assert not tokenizer.decode(ids[: len(found) - 1]).startswith(text[: at + len(stop)])
        _, _, kept = feed(tokenizer, ids, [stop], keeps_stop=True)
        assert kept.text == text[: at + len(stop)]


def test_of_two_stop_strings_in_one_token_the_first_complete_one_counts(tokenizer):
    (token,) = tokenizer.encode(" the")
    assert feed(tokenizer, [token], ["the", " th", "h"])[1] == [" th"]
    assert feed(tokenizer, [token], ["he", "h"])[2].text == " t"


def test_a_least_length_holds_stop_strings_back(tokenizer):
    """Each token is one byte. What was complete before the least length ends nothing later either."""
    ids = [tokenizer.token_id(c) for c in "xyxyzxy"]
    assert feed(tokenizer, ids, ["xy"], min_tokens=1)[1] == [None, "xy"]
    _, found, stream = feed(tokenizer, ids, ["xy"], min_tokens=2)
    assert (stream.text, found) == ("xy", [None, None, None, "xy"])
    _, found, stream = feed(tokenizer, ids, ["xy", "never so long"], min_tokens=4)
    assert (stream.text, len(found)) == ("xyxyz", 7)
    _, found, _ = feed(tokenizer, ids, ["yx"], min_tokens=2)  # it began before and ends after
    assert found == [None, None, "yx"]
