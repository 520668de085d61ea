"""The four tasks over long contexts against rules written out here: what is told, asked, counted and cut."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from sateen.data.facts import LongTask
from sateen.data.long_context import (
    CommonWords,
    MultiKey,
    Needle,
    VariableTracking,
    long_task,
    single_token_words,
)
from sateen.data.tasks import Example, Task, task_class
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError

WORDS = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
HAYSTACK = ["Then the 3 kittens\nbegan to cry, oh mother dear we sadly fear.", "What! Lost your mittens?"]


def pieces_of(text):
    """A stand-in for a tokenizer: words and line ends are tokens."""
    return len(re.findall(r"\n|\S+", text))


def make(cls, **settings):
    return cls(**({"count_tokens": pieces_of, "words": WORDS, "haystack": HAYSTACK} | settings))


def questions_of(example):
    """Words of every question and its answer."""
    lines = (example.prompt + example.completion).split("\n")
    return [line[2:].split() for line in lines if line.startswith("? ")]


def walk(facts, name):
    """What a name leads to, step by step."""
    walked = []
    while name in facts:
        name = facts[name]
        walked.append(name)
    return walked


def facts_of(prompt):
    """Key -> value of the lines that tell one."""
    pairs = [line.split()[1:] for line in prompt.split("\n") if line.startswith("> ")]
    found = dict(pairs)
    assert len(found) == len(pairs)
    return found


TASKS = [
    (Needle, {}),
    (Needle, {"num_keys": 5, "num_queries": 3}),
    (MultiKey, {"num_keys": 20, "num_queries": 20}),
    (VariableTracking, {"num_queries": 4}),
    (CommonWords, {"repeats": 9, "num_common": 2}),
]


@pytest.mark.parametrize(("cls", "settings"), TASKS)
@pytest.mark.parametrize("unit", ["tokens", "characters"])
def test_examples_fill_their_length_and_repeat_with_their_seed(cls, settings, unit):
    length = 300 if unit == "tokens" else 1200
    task = make(cls, length=length, unit=unit, **settings)
    for seed in range(20):
        example = task.sample(random.Random(seed))
        whole = example.prompt + example.completion
        size = pieces_of(whole) if unit == "tokens" else len(whole)
        assert example.length == size
        assert length - (3 if unit == "tokens" else 16) <= size <= length
        assert "".join(text for text, _ in example.pieces) == whole
        assert example == task.sample(random.Random(seed))
        assert task.check(example.completion, example)
        assert not task.check(" " + " ".join(["wrong"] * 3), example)


@pytest.mark.parametrize(("cls", "settings"), TASKS[:3])
def test_keys_are_answered_with_what_the_text_says_of_them(cls, settings):
    task = make(cls, length=250, **settings)
    for seed in range(20):
        example = task.sample(random.Random(seed))
        facts = facts_of(example.prompt)
        assert len(facts) == task.num_keys
        asked = [line[2:] for line in (example.prompt + example.completion).split("\n") if line[:2] == "? "]
        answers = [text for text, is_answer in example.pieces if is_answer]
        assert answers == [f" {facts[line.split()[0]]}" for line in asked]
        assert asked[0].split()[0] == example.prompt.split()[-1]
        assert len({line.split()[0] for line in asked}) == len(asked) == task.num_queries
        assert example.answer == facts[example.prompt.split()[-1]]


def test_more_questions_than_keys_ask_again_after_all_were_asked():
    task = make(MultiKey, num_keys=4, num_queries=11, length=120, num_words=20)
    example = task.sample(random.Random(3))
    facts = facts_of(example.prompt)
    lines = (example.prompt + example.completion).split("\n")
    asked = [line[2:].split() for line in lines if line.startswith("? ")]
    assert [facts[key] for key, _ in asked] == [value for _, value in asked]
    keys = [key for key, _ in asked]
    assert [Counter(keys[i : i + 4]) for i in (0, 4)] == [Counter(list(facts))] * 2
    assert len(keys) == 11
    assert {*facts, *facts.values()} <= set(WORDS[-20:])


def test_a_needle_by_hand():
    # One word stands between, so that there is one place before it and one behind it.
    task = make(Needle, length=9, depth=1.0, words=WORDS[:8], haystack=["oh"])
    example = task.sample(random.Random(0))
    key, value = next(iter(facts_of(example.prompt).items()))
    assert example.prompt == f"oh\n> {key} {value}\n? {key}"
    assert (example.completion, example.length, example.depth) == (f" {value}", 9, 1.0)
    front = make(Needle, length=9, depth=0.0, words=WORDS[:8], haystack=["oh"]).sample(random.Random(0))
    assert front.prompt == f"> {key} {value}\noh\n? {key}"


@pytest.mark.parametrize("depth", [0.0, 0.5, 0.9])
def test_the_asked_fact_stands_at_its_depth(depth):
    task = make(MultiKey, length=400, num_keys=10, depth=depth)
    for seed in range(10):
        example = task.sample(random.Random(seed))
        before = example.prompt.split(f"> {example.prompt.split()[-1]} ")[0]
        texts = [" ".join(line for line in part.split("\n") if line[:1] not in ("> ", ">", "?"))
                 for part in (before, example.prompt)]  # fmt: skip
        assert len(texts[0].split()) / len(texts[1].split()) == pytest.approx(depth, abs=0.02)


def test_no_key_is_part_of_the_other_text():
    words = ["kit", "mother", "dear", "sad", *WORDS]  # of which the haystack has words, or their beginnings
    task = make(MultiKey, words=words, length=300, num_keys=30)
    keys = {key for seed in range(30) for key in facts_of(task.sample(random.Random(seed)).prompt)}
    assert not keys & {"kit", "mother", "dear", "sad"}
    assert len(keys) > 90


def test_keys_of_two_words_share_each_of_them_with_others():
    task = make(MultiKey, num_keys=8, key_words=2, num_queries=8, length=200)
    for seed in range(20):
        example = task.sample(random.Random(seed))
        told = {}
        for line in example.prompt.split("\n"):
            if line.startswith("> "):
                *key, value = line[2:].split()
                told[tuple(key)] = value
        assert len(told) == 8
        firsts, seconds = ({key[i] for key in told} for i in (0, 1))
        assert len(firsts) == len(seconds) == 3
        assert not firsts & seconds
        questions = questions_of(example)
        assert {(a, b): value for a, b, value in questions} == told


@pytest.mark.parametrize("said", ["chain", "value"])
@pytest.mark.parametrize("num_hops", [1, 2, 4])
def test_chains_lead_to_their_value(num_hops, said):
    task = make(VariableTracking, num_hops=num_hops, num_chains=3, num_queries=3, length=300, answer=said)
    for seed in range(20):
        example = task.sample(random.Random(seed))
        facts = facts_of(example.prompt)
        assert len(facts) == 3 * num_hops
        questions = questions_of(example)
        assert len(questions) == 3
        for name, *answer in questions:
            walked = walk(facts, name)
            assert answer == (walked if said == "chain" else walked[-1:])
            assert len(walked) == num_hops
        order = [line.split()[1] for line in example.prompt.split("\n") if line.startswith("> ")]
        places = {key: place for place, key in enumerate(order)}
        assert all(places[value] < places[key] for key, value in facts.items() if value in places)


@pytest.mark.parametrize("said", ["chain", "value"])
def test_any_name_of_a_chain_may_be_asked_for(said):
    task = make(VariableTracking, num_hops=3, num_chains=2, num_queries=5, length=300, answer=said, ask="any")
    hops = []
    for seed in range(20):
        example = task.sample(random.Random(seed))
        facts = facts_of(example.prompt)
        questions = questions_of(example)
        assert len({name for name, *_ in questions}) == 5
        for name, *answer in questions:
            walked = walk(facts, name)
            assert answer == (walked if said == "chain" else walked[-1:])
            hops.append(len(walked))
    assert set(hops) == {1, 2, 3}


def test_a_chain_is_judged_as_a_whole_and_what_follows_its_line_is_not():
    task = make(VariableTracking)
    example = Example("? b", " a moon", "a moon")
    assert task.check(" a moon\n? c d", example)
    assert not task.check(" a\nmoon", example)
    assert not task.check(" moon a", example)


def test_common_words_are_the_most_frequent_of_the_list():
    task = make(CommonWords, num_common=3, repeats=12, other_repeats=2, length=200)
    for seed in range(10):
        example = task.sample(random.Random(seed))
        counts = Counter(example.prompt.split("\n")[0].split()[1:])
        common = counts.most_common(3)
        assert [count for _, count in common] == [12, 12, 12]
        assert max(count for word, count in counts.items() if word not in dict(common)) <= 2
        assert example.answer.split() == sorted(dict(common))
        assert example.prompt.endswith("\n?")
        a, b, c = example.answer.split()
        assert task.check(f" {c} {a} {b}\nmore", example)
        assert not task.check(f" {a} {a} {b}", example)


@pytest.mark.parametrize("cls", [Needle, MultiKey])
def test_heldout_pairs_are_never_trained_on(cls):
    def pairs(is_heldout):
        task = make(cls, words=WORDS[:12], is_heldout=is_heldout, num_keys=6, length=80)
        return {p for seed in range(200) for p in facts_of(task.sample(random.Random(seed)).prompt).items()}

    train, heldout = pairs(False), pairs(True)
    assert not train & heldout
    assert len(train | heldout) > 0.9 * 12 * 11
    assert 0.1 < len(heldout) / len(train | heldout) < 0.3


def test_words_are_single_tokens_of_the_tokenizer():
    text = "moon river over the hill and by the sea Moon MOON 12 warp weft loom satin " * 20
    tokenizer = Tokenizer.train([text], 302)
    words = single_token_words(tokenizer)
    assert len(words) >= 8
    assert "Moon" not in words
    for word in words:
        assert len(tokenizer.encode(f" {word}")) == 1
    task = long_task(Needle, tokenizer, ["Oh, MY 3 kittens. "], length=60)
    example = task.sample(random.Random(1))
    split = [token for piece, _ in example.pieces for token in tokenizer.encode(piece)]
    assert split == tokenizer.encode(example.prompt + example.completion)
    assert example.length == len(split)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Needle, {"length": 0}, "needle: length 0"),
        (Needle, {"depth": 1.5}, "depth 1.5 must be from 0"),
        (Needle, {"unit": "words"}, "unit 'words' must be 'tokens' or 'characters'"),
        (Needle, {"num_keys": 101}, "num_keys 101 must be from 1 to the 100 words"),
        (Needle, {"key_words": 3}, "key_words 3 must be 1 or 2"),
        (Needle, {"num_words": 4}, "num_words 4 must be at least 8"),
        (Needle, {"num_words": 101}, "100 different words in a list of 100 are too few"),
        (Needle, {"is_heldout": True, "heldout_share": 0}, "above 0 to draw held-out"),
        (Needle, {"words": ["a"]}, "1 different words in a list of 1 are too few"),
        (Needle, {"words": WORDS + WORDS}, "are too few or repeat"),
        (VariableTracking, {"num_hops": 0}, "num_hops 0 must be at least 1"),
        (VariableTracking, {"answer": "name"}, "answer 'name' must be 'chain' or 'value'"),
        (VariableTracking, {"ask": "first"}, "ask 'first' 'last' or 'any'"),
        (
            VariableTracking,
            {"num_chains": 1, "num_queries": 2},
            "the 1 names of 1 chains that may be asked for at least num_queries 2",
        ),
        (CommonWords, {"num_queries": 2}, "one question and no depth"),
        (CommonWords, {"repeats": 3}, "repeats 3 above other_repeats 3"),
    ],
)
def test_settings_out_of_range_are_refused(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(cls, **settings)


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (MultiKey, {"length": 50}, "alone have length .* and 50 is allowed"),
        (CommonWords, {"length": 50}, "3 words 30 times have length .* and 50 is allowed"),
        (MultiKey, {"num_keys": 100, "haystack": [" ".join(WORDS)]}, "100 keys, but only 0 of 100 words"),
    ],
)
def test_what_does_not_fit_is_told(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(cls, **settings).sample(random.Random(0))


def test_the_tasks_have_their_names_and_chances():
    names = {"needle": Needle, "multikey": MultiKey, "vt": VariableTracking, "cwe": CommonWords}
    for name, cls in names.items():
        assert task_class(name) is cls
        assert issubclass(cls, LongTask)
        assert not cls.is_chat
    assert Task.is_chat
    assert make(Needle).chance == 1 / 100
    assert make(VariableTracking, num_hops=3).chance == pytest.approx(1e-6)
    assert make(VariableTracking, num_hops=3, answer="value").chance == 1 / 100


def test_few_words_are_drawn_again_until_every_pair_is_on_its_side():
    task = make(VariableTracking, words=WORDS[:22], num_chains=5, num_queries=5, length=120, is_heldout=True)
    train = make(VariableTracking, words=WORDS[:22], num_chains=5, num_queries=5, length=120)
    for seed in range(100):
        assert len(facts_of(task.sample(random.Random(seed)).prompt)) == 10
        assert len(facts_of(train.sample(random.Random(seed)).prompt)) == 10
