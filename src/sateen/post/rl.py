"""The `rl` stage: GRPO on verifiable tasks, sampled by our engine from the weights that are being trained."""

from __future__ import annotations

from sateen.config import RLConfig, StageContext, TaskSource
from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import ConfigError
from sateen.models.decoder import Decoder
from sateen.post.algorithms import GRPO
from sateen.post.rollouts.source import RolloutSource, draw_prompts
from sateen.train.loop import stage_seed
from sateen.train.objective import TokenObjective
from sateen.train.prepare import RunData, build_task
from sateen.train.text import train_text


def rl(context: StageContext) -> None:
    """Trains the run's model on its own answers to the stage's tasks; MTP heads are frozen (MiMo-7B README).

    Raises:
        ConfigError: a source of the stage is not a task.
    """
    stage = context.stage
    assert isinstance(stage, RLConfig)

    def objective(model: Decoder) -> TokenObjective:
        return TokenObjective(
            GRPO(clip_low=stage.clip_low, clip_high=stage.clip_high),
            mtp_weight=stage.losses.mtp_weight,
            balance_weight=stage.losses.balance_weight,
        )

    def freeze(model: Decoder) -> None:
        for head in model.mtp_heads():
            head.requires_grad_(False)

    def batches(model: Decoder, data: RunData) -> RolloutSource:
        return rollout_source(context, stage, model, data.tokenizer)

    train_text(context, objective, freeze=freeze, make_batches=batches)


def rollout_source(
    context: StageContext, stage: RLConfig, model: Decoder, tokenizer: Tokenizer
) -> RolloutSource:
    """Rollouts of the stage's tasks from the model as it is when each batch is drawn."""
    tasks = {}
    weights = context.config.source_weights(stage)
    for name, weight in weights.items():
        source = context.config.data[name]
        if weight == 0:
            continue
        if not isinstance(source, TaskSource):
            raise ConfigError(f"stage rl: source {name} is {source.kind}; prompts come from task sources")
        # Prompts are drawn evenly, so a source's weight is in how many it has.
        count = max(1, round(source.num_examples * weight / max(weights.values())))
        tasks[name] = build_task(source, tokenizer), count
    answers = stage.group_size * stage.max_groups
    llm = LLM(
        model,
        tokenizer=tokenizer,
        draft="none",
        max_num_seqs=answers,
        max_num_batched_tokens=max(2048, answers),
        max_model_len=min(stage.seq_len, model.config.max_position_embeddings),
        record_routing=stage.replay_routing,
        record_selections=stage.replay_selections,
    )
    return RolloutSource(
        llm,
        draw_prompts(tasks, stage_seed(context)),
        group_size=stage.group_size,
        prompts_per_batch=stage.prompts_per_batch,
        updates_per_batch=stage.updates_per_batch,
        sampling=SamplingParams(temperature=stage.temperature, max_tokens=stage.max_tokens),
        filter_metric=stage.filter_metric,
        easy_probability=stage.easy_probability,
        max_groups=stage.max_groups,
        seed=stage_seed(context),
    )
