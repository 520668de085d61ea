"""The engine's face: `LLM` turns prompts into texts, scores sequences and takes new weights.

`Engine` is the part of it that rollouts and evaluations rely on, so that another server can stand in.
Everything runs in the caller's thread, one `step` at a time; `add` and `step` are for callers with their own
loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sateen.checkpoint.hf import load_model
from sateen.data.tokenizer import Tokenizer, check_vocab
from sateen.engine.cache import KVCache
from sateen.engine.contract import Engine, Prompt, WeightUpdate, copy_weights
from sateen.engine.intake import Intake, find_tokenizer
from sateen.engine.request import DraftStats, RequestOutput, SamplingParams
from sateen.engine.runner import Runner
from sateen.engine.scheduler import Scheduler
from sateen.engine.sizing import cache_size, kv_dtype
from sateen.engine.state import Request
from sateen.errors import BackendUnavailable, ConfigError, RequestError, unknown_name
from sateen.models.decoder import Decoder
from sateen.models.quantize import pack_model

__all__ = ["LLM", "Engine", "EngineStats", "StreamChunk", "WeightUpdate"]


@dataclass(frozen=True)
class StreamChunk:
    """News of one request: its place in the call, new text, new tokens, and whether it is complete."""

    index: int
    text: str
    token_ids: list[int]
    finished: bool


@dataclass
class EngineStats:
    """Counts since the engine was made.

    Attributes:
        steps: forwards of the trunk.
        prompt_tokens: of all requests that were added.
        generated_tokens: emitted.
        seconds: spent in steps.
        preemptions: requests that gave back their rows and computed them again.
        draft: sums over finished requests.
    """

    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    preemptions: int = 0
    draft: DraftStats = field(default_factory=DraftStats)


class LLM:
    """A model that serves.

    Attributes:
        model: the decoder.
        tokenizer: its tokenizer, or None; without one prompts are token ids and outputs have no text.
        max_model_len: most tokens of a prompt and its completion together.
        num_draft: tokens drafted per pass.
        weights_version: from the last `update_weights`; 0 before.
    """

    def __init__(
        self,
        model: Decoder | str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        draft: str = "auto",
        attention: str = "auto",
        weights: str = "auto",
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
    ):
        """Loads a model and allocates its caches.

        Args:
            model: a decoder, or what `load_model` takes: a directory, a run folder or a preset.
            tokenizer: instead of the one in the model's directory.
            draft: `mtp` drafts with the model's heads, `none` does not, `auto` does where there are heads.
            attention: `auto` computes over cached rows in floating point, `int8` with integer products; it
                is for layers of full and sliding attention, and the first step refuses models with others.
                `score` has no cache and always computes in floating point.
            weights: `auto` as stored; `fairy2` packs the complex two-bit weights of a model that has them as
                masters, and takes packed ones as they are.
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

        Raises:
            ConfigError: a value that is not accepted, or a tokenizer that does not fit the model.
            BackendUnavailable: a mode that is not built yet.
        """
        if attention not in ("auto", "int8"):
            raise ConfigError(unknown_name("attention", attention, ("auto", "int8")))
        _check_weights(weights)
        if draft not in ("auto", "mtp", "none"):
            raise ConfigError(unknown_name("draft", draft, ("auto", "mtp", "none")))
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {max_num_seqs}; accepted: 1 or more")
        if isinstance(model, Decoder):
            if dtype is not None or device is not None:
                raise ConfigError(
                    "dtype and device are for loading; this model is loaded, so convert it before"
                )
            self._trained: Decoder | None = model
        else:
            model = load_model(model, dtype=dtype, device=device)
            self._trained = None
        if weights == "fairy2":
            model = _packed_fairy2(model)
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
            records_routing=record_routing,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.cache, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self.weights_version = 0
        self._intake = Intake(model, self.tokenizer, size.max_model_len, seed)
        self._stats = EngineStats()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One output per prompt, in order.

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
        index = {id(request): i for i, request in enumerate(requests)}
        for request in self._run(requests):
            tokens = request.tokens[request.num_prompt + request.stream_tokens :]
            request.stream_tokens += len(tokens)
            text = ""
            if request.detokenizer:
                end = request.detokenizer.sendable()
                text, request.stream_text = request.detokenizer.text[request.stream_text : end], end
            yield StreamChunk(index[id(request)], text, tokens, request.finish_reason is not None)

    def _run(self, requests: list[Request]) -> Iterator[Request]:
        """Steps until all of these are finished; yields each whenever it got new tokens."""
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
                    self.scheduler.remove(request)

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queues one request; `step` advances it and `request.output()` shows it at any time.

        Raises:
            RequestError: a prompt or setting that cannot be served.
        """
        request = self._intake.request(prompt, params or SamplingParams())
        self._queue(request)
        return request

    def _queue(self, request: Request) -> None:
        self._stats.prompt_tokens += request.num_prompt
        self.scheduler.add(request)

    def abort(self, request: Request) -> None:
        """Drops an unfinished request; its rows are free at once."""
        self.scheduler.remove(request)

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    def step(self) -> list[Request]:
        """One forward over what the scheduler picks; returns the requests that got new tokens."""
        start = time.perf_counter()
        chunks = self.scheduler.plan()
        if not chunks:
            return []
        emitted = self.runner.step(chunks)
        stats = self._stats
        for request, count in emitted:
            stats.generated_tokens += count
            if request.num_generated == count:
                request.weights_version = self.weights_version
            if request.finish_reason is not None:
                stats.draft.add(request.draft)
                self.scheduler.remove(request)
        stats.steps += 1
        stats.seconds += time.perf_counter() - start
        return [request for request, _ in emitted]

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
        if update.source is not None:
            copy_weights(self.model, update.source)
        elif self._trained is not None and self._trained is not self.model:
            copy_weights(self.model, pack_model(self._trained).state_dict())
        self.weights_version = update.version
        self.scheduler.restart_all()

    def stats(self) -> dict[str, Any]:
        """Counts since the engine was made, tokens/s, acceptance and the bytes that are allocated."""
        stats = self._stats
        stats.preemptions = self.scheduler.num_preemptions
        return asdict(stats) | {
            "tokens_per_s": stats.generated_tokens / stats.seconds if stats.seconds else 0.0,
            "acceptance_length": stats.draft.acceptance_length,
            "acceptance_by_position": stats.draft.acceptance_by_position,
            "allocated_bytes": self.cache.allocated_bytes(),
            "draft_state_bytes": self.runner.drafter.allocated_bytes if self.runner.drafter else 0,
        }

    def allocated_layers(self) -> list[dict[str, Any]]:
        """For each layer, MTP heads last: `layer`, `layer_kind`, `layouts` and the allocated `bytes`."""
        config = self.model.config
        kinds = [spec.attention for spec in config.specs]
        kinds += [config.mtp.layer.attention] * self.num_draft if config.mtp else []
        return [
            {"layer": i, "layer_kind": kind, "layouts": [layout.kind for layout in group], "bytes": size}
            for i, (kind, group, size) in enumerate(
                zip(kinds, self.cache.layouts, self.cache.allocated_bytes_by_layer(), strict=True)
            )
        ]

    def kv_bytes(self, context: int) -> dict[str, int]:
        """Bytes that one sequence of `context` tokens occupies, per kind of layout."""
        return self.cache.kv_bytes(context)


def _check_weights(weights: str) -> None:
    known = ("auto", "int8", "int4", "fairy2")
    if weights not in known:
        raise ConfigError(unknown_name("weights", weights, known))
    if weights in ("int8", "int4"):
        raise BackendUnavailable(f"weights {weights!r} is not built yet; available: auto, fairy2")


def _packed_fairy2(model: Decoder) -> Decoder:
    quant = model.config.quant
    if quant is None or quant.method not in ("phase", "fairy2i"):
        have = "full-precision" if quant is None else quant.method
        raise ConfigError(
            f"weights 'fairy2' packs complex two-bit weights and this model's are {have}; convert it with "
            "`sateen convert SRC DST --weights fairy2i`, or train one with the qat stage"
        )
    return pack_model(model)
