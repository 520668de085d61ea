"""vLLM and SGLang behind `Engine`: the same calls, results in our types.

Both are imported when an engine is made, so neither is a dependency. What their settings cannot express is
refused before anything runs. `tests/engine/test_contract.py` runs over every engine that is installed; which
ones that were, stands in docs/engine.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sateen.engine.contract import Prompt, WeightUpdate
from sateen.engine.request import CompletionOutput, Logprob, RequestOutput, SamplingParams
from sateen.errors import BackendUnavailable, RequestError

# Settings that both engines have under our names and with our meaning.
SHARED = (
    "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty stop_token_ids ignore_eos"
).split()


class VLLMEngine:
    """vLLM in this process.

    Args:
        model: a model directory that vLLM can open.
        settings: of `vllm.LLM`, for example `dtype`, `max_model_len`, `enforce_eager`.

    Raises:
        BackendUnavailable: vLLM is not installed.
    """

    def __init__(self, model: str | Path, **settings: Any):
        try:
            import vllm
        except ImportError as error:
            raise BackendUnavailable(f"vLLM cannot be imported ({error}); pip install vllm") from None
        self._vllm = vllm
        self._llm = vllm.LLM(model=str(model), **settings)
        self.weights_version = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """One output per prompt, in order; see `Engine`."""
        each = _each(prompts, sampling_params)
        wanted = [self._params(params) for params in each]
        inputs = [p if isinstance(p, str) else {"prompt_token_ids": list(p)} for p in prompts]
        found = self._llm.generate(inputs, wanted, use_tqdm=False)
        return [self._output(i, out) for i, out in enumerate(found)]

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probabilities of all tokens but the first of each sequence."""
        params = self._vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        inputs = [{"prompt_token_ids": list(ids)} for ids in token_id_lists]
        found = self._llm.generate(inputs, params, use_tqdm=False)
        return [
            [row[token].logprob for token, row in zip(ids[1:], out.prompt_logprobs[1:], strict=True)]
            for ids, out in zip(token_id_lists, found, strict=True)
        ]

    def update_weights(self, update: WeightUpdate) -> None:
        """Loads the weights of a model directory of the same shape.

        Raises:
            RequestError: the update is no directory; tensors in memory cannot reach vLLM's workers.
        """
        folder = _directory(update, "vLLM")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self._llm.reset_prefix_cache()
        self.weights_version = update.version

    def _params(self, params: SamplingParams) -> Any:
        _refuse(
            params, (*SHARED, "top_k", "max_tokens", "seed", "stop", "logprobs", "n", "detokenize"), "vLLM"
        )
        return self._vllm.SamplingParams(
            **{name: getattr(params, name) for name in SHARED},
            top_k=params.top_k if params.top_k > 0 else 0,
            max_tokens=params.max_tokens,
            seed=params.seed,
            n=params.n,
            stop=list(params.stop_strings),
            logprobs=params.logprobs,
            detokenize=params.detokenize,
        )

    def _output(self, index: int, out: Any) -> RequestOutput:
        completions = [
            CompletionOutput(
                index=c.index,
                text=c.text,
                token_ids=list(c.token_ids),
                logprobs=None
                if c.logprobs is None
                else [
                    {
                        token: Logprob(row[token].logprob, row[token].rank)
                        for token in sorted(row, key=lambda t, chosen=chosen: (t != chosen, row[t].rank))  # type: ignore[misc]
                    }
                    for chosen, row in zip(c.token_ids, c.logprobs, strict=True)
                ],
                finish_reason=c.finish_reason,
                stop_reason=c.stop_reason,
            )
            for c in out.outputs
        ]
        return RequestOutput(
            index, out.prompt, list(out.prompt_token_ids), completions, out.finished, self.weights_version
        )


class SGLangEngine:
    """SGLang in this process.

    Args:
        model: a model directory that SGLang can open.
        settings: of `sglang.Engine`, for example `dtype`, `context_length`.

    Raises:
        BackendUnavailable: SGLang is not installed.
    """

    def __init__(self, model: str | Path, **settings: Any):
        try:
            import sglang
        except ImportError as error:
            raise BackendUnavailable(f"SGLang cannot be imported ({error}); pip install sglang") from None
        self._engine = sglang.Engine(model_path=str(model), **settings)
        self.weights_version = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams]
    ) -> list[RequestOutput]:
        """One output per prompt, in order; see `Engine`. Prompts are all texts or all token ids."""
        each = _each(prompts, sampling_params)
        settings = [self._params(params) for params in each]
        are_texts = {isinstance(prompt, str) for prompt in prompts}
        if len(are_texts) > 1:
            raise RequestError("SGLang takes prompts that are all texts or all token ids in one call")
        given = {
            "prompt" if are_texts == {True} else "input_ids": [
                p if isinstance(p, str) else list(p) for p in prompts
            ]
        }
        tops = max((params.logprobs or 0 for params in each), default=0)
        found = self._engine.generate(
            **given,
            sampling_params=settings,
            return_logprob=any(params.logprobs is not None for params in each),
            top_logprobs_num=tops,
        )
        outputs = []
        for i, (prompt, params, out) in enumerate(zip(prompts, each, found, strict=True)):
            reason = out["meta_info"]["finish_reason"]
            completion = CompletionOutput(
                index=0,
                text=out["text"],
                token_ids=list(out["output_ids"]),
                logprobs=_sglang_logprobs(out["meta_info"]) if params.logprobs is not None else None,
                finish_reason=reason["type"],
                stop_reason=reason.get("matched"),
            )
            ids = [] if isinstance(prompt, str) else list(prompt)
            text = prompt if isinstance(prompt, str) else None
            outputs.append(RequestOutput(i, text, ids, [completion], True, self.weights_version))
        return outputs

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probabilities of all tokens but the first of each sequence."""
        found = self._engine.generate(
            input_ids=[list(ids) for ids in token_id_lists],
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=0,
        )
        return [[row[0] for row in out["meta_info"]["input_token_logprobs"][1:]] for out in found]

    def update_weights(self, update: WeightUpdate) -> None:
        """Loads the weights of a model directory of the same shape.

        Raises:
            RequestError: the update is no directory, or SGLang refuses it.
        """
        done, message = self._engine.update_weights_from_disk(str(_directory(update, "SGLang")))[:2]
        if not done:
            raise RequestError(f"SGLang did not take the weights: {message}")
        self.weights_version = update.version

    def _params(self, params: SamplingParams) -> dict[str, Any]:
        _refuse(params, (*SHARED, "top_k", "max_tokens", "stop", "logprobs"), "SGLang")
        return {name: getattr(params, name) for name in SHARED} | {
            "stop_token_ids": list(params.stop_token_ids),
            "top_k": params.top_k if params.top_k > 0 else -1,
            "max_new_tokens": params.max_tokens,
            "stop": list(params.stop_strings),
        }


def _sglang_logprobs(meta: Mapping[str, Any]) -> list[dict[int, Logprob]]:
    """SGLang gives no rank of the chosen token; it is counted among the best ones, the last if absent."""
    rows = []
    tops = meta.get("output_top_logprobs") or [None] * len(meta["output_token_logprobs"])
    for (value, token, _), best in zip(meta["output_token_logprobs"], tops, strict=True):
        ranked = [(t, v) for v, t, _ in best or ()]
        ids = [t for t, _ in ranked]
        row = {token: Logprob(value, ids.index(token) + 1 if token in ids else len(ids) + 1)}
        for rank, (t, v) in enumerate(ranked, 1):
            row.setdefault(t, Logprob(v, rank))
        rows.append(row)
    return rows


def _each(
    prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[SamplingParams]:
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts came with {len(each)} sampling params; give one for each")
    return each


def _refuse(params: SamplingParams, known: Sequence[str], engine: str) -> None:
    """Refuses settings that differ from their defaults and that the engine is not told about."""
    default = SamplingParams()
    for setting in fields(params):
        value = getattr(params, setting.name)
        if setting.name not in known and value != getattr(default, setting.name):
            raise RequestError(
                f"{setting.name} {value!r} is not passed on to {engine}; leave it at its default"
            )


def _directory(update: WeightUpdate, engine: str) -> Path:
    if not isinstance(update.source, str | Path):
        raise RequestError(
            f"{engine} takes new weights from a model directory only; save the model, then give its path"
        )
    return Path(update.source)
