"""Generation with MiMo-Audio's language model: text and patches of codes from one paged cache.

Each step every sequence gets a text id; where it is `<|empty|>`, the patch decoder writes the position's
codes from the same hidden state, all patches of the step together. Random numbers come from each sequence's
own generator, so what it gets does not depend on its neighbours. Shape letters: M rows, V vocabulary, D
width, T frames, R channels, P patches.
Source: MiMo-Audio, arXiv 2512.23808 §2.2, and its published code (XiaomiMiMo/MiMo-Audio).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sateen.checkpoint.hf import load_model
from sateen.data.tokenizer import Tokenizer
from sateen.engine.cache.kv_cache import CacheEntry
from sateen.engine.cache.sizing import sized_cache
from sateen.engine.intake import find_tokenizer
from sateen.engine.request import SamplingParams
from sateen.engine.sampling.sampler import distribution, draw, mask_padding
from sateen.errors import ConfigError, RequestError
from sateen.models.decoder import Decoder
from sateen.models.mimo_audio.layout import AudioLayout, join, patch_positions, text_positions
from sateen.models.mimo_audio.lm import AudioLM
from sateen.models.mimo_audio.prompts import Prompts
from sateen.nn.attention import Sequences

GREEDY = SamplingParams(temperature=0.0, max_tokens=256)
CODES = SamplingParams(temperature=0.9, top_p=0.95)  # of the patch decoder, in every published task
SPEECH = SamplingParams(temperature=0.6, max_tokens=512)  # of the text, while reading aloud


@dataclass(frozen=True)
class AudioOutput:
    """What one sequence got.

    Attributes:
        layout: its new positions, a stop token included.
        text_ids: their text, without `<|empty|>` and the stop token.
        text: the same as text, special tokens left out; empty where there is no tokenizer.
        codes_TR: the codes of their patches in order, undelayed; no frames where there are none.
        finish_reason: `stop` or `length`.
    """

    layout: AudioLayout
    text_ids: list[int]
    text: str
    codes_TR: Tensor
    finish_reason: Literal["stop", "length"]


@dataclass(eq=False)
class _Running:
    """A sequence in work: its cache rows, its random numbers and what it got so far."""

    prompt: AudioLayout
    entry: CacheEntry
    generator: torch.Generator
    room: int
    new: list[AudioLayout] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


class AudioEngine:
    """An `AudioLM` that generates.

    Attributes:
        model: the model.
        tokenizer: its tokenizer, or None; without one prompts are layouts and outputs have no text.
        max_model_len: most positions of a prompt and its answer together.
    """

    def __init__(
        self,
        model: Decoder | str | Path,
        *,
        tokenizer: Tokenizer | None = None,
        kv_cache_dtype: str = "auto",
        max_num_seqs: int = 4,
        max_model_len: int | None = None,
        kv_memory_bytes: int | None = None,
        seed: int = 0,
        text_chunk: int = 5,
        patch_chunk: int = 5,
    ):
        """Loads a model and allocates its cache.

        Args:
            model: an `AudioLM`, or what `load_model` takes.
            tokenizer: instead of the one in the model's directory.
            kv_cache_dtype: see `LLM`.
            max_num_seqs: sequences in work at once.
            max_model_len: the model's context when None.
            kv_memory_bytes: bound of the cache; when None what `max_num_seqs` full contexts need, at most a
                quarter of the free memory.
            seed: of the seeds of sequences without one.
            text_chunk, patch_chunk: the stream the model was trained on, for the shots of few-shot prompts.

        Raises:
            ConfigError: the model has no audio side, or a value is not accepted.
        """
        if max_num_seqs < 1:
            raise ConfigError(f"max_num_seqs is {max_num_seqs}; accepted: 1 or more")
        model = model if isinstance(model, Decoder) else load_model(model)
        if not isinstance(model, AudioLM):
            raise ConfigError(
                f"{model.config.model_type!r} reads no audio; give a model with audio channels, for example "
                "the preset mimo-audio-mini"
            )
        self.model = model.eval()
        self.tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model)
        self._chunks = text_chunk, patch_chunk
        config = model.config
        self.cache = sized_cache(
            model, kv_cache_dtype=kv_cache_dtype, max_num_seqs=max_num_seqs, max_model_len=max_model_len,
            kv_memory_bytes=kv_memory_bytes,
        )  # fmt: skip
        self.max_model_len = self.cache.max_model_len
        self._num_tokens = self.tokenizer.vocab_size if self.tokenizer is not None else config.vocab_size
        eos = config.raw.get("eos_token_id")
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self._end_ids = frozenset(ends) | frozenset(self.tokenizer.stop_ids if self.tokenizer else ())
        self._seeds = torch.Generator().manual_seed(seed)

    @property
    def prompts(self) -> Prompts:
        """The layouts of prompts in text.

        Raises:
            ConfigError: the model has no tokenizer, or that has no ChatML tokens.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "prompts in text need a tokenizer and this model has none; give AudioEngine one"
            )
        text_chunk, patch_chunk = self._chunks
        return Prompts(
            self.model.spec, self.tokenizer.encode, self.tokenizer.token_id, text_chunk=text_chunk,
            patch_chunk=patch_chunk,
        )  # fmt: skip

    def transcribe(self, codes_TR: Tensor, text: SamplingParams = GREEDY) -> str:
        """The words of a recording, asked for as the Instruct model is; `<|empty|>` is never chosen."""
        return self.generate([self.prompts.asr(codes_TR)], text, speaks=False)[0].text

    def speak(self, text: str, params: SamplingParams = SPEECH, audio: SamplingParams = CODES) -> AudioOutput:
        """A text read aloud, asked for as the Instruct model is; ends at `<|eostm|>`."""
        return self._until(self.model.spec.tokens.eostm, self.prompts.tts(text), params, audio)

    def continue_speech(
        self, codes_TR: Tensor, params: SamplingParams = SPEECH, audio: SamplingParams = CODES
    ) -> AudioOutput:
        """What follows a recording; ends at `<|eosp|>`. Needs no tokenizer."""
        spec = self.model.spec
        prompt = join([text_positions(spec, [spec.tokens.sosp]), patch_positions(spec, codes_TR)])
        return self._until(spec.tokens.eosp, prompt, params, audio)

    def _until(
        self, end: int, prompt: AudioLayout, text: SamplingParams, audio: SamplingParams
    ) -> AudioOutput:
        text = replace(text, stop_token_ids=(*text.stop_token_ids, end))
        return self.generate([prompt], text, audio)[0]

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[AudioLayout],
        text: SamplingParams = GREEDY,
        audio: SamplingParams = CODES,
        *,
        speaks: bool = True,
    ) -> list[AudioOutput]:
        """One output per prompt, in order.

        Args:
            prompts: what each sequence begins with.
            text: how text ids are chosen; its `max_tokens` counts positions of both kinds, its seed serves
                the codes too.
            audio: how codes are chosen: `temperature`, `top_k`, `top_p`, `min_p`.
            speaks: False never chooses `<|empty|>`, so that the answer is text (source: ours).

        Raises:
            RequestError: an empty or too long prompt, or a setting that is for text alone.
        """
        if text.stop or text.logprobs is not None:
            raise RequestError("stop strings and logprobs are for text; use stop_token_ids here")
        for prompt in prompts:
            if not 0 < len(prompt) < self.max_model_len:
                raise RequestError(
                    f"a prompt has {len(prompt)} positions; accepted: 1 to {self.max_model_len - 1}"
                )
        outputs: list[AudioOutput] = []
        while len(outputs) < len(prompts):
            group: list[_Running] = []
            try:
                for prompt in prompts[len(outputs) :]:
                    opened = self._open(prompt, text)
                    if opened is None:
                        break
                    group.append(opened)
                self._run(group, text, audio, speaks)
            finally:
                for running in group:
                    self.cache.free(running.entry)
            outputs += [self._output(running) for running in group]
        return outputs

    def _open(self, prompt: AudioLayout, text: SamplingParams) -> _Running | None:
        """A sequence with cache rows for its whole life, or None while there are too few."""
        room = min(text.max_tokens, self.max_model_len - len(prompt))
        if not self.cache.num_free_slots:
            return None
        entry = self.cache.open(len(prompt))
        if not self.cache.reserve(entry, len(prompt) + room):
            self.cache.free(entry)
            return None
        seed = int(torch.randint(2**62, (), generator=self._seeds)) if text.seed is None else text.seed
        return _Running(prompt, entry, torch.Generator().manual_seed(seed), room)

    def _run(self, group: list[_Running], text: SamplingParams, audio: SamplingParams, speaks: bool) -> None:
        """Steps until every sequence of the group is finished."""
        spec, active = self.model.spec, group
        stops = frozenset(text.stop_token_ids) | (frozenset() if text.ignore_eos else self._end_ids)
        empty_GR = torch.tensor(spec.empty_ids).expand(spec.group_size, -1)
        hidden_MD = self._forward(active, [running.prompt for running in active])
        while active:
            logits_MV = mask_padding(self.model.logits(hidden_MD), self._num_tokens)
            generators = [running.generator for running in active]
            ids = sample(logits_MV, text, generators, [] if speaks else [spec.tokens.empty]).tolist()
            rows = [i for i, token in enumerate(ids) if token == spec.tokens.empty]
            codes = dict(zip(rows, self._patches(hidden_MD, rows, generators, audio), strict=True))
            alive = []
            for i, running in enumerate(active):
                one = text_positions(spec, [ids[i]])
                running.new.append(replace(one, codes_LGR=codes.get(i, empty_GR)[None]))
                if ids[i] in stops:
                    running.finish_reason = "stop"
                elif len(running.new) == running.room:
                    running.finish_reason = "length"
                else:
                    alive.append(running)
            active = alive
            if active:
                hidden_MD = self._forward(active, [running.new[-1] for running in active])

    def _forward(self, active: list[_Running], new: list[AudioLayout]) -> Tensor:
        """The normed hidden state [M, D] of the last new position of each sequence."""
        device = self.model.device
        counts = [len(layout) for layout in new]
        starts = [running.entry.length for running in active]
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)])
        ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        view = self.cache.forward([running.entry for running in active], counts)
        whole = join(new)
        hidden_LD = self.model.hidden(
            whole.text_ids_L.to(device),
            whole.codes_LGR.to(device),
            Sequences(ends.to(device), positions.to(device)),
            view,
        )
        return hidden_LD[(ends[1:] - 1).to(device)]

    def _patches(
        self, hidden_MD: Tensor, rows: list[int], generators: list[torch.Generator], audio: SamplingParams
    ) -> list[Tensor]:
        """The codes [G, R] behind the hidden states of these rows."""
        if not rows:
            return []
        theirs = [generators[i] for i in rows]

        def choose(channel: int, logits_PV: Tensor) -> Tensor:
            return sample(logits_PV, audio, theirs, [self.model.spec.empty_ids[channel]])

        return list(self.model.write_patches(hidden_MD[rows], choose).cpu())

    def _output(self, running: _Running) -> AudioOutput:
        assert running.finish_reason is not None
        spec, layout = self.model.spec, join(running.new)
        ids: list[int] = layout.text_ids_L.tolist()
        said = ids[:-1] if running.finish_reason == "stop" else ids
        text_ids = [token for token in said if token != spec.tokens.empty]
        text = self.tokenizer.decode(text_ids, skip_special=True) if self.tokenizer else ""
        return AudioOutput(layout, text_ids, text, layout.audio_codes(spec), running.finish_reason)


def sample(
    logits_MV: Tensor, params: SamplingParams, generators: Sequence[torch.Generator], forbidden: Sequence[int]
) -> Tensor:
    """One id [M] per row; forbidden ids are removed behind the filters, as the published sampler does.

    A row whose filters leave nothing but forbidden ids is filtered again without them (source: ours).
    """
    ids = torch.tensor(list(forbidden), dtype=torch.int64, device=logits_MV.device)
    allowed_MV = logits_MV.index_fill(-1, ids, -torch.inf)
    if params.is_greedy:
        return allowed_MV.argmax(-1)
    probs_MV = distribution(logits_MV, [params] * len(logits_MV)).index_fill(-1, ids, 0.0)
    lost = (probs_MV.sum(-1) == 0).nonzero()[:, 0]
    if len(lost):
        probs_MV[lost] = distribution(allowed_MV[lost], [params] * len(lost))
    uniforms_M = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    return draw(probs_MV, uniforms_M.to(logits_MV.device))
