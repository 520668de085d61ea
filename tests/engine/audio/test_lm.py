"""Generation of text and codes: cached against whole forwards, stops, seeds, ids that must not appear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sateen.data.tokenizer import CHATML_TOKENS, Tokenizer
from sateen.engine.audio.lm import CODES, AudioEngine, sample
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import ConfigError, RequestError
from sateen.models.base import ModelConfig
from sateen.models.mimo_audio import layout as lay
from sateen.models.mimo_audio.lm import AudioLM, LossWeights
from sateen.models.mimo_audio_lm import TOKEN_STRINGS, AudioTokens
from sateen.models.registry import preset
from sateen.nn.attention import Sequences

TINY = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 128, "local_dim": 16,
    "local_attn_heads": 4, "local_ffn_dim": 20, "local_layers": 2, "input_local_layers": 1,
    "input_local_dim": 16, "audio_channels": 3, "speech_vocab_size": "10-8-6", "speech_zeroemb_idx": "9-7-5",
    "delay_pattern": "0-1-2", "initializer_range": 0.3,
}  # fmt: skip
EMPTY = preset("mimo-audio-mini")["audio_token_ids"]["empty"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=16)
WARM = SamplingParams(temperature=1.0, max_tokens=12, seed=5)


class Eager(AudioLM):
    """An `AudioLM` that likes some text ids better: `bias` is added to their logits."""

    def __init__(self, config: ModelConfig, bias: dict[int, float] | None = None):
        super().__init__(config)
        self.bias = bias or {}

    def logits(self, head_input_TD: Tensor) -> Tensor:
        out = super().logits(head_input_TD)
        for token, amount in self.bias.items():
            out[:, token] += amount
        return out


def make(bias: dict[int, float] | None = None) -> Eager:
    model = Eager(ModelConfig.from_hf(preset("mimo-audio-mini") | TINY), bias)
    model.init_weights(0)
    return model


def codes_of(model: AudioLM, frames: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randint(n - 1, (frames,), generator=generator) for n in model.spec.vocab_sizes], 1
    )


def prompt_of(model: AudioLM, seed: int = 0) -> lay.AudioLayout:
    spec = model.spec
    return lay.join(
        [
            lay.text_positions(spec, [20 + seed, 21]),
            lay.audio_input(spec, codes_of(model, 9 + 4 * seed, seed)),
            lay.text_positions(spec, [22]),
        ]
    )


@pytest.fixture(scope="module")
def talkative() -> Eager:
    """A model that chooses audio about half of the time."""
    return make({EMPTY: 7.0})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["say that again"] * 4, 275, (*CHATML_TOKENS, *TOKEN_STRINGS))


def by_hand(model: AudioLM, prompt: lay.AudioLayout, steps: int) -> lay.AudioLayout:
    """Greedy positions from whole forwards and teacher-forced patches, without caches."""
    spec, whole = model.spec, prompt
    with torch.inference_mode():
        for _ in range(steps):
            h = model.hidden(whole.text_ids_L, whole.codes_LGR, Sequences.of_lengths([len(whole)]))[-1:]
            token = int(model.logits(h).argmax())
            new = lay.text_positions(spec, [token])
            if token == spec.tokens.empty:
                codes = torch.zeros(1, spec.group_size, spec.channels, dtype=torch.int64)
                for step in range(spec.num_steps):
                    logits = model.patch_logits(h, codes)
                    for r, delay in enumerate(spec.delays):
                        if 0 <= step - delay < spec.group_size:
                            codes[0, step - delay, r] = logits[r][0, step - delay, :-1].argmax()
                new = replace(new, codes_LGR=codes)
            whole = lay.join([whole, new])
    return lay.part(whole, len(prompt), len(whole))


def test_cached_generation_equals_whole_forwards() -> None:
    audio, talkative = SamplingParams(temperature=0.0), make({EMPTY: 4.0})
    prompt = prompt_of(talkative)
    want = by_hand(talkative, prompt, 16)
    got = AudioEngine(talkative).generate([prompt], GREEDY, audio)[0]
    is_audio = want.text_ids_L == talkative.spec.tokens.empty
    assert 0 < int(is_audio.sum()) < 16
    assert torch.equal(got.layout.text_ids_L, want.text_ids_L)
    assert torch.equal(got.layout.codes_LGR, want.codes_LGR)
    assert torch.equal(got.codes_TR, want.codes_LGR[is_audio].flatten(0, 1))
    assert got.finish_reason == "length"


def test_cached_hidden_states_equal_the_whole_forward(talkative: Eager) -> None:
    """One position at a time and in uneven chunks, against all at once."""
    model, layout = talkative, lay.join([prompt_of(talkative, seed) for seed in range(3)])
    seq = Sequences.of_lengths([len(layout)])
    with torch.inference_mode():
        want = model.hidden(layout.text_ids_L, layout.codes_LGR, seq)
        for sizes in ([1] * len(layout), [7, 1, 5, len(layout) - 13]):
            engine = AudioEngine(model)
            entry = engine.cache.open(len(layout))
            assert engine.cache.reserve(entry, len(layout))
            at, parts = 0, []
            for size in sizes:
                new = lay.part(layout, at, at + size)
                seq = Sequences(torch.tensor([0, size], dtype=torch.int32), torch.arange(at, at + size))
                parts.append(
                    model.hidden(new.text_ids_L, new.codes_LGR, seq, engine.cache.forward([entry], [size]))
                )
                at += size
            assert float((torch.cat(parts) - want).abs().max()) < 1e-5


def test_a_batch_equals_single_sequences_and_seeds_decide(talkative: Eager) -> None:
    prompts = [prompt_of(talkative, seed) for seed in range(4)]
    engine = AudioEngine(talkative, max_num_seqs=3)
    together = engine.generate(prompts, WARM)
    alone = [engine.generate([prompt], WARM)[0] for prompt in prompts]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a.layout.text_ids_L, b.layout.text_ids_L)
        assert torch.equal(a.layout.codes_LGR, b.layout.codes_LGR)
    other = engine.generate(prompts, replace(WARM, seed=6))
    assert any(
        not torch.equal(a.layout.text_ids_L, b.layout.text_ids_L)
        for a, b in zip(together, other, strict=True)
    )
    assert engine.cache.num_free_slots == 3
    assert engine.cache.num_free_pages == engine.cache.num_pages


def test_empty_ids_are_never_written(talkative: Eager) -> None:
    """Even by heads that prefer them, greedy or filtered to a single code."""
    model = make(talkative.bias)
    with torch.no_grad():
        model.hidden_states_downcast.weight.zero_()
        model.local_transformer.norm.weight.fill_(1.0)
        for head, empty in zip(model.local_transformer_lm_heads, model.spec.empty_ids, strict=True):
            head.weight[empty] = 100 * head.weight[:empty].mean(0)
    for audio in (SamplingParams(temperature=0.0), CODES, SamplingParams(temperature=1.0, top_k=1)):
        output = AudioEngine(model).generate([prompt_of(model)], replace(WARM, max_tokens=40), audio)[0]
        assert len(output.codes_TR) > 20
        for r, empty in enumerate(model.spec.empty_ids):
            assert 0 <= int(output.codes_TR[:, r].min()) <= int(output.codes_TR[:, r].max()) < empty


def test_text_positions_hold_empty_codes_and_audio_positions_none(talkative: Eager) -> None:
    output = AudioEngine(talkative).generate([prompt_of(talkative)], replace(WARM, max_tokens=40))[0]
    is_empty = (output.layout.codes_LGR == torch.tensor(talkative.spec.empty_ids)).all(-1).all(-1)
    assert torch.equal(is_empty, output.layout.text_ids_L != talkative.spec.tokens.empty)
    back = lay.AudioLayout.from_matrix(output.layout.matrix(talkative.spec), talkative.spec)
    assert torch.equal(back.audio_codes(talkative.spec), output.codes_TR)


def test_the_sampler_filters_before_it_forbids() -> None:
    """p = (0.5, 0.3, 0.15, 0.05) and id 0 forbidden: top-k 2 leaves id 1, no filter leaves 0.6, 0.3, 0.1."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    filtered = sample(logits, SamplingParams(top_k=2), generators, [0])
    assert filtered.unique().tolist() == [1]
    only = sample(logits, SamplingParams(top_k=1), generators, [0])
    assert sorted(only.unique().tolist()) == [1]  # nothing else is left: filtered again without it
    free = sample(logits, SamplingParams(), generators, [0])
    shares = torch.bincount(free, minlength=4) / 4000
    # 4000 draws: a standard deviation of at most 0.008.
    assert shares.tolist() == pytest.approx([0.0, 0.6, 0.3, 0.1], abs=0.035)
    assert sample(logits[:1], SamplingParams(temperature=0.0), generators[:1], [0]).tolist() == [1]


def test_it_stops_where_it_should() -> None:
    spec = make().spec
    stopping = make({spec.tokens.eostm: 50.0})
    engine = AudioEngine(stopping)
    params = replace(WARM, stop_token_ids=(spec.tokens.eostm,))
    output = engine.generate([prompt_of(stopping)], params)[0]
    assert (output.finish_reason, len(output.layout), output.text_ids) == ("stop", 1, [])
    ended = make({spec.tokens.eosp: 50.0})
    assert AudioEngine(ended).continue_speech(codes_of(ended, 9), WARM).finish_reason == "stop"
    assert AudioEngine(ended).generate([prompt_of(ended)], WARM)[0].finish_reason == "length"


def test_speech_goes_on(talkative: Eager) -> None:
    only = make({EMPTY: 100.0})
    output = AudioEngine(only).continue_speech(codes_of(only, 9), replace(WARM, max_tokens=7))
    assert output.codes_TR.shape == (28, 3)
    assert (output.text_ids, output.text, output.finish_reason) == ([], "", "length")


def test_transcripts_are_text_and_speech_is_asked_for_in_text(tokenizer: Tokenizer) -> None:
    model = make({EMPTY: 100.0})
    assert AudioTokens.of(tokenizer.token_id) == model.spec.tokens
    engine = AudioEngine(model, tokenizer=tokenizer)
    text = engine.transcribe(codes_of(model, 9), replace(GREEDY, max_tokens=6))
    assert isinstance(text, str)
    spoken = engine.speak("say that", replace(WARM, max_tokens=5))
    assert spoken.codes_TR.shape == (20, 3)  # nothing but audio, which transcribe never chose
    layout = engine.generate([engine.prompts.asr(codes_of(model, 9))], GREEDY, speaks=False)[0].layout
    assert not (layout.text_ids_L == model.spec.tokens.empty).any()


def test_what_was_learnt_is_said() -> None:
    """Two prompts with two spoken answers: the loss and the engine agree on what comes from what."""
    model = make().train()
    spec = model.spec
    prompts, answers = [], []
    for k in range(2):
        prompts.append(prompt_of(model, k))
        said = lay.stream(
            spec, range(30 + 9 * k, 36 + 9 * k), codes_of(model, 12, 7 + k), text_chunk=3, patch_chunk=1
        )
        answers.append(said.learnt(spec))
    batch = lay.pack(spec, [lay.join(pair) for pair in zip(prompts, answers, strict=True)])
    weights = LossWeights(channels=(12.0, 8.0, 6.0), empty_text=1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(45):
        loss = model.loss_parts(batch, weights)["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    params = replace(GREEDY, stop_token_ids=(spec.tokens.eostm,))
    outputs = AudioEngine(model).generate(prompts, params, SamplingParams(temperature=0.0))
    for output, answer in zip(outputs, answers, strict=True):
        assert output.finish_reason == "stop"
        assert torch.equal(output.layout.text_ids_L, answer.text_ids_L)
        assert torch.equal(output.layout.codes_LGR, answer.codes_LGR)


def test_text_alone_runs_in_the_text_engine(talkative: Eager) -> None:
    model = make()
    prompt = [20, 21, 22, 23]
    tokens = LLM(model).generate([prompt], GREEDY)[0].outputs[0].token_ids
    ours = AudioEngine(model).generate([lay.text_positions(model.spec, prompt)], GREEDY, speaks=False)[0]
    assert ours.layout.text_ids_L.tolist() == tokens


def test_what_cannot_be_served_is_refused(talkative: Eager, random_model: Callable[..., object]) -> None:
    engine = AudioEngine(talkative)
    with pytest.raises(RequestError, match="1 to 127"):
        engine.generate([lay.text_positions(talkative.spec, range(20, 20 + 128))])
    with pytest.raises(RequestError, match="1 to 127"):
        engine.generate([lay.text_positions(talkative.spec, [])])
    with pytest.raises(RequestError, match="stop strings"):
        engine.generate([prompt_of(talkative)], SamplingParams(stop="x"))
    with pytest.raises(ConfigError, match="tokenizer"):
        engine.speak("hi")
    with pytest.raises(ConfigError, match="reads no audio"):
        AudioEngine(random_model("mimo-7b-tiny"))  # type: ignore[arg-type]
