"""Text completions through OpenAI's own client: streams, whole answers and the engine say the same."""

from __future__ import annotations

import json

import httpx2 as httpx
import openai
import pytest

from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams

GREEDY = {"model": "tiny", "temperature": 0}
EXTRA = ("top_k", "min_p", "repetition_penalty", "stop_token_ids", "regex")  # not OpenAI's words


class _Nothing:
    token_logprobs = ()


@pytest.fixture(scope="module")
def alphabet(running, story):
    with running(story()) as server:
        yield server


@pytest.fixture(scope="module")
def noisy(running, noise):
    with running(noise) as server:
        yield server


@pytest.fixture(scope="module")
def alone(noise):
    """The same model, for the engine's own answers."""
    return LLM(noise.model, tokenizer=noise.tokenizer, max_num_seqs=2, draft="mtp")


def _stream(client, **settings):
    """The chunks of a text stream, and its texts joined per choice."""
    chunks = list(client.completions.create(stream=True, **settings))
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return chunks, texts


def test_models(alphabet):
    (model,) = alphabet.client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "sateen")
    assert alphabet.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'tiny'"):
        alphabet.client.models.retrieve("other")


def test_a_text_is_continued(alphabet):
    done = alphabet.client.completions.create(**GREEDY, prompt="p", max_tokens=6)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("qrstuv", "length")
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (1, 6, 7)
    assert done.id.startswith("cmpl-")
    assert done.object == "text_completion"


@pytest.mark.parametrize("prompt", ["The quick", [5, 40, 99], "日本"])
def test_stream_equals_whole_equals_engine(noisy, alone, prompt):
    settings = {"prompt": prompt, "max_tokens": 24}
    chunks, texts = _stream(noisy.client, **GREEDY, **settings)
    whole = noisy.client.completions.create(**GREEDY, **settings)
    (output,) = alone.generate(prompt, SamplingParams(temperature=0, max_tokens=24))
    assert texts == {0: whole.choices[0].text} == {0: output.outputs[0].text}
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.completion_tokens == len(output.outputs[0].token_ids)


SETTINGS = {
    "temperature": {"temperature": 0.7, "seed": 3},
    "top_p": {"top_p": 0.3, "seed": 3},
    "top_k": {"top_k": 4, "seed": 3},
    "min_p": {"min_p": 0.2, "seed": 3},
    "n": {"n": 2, "seed": 3},
    "presence_penalty": {"temperature": 0, "presence_penalty": 2.0},
    "frequency_penalty": {"temperature": 0, "frequency_penalty": 1.5},
    "repetition_penalty": {"temperature": 0, "repetition_penalty": 3.0},
    "logit_bias": {"temperature": 0, "logit_bias": {"70": 100.0, "71": -5.0}},
    "stop_token_ids": {"temperature": 0, "stop_token_ids": [70], "logit_bias": {"70": 100.0}},
    "regex": {"seed": 3, "regex": "(ab){2}c"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_reaches_the_engine(noisy, alone, settings):
    ours = settings | {"max_tokens": 12}
    if "logit_bias" in ours:
        ours["logit_bias"] = {int(token): value for token, value in settings["logit_bias"].items()}
    (output,) = alone.generate("The quick", SamplingParams(**ours))
    (plain,) = alone.generate(
        "The quick",
        SamplingParams(max_tokens=12, temperature=min(1.0, 10 * settings.get("temperature", 1.0)), seed=3),
    )
    extra = {name: value for name, value in settings.items() if name in EXTRA}
    theirs = {name: value for name, value in settings.items() if name not in EXTRA}
    done = noisy.client.completions.create(
        model="tiny", prompt="The quick", max_tokens=12, **theirs, extra_body=extra
    )
    assert [choice.text for choice in done.choices] == [one.text for one in output.outputs]
    assert [one.text for one in output.outputs] != [plain.outputs[0].text]


@pytest.mark.parametrize(
    "prompt",
    ["p", ["p", "d"], [ord("p")], [[ord("p")], [ord("d")]]],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_the_four_forms_of_a_prompt(alphabet, prompt):
    token = alphabet.llm.tokenizer.token_id
    if not isinstance(prompt, str) and not isinstance(prompt[0], str):
        prompt = [token("p")] if isinstance(prompt[0], int) else [[token("p")], [token("d")]]
    done = alphabet.client.completions.create(**GREEDY, prompt=prompt, max_tokens=3)
    expected = ["qrs", "efg"] if len(prompt) > 1 else ["qrs"]
    assert [choice.text for choice in done.choices] == expected
    assert [choice.index for choice in done.choices] == list(range(len(expected)))
    assert _stream(alphabet.client, **GREEDY, prompt=prompt, max_tokens=3)[1] == dict(enumerate(expected))


def test_several_completions_and_seeds(noisy):
    settings = {"model": "tiny", "prompt": ["fox", "The"], "max_tokens": 8, "n": 3, "seed": 5}
    settings["extra_body"] = {"ignore_eos": True}
    one = noisy.client.completions.create(**settings)
    two = noisy.client.completions.create(**settings)
    texts = [choice.text for choice in one.choices]
    assert texts == [choice.text for choice in two.choices]
    assert len(set(texts)) > 2
    assert [choice.index for choice in one.choices] == list(range(6))
    assert one.usage.completion_tokens == 48
    assert one.usage.prompt_tokens == sum(
        len(noisy.llm.tokenizer.encode(text)) for text in settings["prompt"]
    )
    assert _stream(noisy.client, **settings)[1] == dict(enumerate(texts))


def test_stop_strings_across_chunks(alphabet):
    for stop in ("tu", ["xyz", "tu"]):
        settings = {"prompt": "p", "max_tokens": 20, "stop": stop}
        done = alphabet.client.completions.create(**GREEDY, **settings)
        chunks, texts = _stream(alphabet.client, **GREEDY, **settings)
        assert (done.choices[0].text, done.choices[0].finish_reason) == ("qrs", "stop")
        assert texts == {0: "qrs"}
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_usage_comes_last_where_it_is_asked_for(alphabet):
    chunks, _ = _stream(
        alphabet.client, **GREEDY, prompt="p", max_tokens=5, stream_options={"include_usage": True}
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert all(
        chunk.usage is None for chunk in _stream(alphabet.client, **GREEDY, prompt="p", max_tokens=5)[0]
    )


def test_the_bytes_of_a_stream(alphabet):
    body = {"prompt": "p", "max_tokens": 2, "temperature": 0, "stream": True}
    with httpx.Client(base_url=alphabet.url) as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(
        json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events[:-2]
    )


def test_logprobs_are_the_engines_scores(noisy):
    prompt = noisy.llm.tokenizer.encode("quick brown fox")
    settings = {"prompt": prompt, "max_tokens": 6, "logprobs": 3}
    done = noisy.client.completions.create(**GREEDY, **settings)
    told = done.choices[0].logprobs
    assert (
        len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 6
    )
    for value, best in zip(told.token_logprobs, told.top_logprobs, strict=True):
        assert value == max(best.values())  # greedy
    streamed = [
        c.choices[0].logprobs for c in _stream(noisy.client, **GREEDY, **settings)[0] if c.choices[0].logprobs
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for piece in streamed for value in getattr(piece, name)] == getattr(told, name)


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_lm_eval_asks(noisy, max_tokens):
    """Truth: `LLM.score`, which runs without caches."""
    tokenizer = noisy.llm.tokenizer
    prompts = [tokenizer.encode(text) for text in ("The quick brown fox", "日本語 🦜 fox")]
    expected = noisy.llm.score(prompts)
    done = noisy.client.completions.create(
        **GREEDY, prompt=prompts, max_tokens=max_tokens, logprobs=1, echo=True, seed=1234
    )
    for choice, prompt, scores in zip(done.choices, prompts, expected, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(prompt) + max_tokens
        assert told.token_logprobs[0] is None
        assert told.top_logprobs[0] is None
        assert told.token_logprobs[1 : len(prompt)] == pytest.approx(scores, abs=1e-4)
        assert all(
            max(best.values()) >= value
            for best, value in zip(told.top_logprobs[1:], told.token_logprobs[1:], strict=True)
        )
        assert choice.text.startswith(tokenizer.decode(prompt))
        assert told.text_offset[0] == 0
        starts = [len(tokenizer.decode(prompt[:i]).rstrip("\ufffd")) for i in range(len(prompt))]
        assert told.text_offset[: len(prompt)] == starts
    assert done.usage.completion_tokens == 2 * max_tokens


def test_a_model_without_tokenizer(running, flash):
    with running(LLM(flash)) as server:
        create = server.client.completions.create
        done = create(**GREEDY, prompt=[5, 6, 7], max_tokens=4, logprobs=1, echo=True)
        (output,) = LLM(flash).generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=4))
        assert done.choices[0].text == ""
        tokens = [5, 6, 7, *output.outputs[0].token_ids]
        assert done.choices[0].logprobs.tokens == [f"token_id:{token}" for token in tokens]
        assert (
            sum(
                c.usage.completion_tokens
                for c in _stream(
                    server.client,
                    **GREEDY,
                    prompt=[5, 6, 7],
                    max_tokens=4,
                    stream_options={"include_usage": True},
                )[0]
                if c.usage
            )
            == 4
        )
        with pytest.raises(openai.BadRequestError, match="has no tokenizer, so it takes token ids only"):
            create(**GREEDY, prompt="p")
        with pytest.raises(openai.BadRequestError, match="has no tokenizer, so it cannot chat"):
            server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_echo_in_a_stream(noisy):
    settings = {"prompt": "quick fox", "max_tokens": 3, "logprobs": 1, "echo": True}
    whole = noisy.client.completions.create(**GREEDY, **settings).choices[0]
    chunks, texts = _stream(noisy.client, **GREEDY, **settings)
    assert texts == {0: whole.text}
    assert whole.text.startswith("quick fox")
    values = [value for chunk in chunks for value in (chunk.choices[0].logprobs or _Nothing).token_logprobs]
    assert values == whole.logprobs.token_logprobs


def test_a_schema_shapes_the_answer(noisy):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    done = noisy.client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "go"}],
        response_format=shape,
        max_tokens=60,
        seed=1,
    )
    assert json.loads(done.choices[0].message.content)["a"] in (1, 2)
