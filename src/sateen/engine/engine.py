"""The engine's face: `LLM` turns prompts into texts, scores sequences and takes new weights.

`Engine` is the part of it that rollouts and evaluations rely on, so that another server can stand in.
Everything runs in the caller's thread, one `step` at a time; `add` and `step` are for callers with their own
loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sateen.checkpoint.hf import load_model
from sateen.data.tokenizer import Tokenizer, check_vocab
from sateen.engine.cache.kv_cache import KVCache
from sateen.engine.cache.prefix import prefix_cache_for
from sateen.engine.cache.sizing import cache_size, kv_dtype
from sateen.engine.contract import Engine, Prompt, WeightUpdate, copy_weights
from sateen.engine.drafts.length import DraftLength
from sateen.engine.drafts.stats import DraftStats
from sateen.engine.intake import Intake, find_tokenizer
from sateen.engine.limits import Deadlines, Pace, check_deadline
from sateen.engine.request import RequestOutput, SamplingParams
from sateen.engine.runner import Runner
from sateen.engine.scheduler import Chunk, Scheduler
from sateen.engine.state import Request
from sateen.engine.weights import check_weights, new_tensors, serving_model
from sateen.errors import ConfigError, QueueFull, RequestError, unknown_name
from sateen.models.decoder import Decoder

__all__ = ["LLM", "Engine", "EngineStats", "StreamChunk", "WeightUpdate"]


@dataclass(frozen=True)
class StreamChunk:
    """News of one completion: its prompt's place in the call, new text and tokens, whether it is complete.

    `completion` is its place among the prompt's, as in `CompletionOutput.index`.
    """

    index: int
    text: str
    token_ids: list[int]
    finished: bool
    completion: int = 0


@dataclass
class EngineStats:
    """Counts since the engine was made.

    Attributes:
        steps: forwards of the trunk.
        prompt_tokens: of all requests that were added.
        generated_tokens: emitted.
        seconds: spent in steps.
        preemptions: requests that gave back their rows and computed them again.
        aborted: requests that were dropped or ran out of time.
        draft: sums over finished requests.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    preemptions: int = 0
    aborted: int = 0
    draft: DraftStats = field(default_factory=DraftStats)


class LLM:
    """A model that serves.

    Attributes:
        model: the decoder.
        tokenizer: its tokenizer, or None; without one prompts are token ids and outputs have no text.
        max_model_len: most tokens of a prompt and its completion together.
        num_draft: most tokens drafted per pass.
        draft_length: how many of them pay, where `draft` is `auto`.
        weights_version: from the last `update_weights`; 0 before.
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
        dtype: str | None = None,
        device: str | None = None,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 1024,
        max_model_len: int | None = None,
        kv_memory_bytes: int | None = None,
        num_pages: int | None = None,
        seed: int = 0,
        record_routing: bool = False,
        prefix_cache: bool = True,
        anchor_memory_bytes: int | None = None,
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
            attention: `auto` computes over cached rows in floating point, `int8` with integer products; it
                is for layers of full and sliding attention, and the first step refuses models with others.
                `score` has no cache and always computes in floating point.
            weights: `auto` as stored; `int8` and `int4` round the linear layers of a floating-point model to
                eight or four bits and their inputs to int8, the output matrix to int8 with both, and keep the
                embedding; `fairy2` packs the complex two-bit weights of a model that has them as masters, and
                takes packed ones as they are.
            step: how the trunk runs for up to 64 tokens, decoding above all: `native` in one compiled call,
                `torch` layer by layer; `auto` is native where it can be. Longer steps and `score` run in
                torch.
            kv_cache_dtype: `auto` (the model's), `fp32`, `bf16`, `fp16`, or `int8` with a scale per token and
                head.
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
            prefix_cache: a prompt that begins like an earlier one starts where its rows are still known.
            anchor_memory_bytes: bound of the copies of sliding windows that `prefix_cache` keeps, which come
                on top of the caches; when None two per sequence or an eighth of the paged caches, whichever
                is more (source: ours).
            max_waiting: requests that `add` lets wait beside those in work; None for any number.
            clock: seconds that `deadline_s` is measured in.

        Raises:
            ConfigError: a value that is not accepted, or a tokenizer that does not fit the model.
            BackendUnavailable: `step` is `native` and cannot be.
        """
        if attention not in ("auto", "int8"):
            raise ConfigError(unknown_name("attention", attention, ("auto", "int8")))
        check_weights(weights)
        self._weights = weights
        if draft not in ("auto", "mtp", "none"):
            raise ConfigError(unknown_name("draft", draft, ("auto", "mtp", "none")))
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {max_num_seqs}; accepted: 1 or more")
        if max_waiting is not None and max_waiting < 0:
            raise ConfigError(f"max_waiting is {max_waiting}; accepted: 0 or more, or None for no bound")
        if isinstance(model, Decoder):
            if dtype is not None or device is not None:
                raise ConfigError(
                    "dtype and device are for loading; this model is loaded, so convert it before"
                )
            self._trained: Decoder | None = model
        else:
            model = load_model(model, dtype=dtype, device=device, may_map=weights == "auto")
            self._trained = None
        model = serving_model(model, weights, is_ours=self._trained is None)
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
        num_layers = config.num_hidden_layers
        layouts = config.kv_layouts()[: num_layers + self.num_draft]
        rows_dtype = kv_dtype(kv_cache_dtype, model.model.embed_tokens.weight.dtype)
        size = cache_size(
            layouts, rows_dtype, model.device, context=config.max_position_embeddings,
            max_num_seqs=max_num_seqs, max_model_len=max_model_len, kv_memory_bytes=kv_memory_bytes,
            num_pages=num_pages,
        )  # fmt: skip
        self.max_model_len = size.max_model_len
        self.cache = KVCache(
            layouts, num_trunk_layers=num_layers, num_pages=size.num_pages, num_slots=max_num_seqs,
            max_model_len=size.max_model_len, num_draft=self.num_draft, dtype=rows_dtype, device=model.device,
            attention=attention,
        )  # fmt: skip
        num_tokens = self.tokenizer.vocab_size if self.tokenizer is not None else config.vocab_size
        self.runner = Runner(
            model, self.cache, num_tokens=num_tokens, drafts=self.num_draft > 0,
            records_routing=record_routing, step=step,
        )  # fmt: skip
        self.prefix = prefix_cache_for(
            self.cache, wanted=prefix_cache, records_routing=bool(self.runner.routed_layers),
            max_anchor_bytes=anchor_memory_bytes,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
            prefix=self.prefix,
        )  # fmt: skip
        self.max_waiting = max_waiting
        self._clock, self._deadlines, self._pace = clock, Deadlines(), Pace()
        self._ended: list[Request] = []  # aborted since the last step, which reports them
        self._own_tensors = [w for w in (*model.parameters(), *model.buffers()) if not w.is_inference()]
        self._seen_weights = self._weights_state()
        self.weights_version = 0
        self._intake = Intake(model, self.tokenizer, size.max_model_len, seed)
        self._stats = EngineStats()

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
        for _ in self._run(requests):
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
        requests = self._intake.requests(prompts, sampling_params)
        return self._stream(requests)

    def _stream(self, requests: list[Request]) -> Iterator[StreamChunk]:
        index = {id(request): i for i, first in enumerate(requests) for request in first.siblings}
        for request in self._run(requests):
            yield self.news(request, index[id(request)])

    def news(self, request: Request, index: int = 0) -> StreamChunk:
        """What a request got since this was last asked; text that a stop string may take back is held."""
        tokens = request.tokens[request.num_prompt + request.stream_tokens :]
        request.stream_tokens += len(tokens)
        text = ""
        if request.detokenizer:
            end = request.detokenizer.sendable()
            text, request.stream_text = request.detokenizer.text[request.stream_text : end], end
        return StreamChunk(index, text, tokens, request.finish_reason is not None, request.index)

    def _run(self, firsts: list[Request]) -> Iterator[Request]:
        """Steps until all completions of these are finished; yields each whenever it got new tokens."""
        requests = [request for first in firsts for request in first.siblings]
        mine = {id(request) for request in requests}
        try:
            for request in requests:
                self._queue(request)
            while mine:
                for request in self.step():
                    if id(request) in mine:
                        if request.finish_reason is not None:
                            mine.discard(id(request))
                        yield request
        finally:
            for request in requests:
                if id(request) in mine:
                    self._abort(request)

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
        self._check_room(params.n)
        request = self._intake.request(prompt, params)
        for sibling in request.siblings:
            if deadline_s is not None:
                sibling.deadline = self._clock() + deadline_s
                self._deadlines.add(sibling)
            self._queue(sibling)
        return request

    def _check_room(self, count: int) -> None:
        if self.max_waiting is None:
            return
        places = self.max_waiting + self.scheduler.max_num_seqs
        if count > places:
            raise RequestError(f"n is {count}, but at most {places} requests can run and wait; lower n")
        if self.scheduler.num_unfinished + count > places:
            wait_s = self._pace.retry_after_s(self._clock(), self.scheduler.running, self._tokens_per_s)
            raise QueueFull(
                f"{len(self.scheduler.waiting)} requests are waiting and at most {self.max_waiting} may; "
                f"try again in {wait_s:.3g} s",
                wait_s,
            )

    @property
    def _tokens_per_s(self) -> float:
        return self._stats.generated_tokens / self._stats.seconds if self._stats.seconds else 0.0

    def _queue(self, request: Request) -> None:
        self._stats.prompt_tokens += request.num_prompt if request.index == 0 else 0
        choice = self.draft_length
        request.wants_drafts = choice is None or request.params.is_repeatable or choice.wants_drafts()
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Ends a request and the other completions of its prompt as they are; their rows are free at once.

        The next `step` returns them among the finished ones; what is finished already stays as it is.
        """
        for sibling in request.siblings:
            if sibling.finish_reason is None:
                self._abort(sibling)
                self._ended.append(sibling)

    def _abort(self, request: Request, reason: str | None = None) -> None:
        request.abort(reason)
        self._stats.aborted += 1
        self._finish(request)

    def _finish(self, request: Request) -> None:
        if request.entry is not None:
            self._pace.ended(self._clock())
        self._stats.draft.add(request.draft)
        self.scheduler.remove(request)

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[Request]:
        """One forward over what the scheduler picks.

        Returns:
            The requests that got new tokens, and those that were aborted or expired since the last step.
        """
        start = time.perf_counter()
        for request in self._deadlines.expired(self._clock()):
            self._abort(request, "deadline")
            self._ended.append(request)
        self._deadlines.sweep(self.scheduler.num_unfinished)
        ended, self._ended = self._ended, []
        if self.prefix is not None and not self.scheduler.running and self.scheduler.waiting:
            self._forget_old_weights()
        if self.draft_length is not None:
            self.scheduler.max_drafts = self.draft_length.verify_length()
        chunks = self.scheduler.plan()
        if not chunks:
            return ended
        emitted = self.runner.step(chunks)
        self.scheduler.advance(chunks)
        if self.draft_length is not None:
            self._weigh_drafts(self.draft_length, chunks, emitted)
        stats = self._stats
        for request, count in emitted:
            stats.generated_tokens += count
            if request.num_generated == count:
                request.weights_version = self.weights_version
            if request.finish_reason is not None:
                self._finish(request)
        stats.steps += 1
        stats.seconds += time.perf_counter() - start
        return ended + [request for request, _ in emitted]

    def _weigh_drafts(
        self, choice: DraftLength, chunks: Sequence[Chunk], emitted: Sequence[tuple[Request, int]]
    ) -> None:
        """Tells the choice of draft lengths what a step of nothing but decoding took and brought."""
        if any(not chunk.samples or chunk.count != 1 + len(chunk.drafts) for chunk in chunks):
            return
        trunk_s, heads_s = self.runner.seconds
        fates = [
            (len(chunk.drafts), count - 1)
            for chunk, (request, count) in zip(chunks, emitted, strict=True)
            if chunk.drafts and request.finish_reason is None
        ]
        is_decided = choice.record(
            sequences=len(chunks), rows=sum(chunk.count for chunk in chunks), trunk_s=trunk_s,
            heads_s=heads_s if any(chunk.request.wants_drafts for chunk in chunks) else 0.0, drafts=fates,
        )  # fmt: skip
        if is_decided and choice.length == 0:
            for request in (*self.scheduler.running, *self.scheduler.waiting):
                if not request.params.is_repeatable:
                    request.wants_drafts = False
                    request.drafts, request.draft_probs = [], None

    def _weights_state(self) -> list[int]:
        """Changes whenever torch changes a weight in place: a trainer may own the very same tensors."""
        return [tensor._version for tensor in self._own_tensors]

    def _forget_old_weights(self) -> None:
        state = self._weights_state()
        if state != self._seen_weights:
            assert self.prefix is not None
            self.prefix.clear()
            self._seen_weights = state

    def score(self, token_id_lists: Sequence[Sequence[int]]) -> list[list[float]]:
        """Raw log-probabilities at temperature 1 of all tokens but the first: lists of length n - 1.

        Packed forwards without caches; the logits of only some rows are held at once.

        Raises:
            RequestError: an empty sequence, one beyond the model's context, or an id out of the vocabulary.
        """
        context = self.model.config.max_position_embeddings
        for sequence in token_id_lists:
            self._intake.check_ids(sequence)
            if len(sequence) > context:
                raise RequestError(
                    f"a sequence of {len(sequence)} tokens is beyond the model's context of {context}"
                )
        groups: list[list[Sequence[int]]] = []
        room = 0
        for sequence in token_id_lists:
            if len(sequence) > room:
                groups.append([])
                room = max(self.scheduler.max_num_batched_tokens, len(sequence))
            groups[-1].append(sequence)
            room -= len(sequence)
        return [scores for group in groups for scores in self.runner.score(group)]

    def update_weights(self, update: WeightUpdate) -> None:
        """Uses new weights from the next token on; requests in work keep their tokens, not their rows.

        Raises:
            CheckpointError: names or shapes that are not the model's; the weights are then as before.
        """
        source = new_tensors(self.model, self._weights, self._trained, update.source)
        if source is not None:
            copy_weights(self.model, source)
        self.weights_version = update.version
        self.scheduler.restart_all()

    def stats(self) -> dict[str, Any]:
        """Counts since the engine was made, tokens/s, acceptance and the bytes that are allocated."""
        stats = self._stats
        stats.preemptions = self.scheduler.num_preemptions
        return asdict(stats) | {
            "tokens_per_s": self._tokens_per_s,
            "acceptance_length": stats.draft.acceptance_length,
            "acceptance_by_position": stats.draft.acceptance_by_position,
            "allocated_bytes": self.cache.allocated_bytes(),
            "draft_decisions": self.draft_length.decisions if self.draft_length is not None else [],
            "draft_state_bytes": self.runner.drafter.allocated_bytes if self.runner.drafter else 0,
            "waiting": len(self.scheduler.waiting),
            "running": len(self.scheduler.running),
            "cache": self.cache.usage(),
            "prefix": self.prefix.stats() if self.prefix is not None else None,
        }

    def allocated_layers(self) -> list[dict[str, Any]]:
        """For each layer, MTP heads last: `layer`, `layer_kind`, `layouts` and bytes.

        `bytes` are allocated; sequences hold `used_bytes` of them now and held at most `peak_bytes`.
        """
        config = self.model.config
        kinds = [spec.attention for spec in config.specs]
        kinds += [config.mtp.layer.attention] * self.num_draft if config.mtp else []
        sizes = zip(
            self.cache.allocated_bytes_by_layer(),
            self.cache.bytes_in_use_by_layer(),
            self.cache.bytes_in_use_by_layer(at_peak=True),
            strict=True,
        )
        return [
            {
                "layer": i, "layer_kind": kind, "layouts": [layout.kind for layout in group],
                "bytes": allocated, "used_bytes": used, "peak_bytes": peak,
            }
            for i, (kind, group, (allocated, used, peak)) in enumerate(
                zip(kinds, self.cache.layouts, sizes, strict=True)
            )
        ]  # fmt: skip

    def kv_bytes(self, context: int) -> dict[str, int]:
        """Bytes that one sequence of `context` tokens occupies, per kind of layout."""
        return self.cache.kv_bytes(context)
