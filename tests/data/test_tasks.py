import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sateen.data.long_context  # noqa: F401  registers its tasks
from sateen.data.tasks import Recall, Reverse, Sort, Sums, Task, task_class
from sateen.data.tokenizer import Tokenizer
from sateen.errors import ConfigError


def bytes_of(text):
    return len(text.encode())


@pytest.mark.parametrize(
    ("a", "b", "completion"),
    [
        (47, 85, "7+5=12,4+8+1=13,132"),
        (10, 10, "0+0=00,1+1+0=2,20"),
        (23, 14, "3+4=07,2+1+0=3,37"),
        (99, 99, "9+9=18,9+9+1=19,198"),
    ],
)
def test_sums_are_worked_as_by_hand(a, b, completion):
    example = Sums().example(a, b)
    assert example.prompt == f"{a}+{b}="
    assert example.completion == completion


def test_three_digits_carry_twice():
    assert Sums(num_digits=3).example(567, 458).completion == "7+8=15,6+5+1=12,5+4+1=10,1025"


def test_heldout_pairs_never_reach_the_training_stream():
    rng = random.Random(0)
    train, heldout = Sums(), Sums(is_heldout=True)
    pairs = {tuple(sorted(map(int, train.sample(rng).prompt[:-1].split("+")))) for _ in range(40_000)}
    unseen = {tuple(sorted(map(int, heldout.sample(rng).prompt[:-1].split("+")))) for _ in range(10_000)}
    assert not pairs & unseen
    every = {(a, b) for a in range(10, 100) for b in range(a, 100)}
    assert 0.17 < sum(train.holds_out(*pair) for pair in every) / len(every) < 0.23
    assert len(pairs | unseen) > 0.98 * len(every)


@given(st.integers(10, 99), st.integers(10, 99))
def test_a_pairs_order_does_not_matter(a, b):
    assert Sums().holds_out(a, b) == Sums().holds_out(b, a)


@given(st.integers(0, 2**32))
def test_every_task_accepts_its_own_completion(seed):
    digits = [cls(is_heldout=held) for cls in (Sort, Reverse) for held in (False, True)]
    for task in (Sums(), Sums(is_heldout=True), Recall(count_tokens=bytes_of, distance=20), *digits):
        example = task.sample(random.Random(seed))
        assert task.check(example.completion, example)
        assert example == task.sample(random.Random(seed))


def test_wrong_and_unfinished_sums_fail():
    task = Sums()
    example = task.example(47, 85)
    assert task.check(" 132\n", example)
    assert task.check("7+5=13,132", example)  # only the answer is judged
    for output in ("", "7+5=12,4+8+1=13", "7+5=12,4+8+1=13,133", "132,7", "1132", "132 or 131"):
        assert not task.check(output, example)


@pytest.mark.parametrize(
    ("task", "digits", "answer"),
    [
        (Sort(), "66048764", "04466678"),
        (Sort(num_digits=3), "201", "012"),
        (Reverse(), "66048764", "46784066"),
        (Reverse(num_digits=2), "10", "01"),
    ],
)
def test_digits_are_arranged_as_by_hand(task, digits, answer):
    example = task.example(digits)
    assert (example.prompt, example.completion) == (f"{task.name} {digits}=", answer)
    assert task.check(f" {answer}\n", example)
    wrong = ["", digits, f"{answer}0", f"0{answer}", answer[:-1], f"{digits},{answer}", f"{answer} {answer}"]
    for output in wrong:
        assert not task.check(output, example)


@pytest.mark.parametrize("cls", [Sort, Reverse])
def test_heldout_rows_never_reach_the_training_stream(cls):
    """All thousand rows of three digits, so that nothing depends on what happens to be drawn."""
    rng = random.Random(0)
    train, heldout = cls(num_digits=3), cls(num_digits=3, is_heldout=True)
    seen, unseen = (
        {task.sample(rng).prompt.removeprefix(f"{task.name} ")[:-1] for _ in range(20_000)}
        for task in (train, heldout)
    )
    assert not seen & unseen
    assert len(seen | unseen) == 1000
    # 200 of them, within three standard deviations: 29 where all orders of a row go together, else 13.
    assert 113 < len(unseen) < 287
    if cls is Sort:  # no other order of a held-out row's digits is trained on
        assert not {"".join(sorted(row)) for row in seen} & {"".join(sorted(row)) for row in unseen}


def test_half_of_the_rows_are_held_out_when_asked():
    train = Reverse(num_digits=4, heldout_share=0.5)
    rows = ["".join(row) for row in itertools.product("0123456789", repeat=4)]
    assert 4700 < sum(train.holds_out(row) for row in rows) < 5300


@pytest.mark.parametrize("num_digits", [2, 3, 4])
def test_chance_of_sorting_is_that_of_a_random_order(num_digits):
    """Over all rows, the mean of 1 / (orders that look different): every one is as likely, one is right."""
    total = 0.0
    for row in itertools.product("0123456789", repeat=num_digits):
        ways = 1
        for count in Counter(row).values():
            for i in range(1, count + 1):
                ways *= i
        orders = 1
        for i in range(1, num_digits + 1):
            orders *= i
        total += ways / orders
    assert Sort(num_digits=num_digits).chance == pytest.approx(total / 10**num_digits)


@pytest.mark.parametrize("num_digits", [2, 3, 4])
def test_chance_of_reversing_is_that_of_a_random_order(num_digits):
    total = 0.0
    for row in itertools.product("0123456789", repeat=num_digits):
        orders = list(itertools.permutations(row))
        total += orders.count(row[::-1]) / len(orders)
    assert Reverse(num_digits=num_digits).chance == pytest.approx(total / 10**num_digits)


def test_recall_asks_for_a_listed_value_at_the_distance():
    tokenizer = Tokenizer.train(["some filler text of several words, and more of it\nA=b\n"], 270)

    def count(text):
        return len(tokenizer.encode(text))

    words = ["some 3 filler text", "of several words", "x2"]
    rng = random.Random(3)
    for distance in (0, 1, 50, 400):
        for filler in (words, None):
            task = Recall(count_tokens=count, distance=distance, num_pairs=10, num_queries=3, filler=filler)
            example = task.sample(rng)
            listed, between, query = example.prompt.split("\n")
            table = {pair[0]: pair[1:] for pair in listed.split()}
            assert sorted(table) == list("0123456789")
            assert example.answer == table[query]
            first, *others = example.completion.split()
            assert first == example.answer
            assert [pair[1:] for pair in others] == [table[pair[0]] for pair in others]
            assert len({query, *(pair[0] for pair in others)}) == 3
            assert distance <= count(between) <= distance + 10
            assert not any(c.isdigit() for c in between)
            assert [tokenizer.decode([i]) for i in tokenizer.encode(f"{query}{first}")] == [query, first]
    assert task.chance == 1 / 16
    assert task.chance_among_listed == 1 / 10


def test_recall_values_cover_all_sixteen():
    task = Recall(count_tokens=bytes_of, distance=0, num_pairs=1)
    rng = random.Random(0)
    answers = {task.sample(rng).answer for _ in range(600)}
    assert answers == set("abcdefghijklmnop")


def test_recall_checks_the_first_word_alone():
    task = Recall(count_tokens=bytes_of, distance=0)
    example = task.sample(random.Random(0))
    assert task.check(f"{example.answer} 3x\n", example)
    assert not task.check("", example)
    assert not task.check(f"{example.answer}{example.answer}", example)
    assert not task.check(f"x\n{example.answer}", example)


def test_unknown_tasks_and_settings_are_refused():
    assert set(Task.registry) >= {"recall", "reverse", "sort", "sums"}
    assert task_class("sums") is Sums
    with pytest.raises(ConfigError, match=r"did you mean sums\? \(known: cwe, .*recall, reverse, sort, sums"):
        task_class("sum")
    for settings in (
        {"num_pairs": 11},
        {"num_pairs": 0},
        {"num_queries": 5},
        {"num_values": 15},
        {"distance": -1},
    ):
        with pytest.raises(ConfigError, match="recall:"):
            Recall(**{"count_tokens": bytes_of, "distance": 1, **settings})
    with pytest.raises(ConfigError, match="no words"):
        Recall(count_tokens=bytes_of, distance=1, filler=[" "])
    with pytest.raises(ConfigError, match="sums:"):
        Sums(is_heldout=True, heldout_share=0.0)
    for settings in ({"num_digits": 1}, {"heldout_share": 1.0}, {"is_heldout": True, "heldout_share": 0.0}):
        with pytest.raises(ConfigError, match="sort:"):
            Sort(**settings)
