"""The engine's face: `LLM` turns prompts into texts, scores sequences and takes new weights.

`Engine` is the part of it that rollouts and evaluations rely on, so that another server can stand in.
Everything runs in the caller's thread, one `step` at a time; `add` and `step` are for callers with their own
loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sateen.data.tokenizer import Tokenizer, check_vocab
from sateen.engine.cache.prefix import prefix_cache_for
from sateen.engine.cache.sizing import sized_cache
from sateen.engine.contract import Engine, Prompt, WeightUpdate, copy_weights
from sateen.engine.drafts.length import DraftLength
from sateen.engine.int8_layers import ATTENTION, BUDGET, PROBE_TEXT, choose_attention, warn_if_slow
from sateen.engine.intake import Intake, find_tokenizer
from sateen.engine.limits import Limits, check_deadline
from sateen.engine.request import RequestOutput, SamplingParams, StreamChunk
from sateen.engine.runner import Runner
from sateen.engine.scheduler import Scheduler
from sateen.engine.scoring import score
from sateen.engine.state import Request
from sateen.engine.stats import EngineStats, allocated_layers
from sateen.engine.weights import check_weights, load_serving, new_tensors
from sateen.engine.work import Work
from sateen.errors import ConfigError, unknown_name
from sateen.models.decoder import Decoder

__all__ = ["LLM", "Engine", "EngineStats", "StreamChunk", "WeightUpdate"]


class LLM:
    """A model that serves.

    Attributes:
        model: the decoder.
        tokenizer: its tokenizer, or None; without one prompts are token ids and outputs have no text.
        max_model_len: most tokens of a prompt and its completion together.
        num_draft: most tokens drafted per pass.
        draft_length: how many of them pay, where `draft` is `auto`.
        prefix: what prompts have in common, or None.
    """

    def __init__(
        self,
        model: Decoder | str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        draft: str = "auto",
        attention: str = "auto",
        weights: str = "auto",
        step: str = "auto",
        kv_cache_dtype: str = "auto",
        int8_budget: float = BUDGET,
        dtype: str | None = None,
        device: str | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 1024,
        max_model_len: int | None = None,
        kv_memory_bytes: int | None = None,
        num_pages: int | None = None,
        seed: int = 0,
        record_routing: bool = False,
        record_selections: bool = False,
        prefix_cache: bool = True,
        anchor_memory_bytes: int | None = None,
        prefill_exit: bool = True,
        kv_offload: bool = False,
        kv_prefetch: bool = False,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Loads a model and allocates its caches.

        Args:
            model: a decoder, or what `load_model` takes: a directory, a run folder or a preset.
            tokenizer: instead of the one in the model's directory.
            draft: `mtp` drafts with all of the model's heads, `none` does not. `auto` drafts where there are
                heads and, but for seeded sampling, as far as it pays by the engine's own measurements; the
                tokens of sampling without a seed then depend on them.
            attention: over cached rows, `float` computes in floating point, `int8` with integer products,
                `int8-half` with integers only for the scores; both are for layers of full and sliding
                attention, and models with others are refused. `auto` is `int8` over int8 rows, where that is
                possible and the faster form, and else `float`. `score` has no cache and always computes in
                floating point.
            weights: `auto` as stored; `int8` and `int4` round the linear layers of a floating-point model to
                eight or four bits and their inputs to int8, the output matrix to int8 with both, and keep the
                embedding; `fairy2` packs the complex two-bit weights of a model that has them as masters, and
                takes packed ones as they are.
            step: how the trunk runs for up to 512 tokens (32 with HySparse), decoding above all: `native` in
                one compiled call, `torch` layer by layer; `auto` is native where it can be. Longer steps and
                `score` run in torch.
            kv_cache_dtype: `auto` (the model's), `fp32`, `bf16`, `fp16`, or `int8` with a scale per token and
                head.
            int8_budget: where attention computes with integers, layers that err more than this on a short
                text, as a relative L2 error, compute in floating point; `stats` names them.
            dtype: of the weights; as stored when None. Not for a decoder object.
            device: where to load; not for a decoder object.
            max_num_seqs: sequences in work at once.
            max_num_batched_tokens: most tokens per step.
            max_model_len: the model's context when None.
            kv_memory_bytes: bound of the paged caches; when None what `max_num_seqs` full contexts need, at
                most a quarter of the free memory.
            num_pages: pages of 64 tokens, instead of `kv_memory_bytes`.
            seed: of requests without a seed.
            record_routing: outputs carry the experts that every token used, for models that have experts.
            record_selections: outputs carry the key blocks that every token's queries chose, for models with
                oracle layers.
            prefix_cache: a prompt that begins like an earlier one starts where its rows are still known.
            anchor_memory_bytes: bound of the copies of sliding windows that `prefix_cache` keeps, which come
                on top of the caches; when None two per sequence or an eighth of the paged caches, whichever
                is more (source: ours).
            prefill_exit: models with HySparse2's bridge compute only those rows of a prompt in their second
                half that somebody reads; the tokens are the same. Without effect for other models, INT8
                caches and recorded choices.
            kv_offload: the pages of full layers live in host memory; layers that read chosen blocks get those
                alone. The tokens are the same. Made for accelerators and never run on one; on a CPU it only
                copies more.
            kv_prefetch: with `kv_offload`, chosen blocks are gathered and copied while the full layer that
                chose them goes on computing, and awaited by the first layer that reads them. The tokens are
                the same.
            max_waiting: requests that `add` lets wait beside those in work; None for any number.
            clock: seconds that `deadline_s` is measured in.

        Raises:
            ConfigError: a value that is not accepted, or a tokenizer that does not fit the model.
            BackendUnavailable: `step` is `native` and cannot be, or a layer has no int8 attention.
        """
        if attention not in ATTENTION:
            raise ConfigError(unknown_name("attention", attention, ATTENTION))
        check_weights(weights)
        self._weights = weights
        if draft not in ("auto", "mtp", "none"):
            raise ConfigError(unknown_name("draft", draft, ("auto", "mtp", "none")))
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {max_num_seqs}; accepted: 1 or more")
        if max_waiting is not None and max_waiting < 0:
            raise ConfigError(f"max_waiting is {max_waiting}; accepted: 0 or more, or None for no bound")
        model, self._trained = load_serving(model, weights, dtype=dtype, device=device)
        self.model = model.eval()
        config = model.config
        if tokenizer is not None:
            check_vocab(tokenizer, config.vocab_size)
        self.tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model)
        if draft == "mtp" and not config.num_mtp_heads:
            raise ConfigError(
                "draft 'mtp' needs MTP heads and this model has none; use draft='auto' or 'none'"
            )
        self.num_draft = 0 if draft == "none" else config.num_mtp_heads
        self.draft_length = DraftLength(self.num_draft) if draft == "auto" and self.num_draft else None
        if max_num_batched_tokens < max_num_seqs * (1 + self.num_draft):
            raise ConfigError(
                f"max_num_batched_tokens {max_num_batched_tokens} is too small; {max_num_seqs} sequences "
                f"with {self.num_draft} drafts each need {max_num_seqs * (1 + self.num_draft)}"
            )
        if kv_offload and any(spec.options.get("share_kv_swa") for spec in config.specs):
            raise ConfigError(
                "kv_offload stages chosen blocks alone, and with share_kv_swa windows read these rows too; "
                "use kv_offload=False"
            )
        if kv_prefetch and not kv_offload:
            raise ConfigError("kv_prefetch brings blocks that kv_offload keeps away; use both or neither")
        self.cache = sized_cache(
            model, num_draft=self.num_draft, kv_cache_dtype=kv_cache_dtype,
            attention="float" if attention == "auto" else attention,
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, kv_memory_bytes=kv_memory_bytes,
            num_pages=num_pages, offloads=kv_offload, prefetches=kv_prefetch,
        )  # fmt: skip
        self._attention, self._int8_budget = attention, int8_budget
        self._choose_attention()
        warn_if_slow(attention, self.cache)
        self.max_model_len = self.cache.max_model_len
        num_tokens = self.tokenizer.vocab_size if self.tokenizer is not None else config.vocab_size
        self.runner = Runner(
            model, self.cache, num_tokens=num_tokens, drafts=self.num_draft > 0,
            records_routing=record_routing, records_selections=record_selections, step=step,
            prefill_exit=prefill_exit,
        )  # fmt: skip
        self.prefix = prefix_cache_for(
            self.cache, wanted=prefix_cache, records_choices=self.runner.records,
            max_anchor_bytes=anchor_memory_bytes,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            prefix=self.prefix,
        )  # fmt: skip
        self._limits = Limits(self.scheduler, max_waiting, clock)
        self._work = Work(model, self.scheduler, self.runner, self._limits, self.draft_length)
        self._intake = Intake(model, self.tokenizer, self.max_model_len, seed)

    def _choose_attention(self) -> None:
        probe = self.tokenizer.encode(PROBE_TEXT) if self.tokenizer is not None else None
        self._int8_layers = choose_attention(
            self._attention, self.model, self.cache, probe, self._int8_budget
        )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in order, with its `n` completions.

        Args:
            prompts: a text or a list of token ids, or a list of these.
            sampling_params: for all, or one per prompt.

        Raises:
            RequestError: a prompt or setting that cannot be served; nothing has run then.
        """
        requests = self._intake.requests(prompts, sampling_params)
        for _ in self._work.run(requests):
            pass
        return [request.output() for request in requests]

    def generate_stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamChunk]:
        """News of each request as it comes; text that a stop string may still take back is held.

        Leaving the iterator early ends its requests. Errors as for `generate`, raised by the call itself.
        """
        return self._stream(self._intake.requests(prompts, sampling_params))

    def _stream(self, requests: list[Request]) -> Iterator[StreamChunk]:
        index = {id(request): i for i, first in enumerate(requests) for request in first.siblings}
        for request in self._work.run(requests):
            yield request.news(index[id(request)])

    def news(self, request: Request, index: int = 0) -> StreamChunk:
        """What a request got since this was last asked; see `Request.news`."""
        return request.news(index)

    def add(
        self, prompt: Prompt, params: SamplingParams | None = None, *, deadline_s: float | None = None
    ) -> Request:
        """Queues one request; `step` advances it and `request.output()` shows it at any time.

        For several completions it is the first one's; `request.siblings` are all of them.

        Args:
            prompt: a text or a list of token ids.
            params: how its tokens are chosen.
            deadline_s: seconds from now after which it ends with what it has, as `abort` with the stop reason
                `deadline`.

        Raises:
            RequestError: a prompt or setting that cannot be served.
            QueueFull: `max_waiting` requests are waiting already; `generate` is not bounded by it.
        """
        params = params or SamplingParams()
        if deadline_s is not None:
            check_deadline(deadline_s)
        self._limits.check_room(params.n, self._work.stats.tokens_per_s)
        request = self._intake.request(prompt, params)
        for sibling in request.siblings:
            if deadline_s is not None:
                self._limits.watch(sibling, deadline_s)
            self._work.queue(sibling)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request and the other completions of its prompt as they are; their rows are free at once.

        The next `step` returns them among the finished ones; what is finished already stays as it is.
        """
        self._work.abort(request)

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self.scheduler.num_unfinished)

    @property
    def weights_version(self) -> int:
        """From the last `update_weights`; 0 before."""
        return self._work.weights_version

    def step(self) -> list[Request]:
        """One forward over what the scheduler picks.

        Returns:
            The requests that got new tokens, and those that were aborted or expired since the last step.
        """
        return self._work.step()

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probabilities at temperature 1 of all tokens but the first: lists of length n - 1.

        Packed forwards without caches; the logits of only some rows are held at once.

        Raises:
            RequestError: an empty sequence, one beyond the model's context, or an id out of the vocabulary.
        """
        for sequence in token_id_lists:
            self._intake.check_sequence(sequence)
        return score(self.model, token_id_lists, max_tokens=self.scheduler.max_num_batched_tokens)

    def update_weights(self, update: WeightUpdate) -> None:
        """Uses new weights from the next token on; requests in work keep their tokens, not their rows.

        Raises:
            CheckpointError: names or shapes that are not the model's; the weights are then as before.
        """
        source = new_tensors(self.model, self._weights, self._trained, update.source)
        if source is not None:
            copy_weights(self.model, source)
        self._choose_attention()
        self._work.weights_version = update.version
        self.scheduler.restart_all()

    def stats(self) -> dict[str, Any]:
        """Counts since the engine was made, tokens/s, acceptance and the bytes that are allocated."""
        stats = self._work.stats
        stats.preemptions = self.scheduler.num_preemptions
        return stats.as_dict() | {
            "allocated_bytes": self.cache.allocated_bytes(),
            "host_bytes": self.cache.host_bytes,
            "draft_decisions": self.draft_length.decisions if self.draft_length is not None else [],
            "draft_state_bytes": self.runner.drafter.allocated_bytes if self.runner.drafter else 0,
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "cache": self.cache.usage(),
            "prefix": self.prefix.stats() if self.prefix is not None else None,
            "int8_attention": self._int8_layers.as_dict() if self._int8_layers is not None else None,
        }

    def allocated_layers(self) -> list[dict[str, Any]]:
        """For each layer, MTP heads last: `layer`, `layer_kind`, `layouts` and bytes.

        `bytes` are allocated; sequences hold `used_bytes` of them now and held at most `peak_bytes`.
        """
        return allocated_layers(self.model.config, self.cache)

    def kv_bytes(self, context: int) -> dict[str, int]:
        """Bytes that one sequence of `context` tokens occupies, per kind of layout."""
        return self.cache.kv_bytes(context)
