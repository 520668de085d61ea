"""The seamless rollout scheduler against the published trace, and its guarantee on random durations."""

import random

import pytest

from sateen.post.rollouts.scheduler import SeamlessScheduler


def test_the_papers_trace():
    """MiMo-7B figure 6: 4 workers, batch 4; a reward arrives after the next completion's launch decision."""
    valid = {1, 4, 6, 7}
    scheduler = SeamlessScheduler(batch_size=4)
    assert [scheduler.launch() for _ in range(4)] == [1, 2, 3, 4]
    started, pending = {}, None
    for task in (3, 4, 1, 6, 2, 5, 7):
        scheduler.finish_rollout(task)
        started[task] = scheduler.launch() if scheduler.needs_launch() else None
        if pending is not None:
            scheduler.finish_reward(pending, is_valid=pending in valid)
            assert scheduler.selection() is None
        pending = task
    scheduler.finish_reward(7, is_valid=True)
    assert started == {3: 5, 4: 6, 1: 7, 6: 8, 2: None, 5: None, 7: None}
    assert scheduler.selection() == [1, 4, 6, 7]
    assert scheduler.unfinished() == [8]
    assert scheduler.waste == 0.0


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_the_first_valid_in_launch_order_whatever_finishes_first(seed):
    """Workers, durations and reward delays are random; validity depends on the task alone."""
    rng = random.Random(seed)
    is_valid = [random.Random(1000 + i).random() < 0.4 for i in range(10_000)]
    scheduler = SeamlessScheduler(batch_size=5)
    events: list[tuple[float, int, str]] = []
    workers = rng.randint(1, 7)

    def start(now: float) -> None:
        events.append((now + rng.expovariate(1.0), scheduler.launch(), "rollout"))

    for _ in range(workers):
        start(0.0)
    while (chosen := scheduler.selection()) is None:
        now, task, kind = min(events)
        events.remove((now, task, kind))
        if kind == "rollout":
            scheduler.finish_rollout(task)
            events.append((now + rng.expovariate(2.0), task, "reward"))
        else:
            scheduler.finish_reward(task, is_valid=is_valid[task])
        while len(scheduler.active) < workers and scheduler.needs_launch():
            start(now)
    first = [i for i in range(1, 10_000) if is_valid[i]][:5]
    assert chosen == first


def test_a_later_valid_task_waits_for_earlier_rewards():
    scheduler = SeamlessScheduler(batch_size=1)
    for _ in range(2):
        scheduler.launch()
    scheduler.finish_rollout(2)
    scheduler.finish_reward(2, is_valid=True)
    assert scheduler.selection() is None
    scheduler.finish_rollout(1)
    assert scheduler.selection() is None
    scheduler.finish_reward(1, is_valid=False)
    assert scheduler.selection() == [2]


def test_the_valid_share_has_a_floor():
    scheduler = SeamlessScheduler(batch_size=1, valid_share=0.0)
    for _ in range(19):
        scheduler.launch()
    assert scheduler.needs_launch()  # 19 * 0.05 < 1
    scheduler.launch()
    assert not scheduler.needs_launch()
