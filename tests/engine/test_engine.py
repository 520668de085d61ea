"""`LLM` as users call it: batches, limits, stops, streams, scores, new weights, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM, StreamChunk, WeightUpdate
from sateen.engine.request import SamplingParams
from sateen.errors import CheckpointError, ConfigError, RequestError

FLASH, MIMO = "mimo-v2-flash-tiny", "mimo-7b-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    text = "the quick brown fox jumps over the lazy dog and the cat sat on the mat "
    return Tokenizer.train([text] * 30, 300)


@pytest.fixture(scope="module")
def talker(random_model, tokenizer):
    """A model with a tokenizer of 300 tokens for its 320 rows."""
    return LLM(
        random_model(FLASH, vocab_size=320),
        tokenizer=tokenizer,
        max_model_len=256,
        max_num_seqs=4,
    )


@pytest.mark.parametrize("name", ["flash", "mimo"])
def test_batched_equals_alone(name, request, make_prompts, tokens_of, greedy, greedy_by_hand):
    model = request.getfixturevalue(name)
    prompts = make_prompts([63, 64, 65, 129, 1, 20])
    sampled = [SamplingParams(temperature=1.0, max_tokens=12, seed=i, ignore_eos=True) for i in range(6)]
    for params in ([greedy(12)] * 6, sampled):
        alone = [tokens_of(LLM(model), [p], [one])[0] for p, one in zip(prompts, params, strict=True)]
        assert tokens_of(LLM(model, max_num_seqs=6), prompts, params) == alone
        assert tokens_of(LLM(model, max_num_seqs=2, max_num_batched_tokens=17), prompts, params) == alone
        if params[0].is_greedy:
            assert alone[2] == greedy_by_hand(model, prompts[2], 12)
        else:
            assert len({tuple(tokens) for tokens in alone}) == 6


@pytest.mark.parametrize("draft", ["none", "mtp"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preemption_gives_the_same_tokens(draft, temperature, drafting_model, make_prompts, tokens_of):
    model = drafting_model(FLASH, heads=3, noise=0.1, strength=0.05)
    prompts = make_prompts([50, 40, 3, 100])
    params = [
        SamplingParams(temperature=temperature, max_tokens=60, seed=i, ignore_eos=True) for i in range(4)
    ]
    roomy = LLM(model, draft=draft, max_num_seqs=4)
    tight = LLM(
        model,
        draft=draft,
        max_num_seqs=4,
        num_pages=4,
        max_model_len=192,
        max_num_batched_tokens=64,
    )
    assert tokens_of(tight, prompts, params) == tokens_of(roomy, prompts, params)
    assert tight.stats()["preemptions"] > 0
    assert roomy.stats()["preemptions"] == 0
    assert tight.cache.num_free_pages == 4


def test_the_context_ends_a_generation(flash, make_prompts, greedy, tokens_of):
    llm = LLM(flash, max_model_len=32, max_num_seqs=2)
    outputs = llm.generate(make_prompts([31, 20]), greedy(100))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 12]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length", "length"]
    roomy = tokens_of(LLM(flash), make_prompts([31, 20]), greedy(12))
    assert outputs[1].outputs[0].token_ids == roomy[1]


def test_stop_tokens(flash, make_prompts, greedy, tokens_of):
    (prompt,) = make_prompts([10])
    (tokens,) = tokens_of(LLM(flash), [prompt], greedy(20))
    wanted = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, stop_token_ids=[tokens[wanted]])
    (output,) = LLM(flash).generate([prompt], params)
    completion = output.outputs[0]
    assert completion.token_ids == tokens[: wanted + 1]
    assert (completion.finish_reason, completion.stop_reason) == (
        "stop",
        tokens[wanted],
    )


def test_the_models_own_end_token_stops_unless_ignored(random_model, make_prompts, greedy, tokens_of):
    (prompt,) = make_prompts([10])
    (tokens,) = tokens_of(LLM(random_model(FLASH)), [prompt], greedy(20))
    model = random_model(FLASH, eos_token_id=[tokens[4], 511])
    end = tokens.index(tokens[4]) + 1
    (output,) = LLM(model).generate([prompt], SamplingParams(temperature=0, max_tokens=20))
    assert output.outputs[0].token_ids == tokens[:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (
        "stop",
        None,
    )
    assert tokens_of(LLM(model), [prompt], greedy(20)) == [tokens]


@pytest.fixture(scope="module")
def alphabet(drafting_model, tokenizer):
    """After each letter it says the next one, and its heads know."""
    letters = [tokenizer.token_id(c) for c in "abcdefghijklmnopqrstuvwxyz"]
    successors = dict(zip(letters, [*letters[1:], letters[0]], strict=True))
    model = drafting_model(FLASH, strength=0.0, vocab_size=320, successors=successors)
    return LLM(model, tokenizer=tokenizer, max_model_len=256, max_num_seqs=4)


@pytest.mark.parametrize("stop", ["m", "kl", "hijklm", "qrst"])
def test_stop_strings_cut_text_and_tokens(alphabet, stop):
    """Three drafts are right each time, so most of these end inside a verified chunk."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=["abba", stop])
    (output,) = alphabet.generate("a", params)
    completion = output.outputs[0]
    following = "bcdefghijklmnopqrstuvwxyz"
    assert completion.text == following[: following.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) == following.index(stop) + len(stop)
    assert completion.draft.emitted + 1 == len(completion.token_ids)
    assert completion.draft.accepted == completion.draft.drafted
    streamed = list(alphabet.generate_stream("a", params))
    assert "".join(news.text for news in streamed) == completion.text


def test_text_without_a_stop_runs_to_the_length(alphabet):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    (output,) = alphabet.generate("x", params)
    assert output.outputs[0].text == "yzabcdefghijklmnopqrstuvwxyzab"
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == (
        "length",
        None,
    )


def test_padding_rows_are_never_sampled(talker):
    params = SamplingParams(temperature=50.0, max_tokens=100, ignore_eos=True, detokenize=False)
    outputs = talker.generate([[5]] * 4, params)
    tokens = [token for output in outputs for token in output.outputs[0].token_ids]
    assert max(tokens) < 300
    assert len(set(tokens)) > 100
    assert outputs[0].outputs[0].text == ""


def test_streams_add_up_to_the_outputs(talker):
    prompts = ["the quick", "the cat sat", [9, 8, 7]]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop=["\x00\x01\x02never"])
    outputs = talker.generate(prompts, params)
    texts, tokens, ends = [""] * 3, [[], [], []], [0] * 3
    for news in talker.generate_stream(prompts, params):
        assert isinstance(news, StreamChunk)
        texts[news.index] += news.text
        tokens[news.index] += news.token_ids
        ends[news.index] += news.finished
    assert texts == [o.outputs[0].text for o in outputs]
    assert tokens == [o.outputs[0].token_ids for o in outputs]
    assert ends == [1, 1, 1]
    assert outputs[0].prompt == "the quick"
    assert outputs[2].prompt is None
    assert outputs[2].prompt_token_ids == [9, 8, 7]


def test_leaving_a_stream_early_frees_its_rows(talker, greedy):
    free = talker.cache.num_free_pages, talker.cache.num_free_slots
    stream = talker.generate_stream(["the quick"] * 3, greedy(50))
    next(stream)
    assert talker.cache.num_free_slots < free[1]
    stream.close()
    assert (talker.cache.num_free_pages, talker.cache.num_free_slots) == free
    assert not talker.has_work


def test_raw_logprobs_are_the_plain_forwards(flash, make_prompts):
    (prompt,) = make_prompts([20])
    params = SamplingParams(temperature=0.7, top_k=5, seed=3, max_tokens=15, logprobs=2, ignore_eos=True)
    (output,) = LLM(flash).generate([prompt], params)
    completion = output.outputs[0]
    with torch.inference_mode():
        logits = flash(torch.tensor([[*prompt, *completion.token_ids]])).logits[0, 19:-1]
    reference = logits.log_softmax(-1)
    for row, entry, token in zip(reference, completion.logprobs, completion.token_ids, strict=True):
        assert next(iter(entry)) == token
        assert 2 <= len(entry) <= 3
        for key, value in entry.items():
            assert value.logprob == pytest.approx(float(row[key]), abs=1e-5)
            assert value.rank == int((row > row[key]).sum()) + 1
        assert {1, 2} <= {value.rank for value in entry.values()}
    assert completion.token_logprobs == [
        e[t].logprob for e, t in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    (plain,) = LLM(flash).generate([prompt], SamplingParams(max_tokens=2))
    assert plain.outputs[0].logprobs is None


def test_score_is_the_log_softmax_of_the_plain_forward(flash, make_prompts, monkeypatch):
    monkeypatch.setattr("sateen.engine.scoring.SCORE_NUMBERS", 512 * 10)  # ten rows of logits at once
    sequences = make_prompts([1, 2, 70, 33, 129, 5])
    scores = LLM(flash, max_num_batched_tokens=64).score(sequences)
    for ids, got in zip(sequences, scores, strict=True):
        with torch.inference_mode():
            logprobs = flash(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(logprobs[i, ids[i + 1]]) for i in range(len(ids) - 1)]
        assert got == pytest.approx(expected, abs=1e-5)


def test_score_agrees_with_the_logprobs_of_generation(mimo, make_prompts):
    llm = LLM(mimo)
    (output,) = llm.generate(make_prompts([12]), SamplingParams(max_tokens=20, seed=1, logprobs=0))
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    assert llm.score([ids])[0][11:] == pytest.approx(output.outputs[0].token_logprobs, abs=1e-5)


def test_unseeded_requests_differ_and_engines_repeat(flash, tokens_of):
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    first = tokens_of(LLM(flash), [[1, 2, 3]] * 3, params)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert tokens_of(LLM(flash), [[1, 2, 3]] * 3, params) == first
    assert tokens_of(LLM(flash, seed=1), [[1, 2, 3]] * 3, params) != first


def test_new_weights_serve_from_the_next_token_on(
    random_model, make_prompts, greedy, tokens_of, greedy_by_hand
):
    old, new = random_model(FLASH, seed=0), random_model(FLASH, seed=1)
    (prompt,) = make_prompts([30])
    llm = LLM(random_model(FLASH, seed=0))
    request = llm.add(prompt, greedy(20))
    while request.num_generated < 8:
        llm.step()
    before = request.num_generated
    llm.update_weights(WeightUpdate(3, new.state_dict()))
    while llm.has_work:
        llm.step()
    output = request.output()
    tokens = output.outputs[0].token_ids
    assert tokens[:before] == greedy_by_hand(old, prompt, before)
    # The rest is what the new weights say after the whole sequence so far, old tokens included.
    assert tokens[before:] == greedy_by_hand(new, prompt + tokens[:before], 20 - before)
    assert output.weights_version == 0
    (later,) = llm.generate([prompt], greedy(5))
    assert later.weights_version == 3
    assert later.outputs[0].token_ids == greedy_by_hand(new, prompt, 5)


def test_a_wrong_update_changes_nothing(random_model, make_prompts, greedy, tokens_of):
    llm = LLM(random_model(FLASH))
    prompts = make_prompts([5])
    before = tokens_of(llm, prompts, greedy(5))
    weights = dict(random_model(FLASH, seed=1).state_dict())
    del weights["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing \['model.norm.weight'\]"):
        llm.update_weights(WeightUpdate(1, weights))
    weights["model.norm.weight"] = torch.zeros(3)
    with pytest.raises(
        CheckpointError,
        match=r"model.norm.weight is \(64,\) here, \(3,\) in the update",
    ):
        llm.update_weights(WeightUpdate(1, weights))
    assert llm.weights_version == 0
    assert tokens_of(llm, prompts, greedy(5)) == before


def test_stats_and_bytes(flash, make_prompts, greedy):
    llm = LLM(flash, max_num_seqs=2, max_model_len=128)
    llm.generate(make_prompts([5, 7]), greedy(10))
    stats = llm.stats()
    assert (stats["prompt_tokens"], stats["generated_tokens"]) == (12, 20)
    assert stats["draft"]["emitted"] + 2 <= 20
    assert 1.0 <= stats["acceptance_length"] <= 4.0
    # fp32; 2 full layers of 1 head with 24 + 16 channels and 4 pages of 64 rows; 4 sliding layers of 2 heads
    # with 2 rings of 16 + 3 rows; 3 heads of the same with 16 + 6 rows.
    paged, ring, head = 4 * 64 * 40 * 4, 2 * 19 * 80 * 4, 2 * 22 * 80 * 4
    assert stats["allocated_bytes"] == {"paged": 2 * paged, "ring": 4 * ring + 3 * head}
    layers = llm.allocated_layers()
    assert [layer["bytes"] for layer in layers] == [
        paged,
        *[ring] * 4,
        paged,
        *[head] * 3,
    ]
    assert [layer["layer_kind"] for layer in layers] == [
        "full_attention", *["sliding_attention"] * 4, "full_attention", *["sliding_attention"] * 3,
    ]  # fmt: skip
    assert llm.kv_bytes(65) == {"paged": paged, "ring": (4 * ring + 3 * head) // 2}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_smaller_cache_dtypes_halve_the_bytes_and_stay_close(dtype, flash, make_prompts):
    prompts = make_prompts([40])
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=0)
    full, half = (
        LLM(flash, max_model_len=128),
        LLM(flash, max_model_len=128, kv_cache_dtype=dtype),
    )
    (a,), (b,) = full.generate(prompts, params), half.generate(prompts, params)
    assert half.kv_bytes(128) == {kind: size // 2 for kind, size in full.kv_bytes(128).items()}
    difference = abs(a.outputs[0].token_logprobs[0] - b.outputs[0].token_logprobs[0])
    assert 0 < difference < 0.05


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "the prompt is empty; give at least one token"),
        ("", {}, "the prompt is empty; give at least one token"),
        ([1, 320], {}, "token id 320 is out of the vocabulary; accepted: 0 to 319"),
        ([-1], {}, "token id -1 is out of the vocabulary; accepted: 0 to 319"),
        ([1, "a"], {}, "a prompt is a text or a list of token ids; got [1, 'a']"),
        (
            [1] * 256,
            {},
            "the prompt has 256 tokens but the context holds 256, one of them generated; "
            + "shorten the prompt or raise max_model_len",
        ),
    ],
)
def test_prompts_are_refused_with_one_sentence(talker, prompt, params, message):
    with pytest.raises(RequestError) as error:
        talker.generate([[1, 2], prompt], SamplingParams(**params))
    assert str(error.value) == message
    assert not talker.has_work


def test_a_model_without_tokenizer_refuses_text(flash):
    llm = LLM(flash, max_model_len=64)
    with pytest.raises(
        RequestError,
        match="this model has no tokenizer, so it takes token ids only; got a text",
    ):
        llm.generate("hello")
    with pytest.raises(RequestError, match="stop strings need a tokenizer and this model has none"):
        llm.generate([1, 2], SamplingParams(stop="a"))
    with pytest.raises(RequestError, match="2 prompts came with 1 sampling params"):
        llm.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(
        RequestError,
        match="a sequence of 3000 tokens is beyond the model's context of 2048",
    ):
        llm.score([[1] * 3000])
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.score([[1, 2], []])
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"draft": "eagle"}, ConfigError, "unknown draft 'eagle'"),
        ({"attention": "flash"}, ConfigError, "unknown attention 'flash'"),
        ({"weights": "int5"}, ConfigError, "unknown weights 'int5'"),
        ({"kv_cache_dtype": "fp8"}, ConfigError, "unknown kv_cache_dtype 'fp8'"),
        (
            {"max_model_len": 4096},
            ConfigError,
            "max_model_len 4096 is not accepted; the model's context is 2048",
        ),
        ({"max_num_seqs": 0}, ConfigError, "max_num_seqs is 0"),
        (
            {"max_num_batched_tokens": 31},
            ConfigError,
            "8 sequences with 3 drafts each need 32",
        ),
        (
            {"num_pages": 3, "max_model_len": 256},
            ConfigError,
            "too few for one sequence of 256",
        ),
        ({"num_pages": 3, "kv_memory_bytes": 9}, ConfigError, "give one"),
        ({"kv_memory_bytes": 9}, ConfigError, "holds 0 pages of 64 tokens"),
        ({"dtype": "float32"}, ConfigError, "this model is loaded"),
    ],
)
def test_engine_settings_are_refused(flash, settings, error, message):
    with pytest.raises(error, match=message):
        LLM(flash, **settings)


def test_drafting_needs_heads(random_model, make_prompts, greedy):
    model = random_model(MIMO, heads=0)
    with pytest.raises(ConfigError, match="draft 'mtp' needs MTP heads and this model has none"):
        LLM(model, draft="mtp")
    llm = LLM(model)
    assert llm.num_draft == 0
    (output,) = llm.generate(make_prompts([4]), greedy(3))
    assert output.outputs[0].draft.rounds == 0


def test_a_tokenizer_that_is_too_large_is_refused(random_model, tokenizer):
    with pytest.raises(
        ConfigError,
        match="the tokenizer has 300 tokens but the model's vocab_size is 256",
    ):
        LLM(random_model(FLASH, vocab_size=256), tokenizer=tokenizer)


def test_the_pool_bounds_the_context_when_none_is_asked_for(flash):
    llm = LLM(flash, num_pages=5)
    assert llm.max_model_len == 320
    per_page = 64 * 2 * 40 * 4
    assert LLM(flash, kv_memory_bytes=7 * per_page + 5).cache.num_pages == 7
    assert LLM(flash, max_num_seqs=2, max_model_len=100).cache.num_pages == 4


def test_a_directory_brings_weights_and_tokenizer(tmp_path, random_model, tokenizer, greedy):
    model = random_model(FLASH, vocab_size=320)
    model.save(tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    loaded = LLM(tmp_path / "m", max_model_len=64)
    given = LLM(model, tokenizer=tokenizer, max_model_len=64)
    a, b = (llm.generate("the cat", greedy(10))[0].outputs[0] for llm in (loaded, given))
    assert a.text == b.text
    assert a.token_ids == b.token_ids
