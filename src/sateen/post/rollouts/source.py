"""Batches made of fresh rollouts: prompts out, answers back, rewards, groups that teach, packed for the step.

One engine shares the trainer's weights, so every batch is sampled by the newest ones. The seamless scheduler
decides when another prompt starts; the engine's continuous batching is its worker pool.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sateen.data.packing import PackedBatch
from sateen.data.tasks import Example, Task
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.engine.state import Request
from sateen.errors import ConfigError, RewardError
from sateen.post.algorithms import group_advantages
from sateen.post.curriculum import PromptSampler, is_informative
from sateen.post.rollouts.scheduler import SeamlessScheduler
from sateen.post.types import Rollout, pack_rollouts

HOPELESS = 20  # batches' worth of prompts without one that teaches, before the stage gives up (source: ours)


@dataclass(frozen=True)
class Prompt:
    """A question with the task that judges its answers and the domain it counts for."""

    example: Example
    task: Task
    domain: str


def draw_prompts(tasks: dict[str, tuple[Task, int]], seed: int) -> list[Prompt]:
    """`(task, number)` examples of every domain, in a fixed order."""
    prompts = []
    for domain, (task, count) in tasks.items():
        rng = random.Random(f"{seed}/prompts/{domain}")
        prompts += [Prompt(task.sample(rng), task, domain) for _ in range(count)]
    return prompts


def by_domain(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean reward and mean reverse KL to the teacher of each domain, over the rollouts of one update.

    The divergence is the mean over sampled tokens of log student - log teacher, in nats per token.
    """
    domains: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        domains.setdefault(rollout.domain, []).append(rollout)
    found = {}
    for domain, mine in sorted(domains.items()):
        if len(domains) > 1:
            found[f"reward_mean_{domain}"] = sum(r.reward for r in mine) / len(mine)
        if mine[0].teacher_logprobs is not None:
            gaps = [p - q for r in mine for p, q in zip(r.logprobs, r.teacher_logprobs or (), strict=True)]
            found[f"reverse_kl_{domain}"] = sum(gaps) / len(gaps)
    return found


class RolloutSource:
    """An endless iterator of packed rollouts; implements `train.loop.BatchSource`.

    Attributes:
        annotate: changes a batch's rollouts before they are packed, for example to add a teacher's scores.
    """

    annotate: Callable[[list[Rollout]], list[Rollout]] | None = None

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        prompts_per_batch: int,
        updates_per_batch: int,
        sampling: SamplingParams,
        filter_metric: str,
        easy_probability: float,
        max_groups: int,
        seed: int,
    ):
        if llm.tokenizer is None:
            raise ConfigError("rollouts are judged as text, and this model has no tokenizer")
        if prompts_per_batch % updates_per_batch:
            raise ConfigError(
                f"prompts_per_batch {prompts_per_batch} is not a multiple of updates_per_batch "
                f"{updates_per_batch}"
            )
        self.llm, self.tokenizer, self.prompts = llm, llm.tokenizer, list(prompts)
        self.group_size, self.prompts_per_batch = group_size, prompts_per_batch
        self.updates_per_batch, self.sampling = updates_per_batch, sampling
        self.filter_metric, self.max_groups, self.seed = filter_metric, max_groups, seed
        self.sampler = PromptSampler(len(self.prompts), seed=seed, easy_probability=easy_probability)
        self.iteration = 0
        self.valid_share = 0.5
        self._pending: list[list[Rollout]] = []
        self._metrics: dict[str, float] = {}

    def __next__(self) -> PackedBatch:
        if not self._pending:
            groups = self.collect()
            size = self.prompts_per_batch // self.updates_per_batch
            self._pending = [
                [rollout for group in groups[i : i + size] for rollout in group]
                for i in range(0, len(groups), size)
            ]
        rollouts = self._pending.pop(0)
        if self.annotate is not None:
            rollouts = self.annotate(rollouts)
        self._metrics |= by_domain(rollouts)
        advantages = group_advantages([r.group for r in rollouts], [r.reward for r in rollouts])
        return pack_rollouts(rollouts, advantages)

    def collect(self) -> list[list[Rollout]]:
        """`prompts_per_batch` groups that teach something, in launch order."""
        self.iteration += 1
        scheduler = SeamlessScheduler(self.prompts_per_batch, valid_share=self.valid_share)
        prompt_of: dict[int, int] = {}
        requests: dict[int, list[Request]] = {}
        groups: dict[int, list[Rollout]] = {}
        while (chosen := scheduler.selection()) is None:
            while len(scheduler.active) < self.max_groups and scheduler.needs_launch():
                task = scheduler.launch()
                prompt_of[task] = self.sampler.draw()
                requests[task] = self._launch(task, self.prompts[prompt_of[task]])
            if len(scheduler.done) >= HOPELESS * self.prompts_per_batch and not scheduler.num_valid:
                raise RewardError(
                    f"{len(scheduler.done)} prompts gave no group with both right and wrong answers; "
                    "start from a model that solves some of them, or choose easier tasks"
                )
            self.llm.step()
            for task in sorted(scheduler.active):
                if all(request.finish_reason is not None for request in requests[task]):
                    scheduler.finish_rollout(task)
                    group = groups[task] = self._judge(prompt_of[task], requests.pop(task))
                    correct = [rollout.is_correct for rollout in group]
                    if self.filter_metric != "none":  # where every answer teaches, none is too easy
                        self.sampler.record(prompt_of[task], correct)
                    is_valid = is_informative(
                        [rollout.reward for rollout in group], correct, metric=self.filter_metric
                    )
                    scheduler.finish_reward(task, is_valid=is_valid)
        for task in reversed(scheduler.unfinished()):
            for request in requests[task]:
                if request.finish_reason is None:
                    self.llm.abort(request)
            self.sampler.put_back(prompt_of[task])
        self.valid_share = scheduler.valid_share
        self._measure(list(groups.values()), scheduler)
        return [groups[task] for task in chosen]

    def _launch(self, task: int, prompt: Prompt) -> list[Request]:
        ids = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.example.prompt}], add_generation_prompt=True
        )
        settings = asdict(self.sampling) | {"logprobs": 0}
        seeds = random.Random(f"{self.seed}/{self.iteration}/{task}")
        return [
            self.llm.add(ids, SamplingParams(**settings | {"seed": seeds.getrandbits(62)}))
            for _ in range(self.group_size)
        ]

    def _judge(self, index: int, requests: list[Request]) -> list[Rollout]:
        prompt = self.prompts[index]
        rollouts = []
        for request in requests:
            output = request.output()
            answer = output.outputs[0]
            # A truncated answer earns nothing (source: ours), even where its text so far would pass.
            is_truncated = answer.finish_reason == "length"
            is_correct = not is_truncated and prompt.task.check(answer.text, prompt.example)
            rollouts.append(
                Rollout(
                    prompt_ids=output.prompt_token_ids,
                    completion_ids=answer.token_ids,
                    logprobs=answer.token_logprobs or [],
                    weights_version=self.iteration,
                    group=index,
                    domain=prompt.domain,
                    reward=float(is_correct),
                    is_correct=is_correct,
                    is_truncated=is_truncated,
                    router_ids=output.router_ids,
                    selections=output.selections,
                )
            )
        return rollouts

    def _measure(self, groups: list[list[Rollout]], scheduler: SeamlessScheduler) -> None:
        rollouts = [rollout for group in groups for rollout in group]
        self._metrics = {
            "reward_mean": sum(r.reward for r in rollouts) / len(rollouts),
            "share_valid_groups": scheduler.num_valid / len(groups),
            "share_truncated": sum(r.is_truncated for r in rollouts) / len(rollouts),
            "completion_tokens_mean": sum(len(r.completion_ids) for r in rollouts) / len(rollouts),
            "rollouts": float(len(rollouts)),
            "easy_prompts": float(self.sampler.num_easy),
        }

    def metrics(self) -> dict[str, float]:
        """Of the newest rollouts: mean reward, share of groups that teach, lengths, size of the easy pool.

        Where there are several domains or teachers, also `reward_mean_DOMAIN` and `reverse_kl_DOMAIN`.
        """
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, rollouts of unfinished batches included, as values that JSON can hold."""
        return {
            "iteration": self.iteration,
            "valid_share": self.valid_share,
            "sampler": self.sampler.state_dict(),
            "pending": [[_values(rollout) for rollout in rollouts] for rollouts in self._pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues exactly after the batch at which `state_dict` was taken."""
        self.iteration, self.valid_share = state["iteration"], state["valid_share"]
        self.sampler.load_state_dict(state["sampler"])
        self._pending = [[_rollout(values) for values in rollouts] for rollouts in state["pending"]]


def _values(rollout: Rollout) -> dict[str, Any]:
    """What `_rollout` reads: a rollout as values that JSON can hold."""
    values = asdict(rollout)
    if rollout.selections is not None:
        values["selections"] = {layer: lists.tolist() for layer, lists in rollout.selections.items()}
    return values


def _rollout(values: dict[str, Any]) -> Rollout:
    """A rollout from JSON, whose keys are all text."""
    routes, lists = values.get("router_ids"), values.get("selections")
    if routes is not None:
        values = values | {"router_ids": {int(layer): ids for layer, ids in routes.items()}}
    if lists is not None:
        found = {int(layer): torch.tensor(ids, dtype=torch.int32) for layer, ids in lists.items()}
        values = values | {"selections": found}
    return Rollout(**values)
