"""EleutherAI's lm-evaluation-harness over our engine: `sateen eval MODEL --lm-eval TASKS`, `--model sateen`.

`python -m sateen.eval.lm_eval` is the harness's own command line with our model class known to it. The same
tasks through `sateen serve` use the harness's `local-completions` and get the same scores, which
tests/engine/server/test_harness.py checks. Importing this module needs `pip install 'sateen[lm-eval]'`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from sateen.engine.contract import Prompt
from sateen.engine.engine import LLM
from sateen.engine.request import RequestOutput, SamplingParams
from sateen.errors import ConfigError

log = logging.getLogger("sateen.eval")

ACCEPTED = ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")


@register_model("sateen")
class SateenLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of an `LLM`.

    Args:
        model: an engine, or what `load_model` takes.
        max_length: tokens of a context and its continuation together; the engine's own when None.
        max_gen_toks: tokens generated where a task does not say.
        settings: of the engine, where `model` is none (`weights`, `kv_cache_dtype`, ...).

    Raises:
        ConfigError: the model has no tokenizer; a setting of a task that this engine has not.
    """

    def __init__(
        self,
        model: LLM | str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ):
        super().__init__()
        if not isinstance(model, LLM):
            if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                log.info("no CUDA device here, so %s, the harness's default, becomes the CPU", device)
                device = None
            count = int(batch_size) if batch_size not in (None, "auto") else 16
            chosen: dict[str, Any] = {"max_num_seqs": count, "draft": "none", "device": device} | settings
            model = LLM(model, **chosen)
        if model.tokenizer is None:
            raise ConfigError("the harness asks in text, and this model has no tokenizer; save one beside it")
        self.llm = model
        self.text = model.tokenizer
        self.max_length = min(max_length or model.max_model_len, model.max_model_len)
        self.max_gen_toks = max_gen_toks
        self._is_chat = False

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without a context."""
        return self.text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in the harness's cache of requests."""
        return str(self.llm.model.source or "sateen").replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The text's tokens; special tokens come from a chat template only, as in training and serving."""
        return self.text.encode_rendered(string) if self._is_chat else self.text.encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the tokenizer's own template, special tokens in its contents marked as text."""
        self._is_chat = True
        return self.text.render_chat(chat_history, add_generation_prompt, is_escaped=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, which the harness writes into its results."""
        if not chat_template:
            return None
        template = self.text.config.get("chat_template")
        return template if isinstance(template, str) else None

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation after its context, and whether it is the greedy one."""
        kept = []
        for _, context, continuation in requests:
            # The engine generates one token more, so the context gives way from the left.
            room = self.max_length - 1
            if len(continuation) >= room:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens does not fit max_length {self.max_length}"
                )
            kept.append(((context + continuation)[-room:], len(continuation)))
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts: list[Prompt] = [tokens for tokens, _ in kept]
        outputs = self.llm.generate(prompts, params) if kept else []
        answers = [_answer(output, count) for output, (_, count) in zip(outputs, kept, strict=True)]
        for (texts, *_), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, in windows of the context."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            total = sum(value for value, _ in self._loglikelihood_tokens(pairs))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            totals.append(total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to one of its stop strings."""
        prompts: list[Prompt] = []
        params: list[SamplingParams] = []
        for context, settings in (request.args for request in requests):
            asked = dict(normalize_gen_kwargs(settings, default_max_gen_toks=self.max_gen_toks))
            stop = [text for text in handle_stop_sequences(asked.pop("until", None), eos=None) if text]
            count = int(asked.pop("max_gen_toks"))
            is_sampled = asked.pop("do_sample", False)
            if unknown := sorted(asked.keys() - set(ACCEPTED)):
                raise ConfigError(f"the task sets {', '.join(unknown)}; accepted: {', '.join(ACCEPTED)}")
            temperature = asked.pop("temperature", 0.0) if is_sampled else 0.0
            asked.pop("temperature", None)
            if count >= self.max_length:
                raise ConfigError(f"max_gen_toks {count} leaves no room in max_length {self.max_length}")
            prompts.append(self.tok_encode(context)[-(self.max_length - count) :])
            params.append(SamplingParams(temperature=temperature, max_tokens=count, stop=stop, **asked))
        outputs = self.llm.generate(prompts, params) if prompts else []
        texts = [output.outputs[0].text for output in outputs]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts


def _answer(output: RequestOutput, count: int) -> tuple[float, bool]:
    """The sum over the last `count` tokens of a prompt, and whether each was the likeliest."""
    assert output.prompt_logprobs is not None
    rows = zip(output.prompt_token_ids[-count:], output.prompt_logprobs[-count:], strict=True)
    found = [row[token] for token, row in rows if row is not None]
    assert len(found) == count, "the first token of a prompt has no log-probability"
    return sum(entry.logprob for entry in found), all(entry.rank == 1 for entry in found)


def evaluate(
    model: LLM | str,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    manager: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """The harness's results for some of its tasks: its `simple_evaluate` with our model.

    Args:
        model: an engine, or what `load_model` takes.
        tasks: names the harness knows, or of tasks in `include_path`.
        limit: questions per task; all when None.
        num_fewshot: examples before each question; the task's own number when None.
        include_path: a folder with tasks of one's own.
        apply_chat_template: ask in the model's chat template.
        manager: the harness's index of tasks, where one was made already: reading its own takes seconds.
        settings: see `SateenLM`.

    Raises:
        ConfigError: a task is unknown.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = manager or TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"the harness knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, "
            "--include-path adds a folder of yours"
        )
    results = simple_evaluate(
        SateenLM(model, **settings),
        tasks=list(tasks),
        limit=limit,
        num_fewshot=num_fewshot,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        bootstrap_iters=0,
        log_samples=False,
    )
    assert results is not None
    return dict(results)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.argv[0] = "python -m sateen.eval.lm_eval"
    cli_evaluate()
