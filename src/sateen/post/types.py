"""`Rollout`: one sampled answer on its way from the engine to the training step.

Rollouts are sampled by an engine, judged by a reward, and packed here into the same batches that every other
stage trains on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sateen.data.packing import IGNORE, PackedBatch, Replay, pack


@dataclass(frozen=True)
class Rollout:
    """One answer to one prompt.

    Attributes:
        prompt_ids: the prompt's tokens.
        completion_ids: the sampled tokens, the end token included where it was sampled.
        logprobs: raw log-probabilities of the completion under the weights that sampled it, at temperature 1.
        weights_version: of those weights.
        group: which prompt; answers to one prompt share it.
        domain: which teacher judges it; empty where there is one task.
        reward: the score that training uses.
        is_correct: whether the answer passes in full, whatever the reward's scale.
        reward_parts: the score's components by name.
        is_truncated: the length limit ended it.
        teacher_logprobs: log-probabilities of the completion under the domain's teacher.
        router_ids: layer index -> expert ids of every token of prompt and completion as the sampler chose
            them; -1 for tokens that it never computed. None for models without experts.
        selections: the same of an oracle layer's key blocks, int32 [tokens, K, n]. None for models without.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]
    weights_version: int = 0
    group: int = 0
    domain: str = ""
    reward: float = 0.0
    is_correct: bool = False
    reward_parts: dict[str, float] = field(default_factory=dict)
    is_truncated: bool = False
    teacher_logprobs: list[float] | None = None
    router_ids: dict[int, list[list[int]]] | None = None
    selections: dict[int, Tensor] | None = None

    def __post_init__(self) -> None:
        assert len(self.logprobs) == len(self.completion_ids), "one log-probability per completion token"
        assert self.teacher_logprobs is None or len(self.teacher_logprobs) == len(self.completion_ids)


def pack_rollouts(rollouts: Sequence[Rollout], advantages: Sequence[float]) -> PackedBatch:
    """A batch of these rollouts, loss on completion tokens only.

    Args:
        rollouts: one sequence each; all or none with teacher log-probabilities.
        advantages: one per rollout.

    Returns:
        A batch whose labels, `old_logprobs` and `teacher_logprobs` stand at the row before each completion
        token, and whose `replay` has the experts and key blocks that the sampler chose, where it recorded
        them.
    """
    sequences = [[*r.prompt_ids, *r.completion_ids] for r in rollouts]
    labels = [[*[IGNORE] * (len(r.prompt_ids) - 1), *r.completion_ids, IGNORE] for r in rollouts]
    old = [x for r in rollouts for x in (*[0.0] * (len(r.prompt_ids) - 1), *r.logprobs, 0.0)]
    teacher = None
    if rollouts and rollouts[0].teacher_logprobs is not None:
        rows = [(*[0.0] * (len(r.prompt_ids) - 1), *(r.teacher_logprobs or ()), 0.0) for r in rollouts]
        teacher = torch.tensor([x for row in rows for x in row])
    return replace(
        pack(sequences, labels),
        rewards=torch.tensor([r.reward for r in rollouts]),
        advantages=torch.tensor(list(advantages), dtype=torch.float32),
        old_logprobs=torch.tensor(old),
        teacher_logprobs=teacher,
        replay=_replay(rollouts),
    )


def _replay(rollouts: Sequence[Rollout]) -> Replay | None:
    """The recorded choices of all rollouts, end to end, of the kinds that each has; None without any."""
    routes = [rollout.router_ids for rollout in rollouts if rollout.router_ids]
    lists = [rollout.selections for rollout in rollouts if rollout.selections]
    replay = Replay()
    if routes and len(routes) == len(rollouts):
        for layer in routes[0]:
            ids = [row for layers in routes for row in layers[layer]]
            replay.router_ids[layer] = torch.tensor(ids)
    if lists and len(lists) == len(rollouts):
        for layer in lists[0]:
            replay.selections[layer] = torch.cat([layers[layer] for layers in lists]).transpose(0, 1)
    return replay if replay.router_ids or replay.selections else None
