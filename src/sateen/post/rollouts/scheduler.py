"""The seamless rollout engine's decisions: when to launch another prompt, and which results make the batch.

A task is one prompt with all its answers. Workers never wait for rewards: a task whose reward is still out
counts as supply by the expected share of valid ones. The batch is the first B valid tasks *in the order of
launch*, and it is complete only when every earlier task has its reward; taking the first to finish would
favour short answers.

Source: MiMo-7B (arXiv 2505.07608 §3.4.1, figure 6). The estimate of the valid share is open there; ours is an
exponential mean of 0.9 per task, from 0.5, not below 0.05. Nothing here runs anything: callers own workers
and clocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SeamlessScheduler:
    """State of one batch's collection.

    Attributes:
        batch_size: valid tasks the batch needs.
        valid_share: running estimate of the share of tasks that turn out valid; carried from batch to batch.
        decay: of that estimate (source: ours).
        least_share: its floor (source: ours).
        safety: launches until the expected supply is this many times the need (source: ours).
    """

    batch_size: int
    valid_share: float = 0.5
    decay: float = 0.9
    least_share: float = 0.05
    safety: float = 1.0
    next_id: int = 1
    active: set[int] = field(default_factory=set)
    awaiting_reward: set[int] = field(default_factory=set)
    done: dict[int, bool] = field(default_factory=dict)

    @property
    def num_valid(self) -> int:
        return sum(self.done.values())

    def needs_launch(self) -> bool:
        """Whether a free worker should start another task now."""
        need = self.batch_size - self.num_valid
        expected = max(self.valid_share, self.least_share) * (len(self.active) + len(self.awaiting_reward))
        return expected < need * self.safety

    def launch(self) -> int:
        """The id of a new task, counted from 1 in launch order."""
        task, self.next_id = self.next_id, self.next_id + 1
        self.active.add(task)
        return task

    def finish_rollout(self, task: int) -> None:
        """A task's answers are complete; its reward is being computed elsewhere."""
        self.active.remove(task)
        self.awaiting_reward.add(task)

    def finish_reward(self, task: int, *, is_valid: bool) -> None:
        """A task's reward is known; `is_valid` says that it may enter the batch."""
        self.awaiting_reward.remove(task)
        self.done[task] = is_valid
        self.valid_share = self.decay * self.valid_share + (1 - self.decay) * is_valid

    def selection(self) -> list[int] | None:
        """The batch's tasks in launch order, or None while it is not complete."""
        valid = sorted(task for task, is_valid in self.done.items() if is_valid)
        if len(valid) < self.batch_size:
            return None
        chosen = valid[: self.batch_size]
        waits = any(task < chosen[-1] for task in self.active | self.awaiting_reward)
        return None if waits else chosen

    def unfinished(self) -> list[int]:
        """Tasks to abort once the batch is complete; their prompts go back to the head of the queue."""
        return sorted(self.active | self.awaiting_reward)

    @property
    def waste(self) -> float:
        """Surplus valid tasks over the batch size: the paper's sample waste."""
        return max(self.num_valid - self.batch_size, 0) / self.batch_size
