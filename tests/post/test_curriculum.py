"""Dynamic sampling and the easy pool."""

import pytest

from sateen.post.curriculum import PromptSampler, is_informative


@pytest.mark.parametrize(
    ("rewards", "correct", "by_acc", "by_reward"),
    [
        ([1.0, 1.0], [True, True], False, False),
        ([0.0, 0.0], [False, False], False, False),
        ([1.0, 0.0], [True, False], True, True),
        ([0.3, 0.6], [False, False], False, True),  # unsolved, but partial rewards differ
        ([0.30, 0.34], [False, False], False, False),  # a trivial difference would be blown up by 1/std
    ],
)
def test_which_groups_teach(rewards, correct, by_acc, by_reward):
    assert is_informative(rewards, correct, metric="acc") is by_acc
    assert is_informative(rewards, correct, metric="reward") is by_reward


def test_solved_prompts_come_back_at_the_easy_rate_and_leave_when_missed():
    sampler = PromptSampler(100, seed=0, easy_probability=0.1)
    for index in range(50):
        sampler.record(index, [True, True])
    draws = [sampler.draw() for _ in range(5000)]
    share = sum(index < 50 for index in draws) / len(draws)
    assert abs(share - 0.1) < 0.02  # three standard errors are 0.013
    sampler.record(7, [True, False])
    assert sampler.num_easy == 49
    seen = {sampler.draw() for _ in range(400)}
    assert 7 in seen


def test_every_normal_prompt_is_drawn_once_before_any_twice():
    sampler = PromptSampler(20, seed=1)
    draws = [sampler.draw() for _ in range(40)]
    assert sorted(draws[:20]) == sorted(draws[20:]) == list(range(20))


def test_empty_pool_and_all_easy():
    sampler = PromptSampler(3, seed=0, easy_probability=1.0)
    assert {sampler.draw() for _ in range(3)} == {0, 1, 2}
    sampler = PromptSampler(3, seed=0, easy_probability=0.0)
    for index in range(3):
        sampler.record(index, [True])
    assert {sampler.draw() for _ in range(3)} == {0, 1, 2}


def test_an_aborted_prompt_is_next():
    sampler = PromptSampler(10, seed=3)
    index = sampler.draw()
    sampler.put_back(index)
    assert sampler.draw() == index


def test_resumed_equals_unbroken():
    first, second = PromptSampler(30, seed=5), PromptSampler(30, seed=9)
    for i in range(37):
        first.record(first.draw(), [i % 3 == 0])
    second.load_state_dict(first.state_dict())
    assert [first.draw() for _ in range(50)] == [second.draw() for _ in range(50)]
