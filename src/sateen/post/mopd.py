"""The `mopd` stage: the student answers, the teacher of the prompt's domain scores every token of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sateen.checkpoint.state import kept_model
from sateen.config import MOPDConfig, StageContext
from sateen.data.tokenizer import Tokenizer
from sateen.engine.contract import Engine
from sateen.engine.engine import LLM
from sateen.errors import ConfigError
from sateen.models.decoder import Decoder
from sateen.post.algorithms import MOPD
from sateen.post.rl import rollout_source
from sateen.post.rollouts.source import RolloutSource
from sateen.post.types import Rollout
from sateen.train.objective import TokenObjective
from sateen.train.prepare import RunData
from sateen.train.text import train_text


def mopd(context: StageContext) -> None:
    """Distils the stage's teachers into the run's model, each on its own domain.

    Raises:
        CheckpointError: a teacher's model is not there.
        ConfigError: a teacher of another tokenizer.
    """
    stage = context.stage
    assert isinstance(stage, MOPDConfig)

    def objective(model: Decoder) -> TokenObjective:
        low, high = stage.band
        algorithm = MOPD(
            band=(low, high),
            outcome_weight=stage.outcome_weight,
            logratio_clip=stage.logratio_clip or None,
        )
        return TokenObjective(algorithm, balance_weight=stage.losses.balance_weight)

    def freeze(model: Decoder) -> None:
        for head in model.mtp_heads():
            head.requires_grad_(False)

    def batches(model: Decoder, data: RunData) -> RolloutSource:
        source = rollout_source(context, stage, model, data.tokenizer)
        teachers = {domain: teacher_folder(context, path) for domain, path in stage.teachers.items()}
        source.annotate = TeacherScores(load_teachers(teachers, data.tokenizer))
        return source

    train_text(context, objective, freeze=freeze, make_batches=batches)


def teacher_folder(context: StageContext, teacher: Path) -> Path:
    """Where a teacher's model is: what an earlier stage of this name left in the run, else the path itself.

    Raises:
        CheckpointError: that stage left no model.
    """
    names = [stage.name for stage in context.config.stages[: context.stage_index]]
    return kept_model(context.folder, str(teacher)) if str(teacher) in names else teacher


def load_teachers(paths: dict[str, Path], tokenizer: Tokenizer) -> dict[str, Engine]:
    """An engine per domain; domains that share a path share the engine.

    Raises:
        CheckpointError: no model there.
        ConfigError: a teacher of another tokenizer.
    """
    engines: dict[Path, LLM] = {}
    for path in paths.values():
        if path not in engines:
            engines[path] = LLM(path, draft="none")
            theirs = engines[path].tokenizer
            if theirs is None or theirs.fingerprint != tokenizer.fingerprint:
                raise ConfigError(
                    f"{path}: the teacher's tokenizer is not the student's; they must share one"
                )
    return {domain: engines[path] for domain, path in paths.items()}


class TeacherScores:
    """Adds to each rollout what its domain's teacher thinks of its tokens; never more than one teacher."""

    def __init__(self, teachers: dict[str, Engine]):
        self.teachers = teachers

    def __call__(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The same rollouts, in order, with `teacher_logprobs`."""
        scored: dict[int, Rollout] = {}
        for domain, teacher in self.teachers.items():
            mine = [i for i, rollout in enumerate(rollouts) if rollout.domain == domain]
            sequences = [[*rollouts[i].prompt_ids, *rollouts[i].completion_ids] for i in mine]
            for i, scores in zip(mine, teacher.score(sequences), strict=True):
                completion = scores[len(rollouts[i].prompt_ids) - 1 :]
                scored[i] = replace(rollouts[i], teacher_logprobs=completion)
        return [scored[i] for i in range(len(rollouts))]
