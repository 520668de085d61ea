"""The harness over our engine, on tasks of our own, against forwards written out here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.tasks import TaskManager

from sateen.checkpoint.hf import save
from sateen.data.tokenizer import Tokenizer
from sateen.engine.engine import LLM
from sateen.errors import ConfigError
from sateen.eval import faces
from sateen.eval.lm_eval import SateenLM, evaluate
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.registry import preset

QUESTIONS = [
    ("the cat sat on the", ["mat", "sky above us", "7"], 0),
    ("two and two are", ["four", "five", "a"], 1),
    ("rain falls from", ["clouds", "the floor"], 1),
    ("water is", ["wet", "dry and hot", "blue"], 2),
]
CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWER = """
task: toy_answer
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - metric: exact_match
"""
PERPLEXITY = """
task: toy_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: bits_per_byte
"""


@pytest.fixture(scope="module")
def llm() -> LLM:
    text = " ".join(" ".join([question, *choices]) for question, choices, _ in QUESTIONS)
    tokenizer = Tokenizer.train([text * 20], 320)
    raw = preset("mimo-v2-flash-tiny") | {"initializer_range": 0.1, "vocab_size": tokenizer.vocab_size}
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0).eval()
    return LLM(model, tokenizer=tokenizer, draft="none", max_model_len=128)


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory, llm: LLM) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    rows = [
        {"question": question, "choices": choices, "label": label, "answer": greedy(llm, question, 8)}
        for question, choices, label in QUESTIONS
    ]
    rows[0]["answer"] = "not what the model says"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, source in (("choice", CHOICE), ("answer", ANSWER), ("perplexity", PERPLEXITY)):
        (folder / f"{name}.yaml").write_text(source.format(data=data, cache=folder / "cache"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def logprobs(llm: LLM, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return llm.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def greedy(llm: LLM, text: str, count: int) -> str:
    """By whole forwards; the harness strips nothing and stops at a line's end."""
    assert llm.tokenizer is not None
    tokens = llm.tokenizer.encode(text)
    start = len(tokens)
    for _ in range(count):
        token = int(logprobs(llm, tokens)[-1, : llm.tokenizer.vocab_size].argmax())
        if token in llm.tokenizer.stop_ids:
            break
        tokens.append(token)
    return llm.tokenizer.decode(tokens[start:]).split("\n")[0]


def answer_logprob(llm: LLM, question: str, choice: str) -> float:
    assert llm.tokenizer is not None
    context, whole = llm.tokenizer.encode(question), llm.tokenizer.encode(f"{question} {choice}")
    rows = logprobs(llm, whole)
    return sum(float(rows[t - 1, whole[t]]) for t in range(len(context), len(whole)))


def test_choices_are_scored_as_by_hand(llm: LLM, manager: TaskManager) -> None:
    results = evaluate(llm, ["toy_choice"], manager=manager)["results"]["toy_choice"]
    right = normed = 0
    for question, choices, label in QUESTIONS:
        scores = [answer_logprob(llm, question, choice) for choice in choices]
        right += scores.index(max(scores)) == label
        shares = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        normed += shares.index(max(shares)) == label
    assert results["acc,none"] == right / len(QUESTIONS)
    assert results["acc_norm,none"] == normed / len(QUESTIONS)


def test_generated_answers_are_the_greedy_ones(llm: LLM, manager: TaskManager) -> None:
    results = evaluate(llm, ["toy_answer"], manager=manager)["results"]["toy_answer"]
    assert results["exact_match,none"] == (len(QUESTIONS) - 1) / len(QUESTIONS)


def test_rolling_perplexity_is_that_of_the_texts(llm: LLM, manager: TaskManager) -> None:
    assert llm.tokenizer is not None
    results = evaluate(llm, ["toy_perplexity"], manager=manager)["results"]["toy_perplexity"]
    total = size = 0.0
    for question, _, _ in QUESTIONS:
        tokens = [llm.tokenizer.eos_id, *llm.tokenizer.encode(question)]
        rows = logprobs(llm, tokens)
        total += sum(float(rows[t - 1, tokens[t]]) for t in range(1, len(tokens)))
        size += len(question.encode())
    assert results["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), rel=1e-5)


def test_a_long_context_gives_way_from_the_left(llm: LLM) -> None:
    assert llm.tokenizer is not None
    harness = SateenLM(llm, max_length=12)
    context, continuation = llm.tokenizer.encode("the cat sat on the mat " * 5), llm.tokenizer.encode(" wet")
    value, _ = harness._loglikelihood_tokens([(None, context, continuation)])[0]
    tokens = (context + continuation)[-11:]
    rows = logprobs(llm, tokens)
    truth = sum(float(rows[t - 1, tokens[t]]) for t in range(11 - len(continuation), 11))
    assert value == pytest.approx(truth, abs=1e-4)
    with pytest.raises(ConfigError, match="does not fit max_length 12"):
        harness._loglikelihood_tokens([(None, [1], list(range(11)))])


def test_whether_an_answer_is_the_greedy_one(llm: LLM) -> None:
    assert llm.tokenizer is not None
    harness = SateenLM(llm)
    context = llm.tokenizer.encode("water is")
    best = int(logprobs(llm, context)[-1].argmax())
    found = harness._loglikelihood_tokens([(None, context, [best]), (None, context, [(best + 1) % 256])])
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_unknown_tasks_and_settings_are_named(llm: LLM, manager: TaskManager) -> None:
    with pytest.raises(ConfigError, match="no task nonsense"):
        evaluate(llm, ["nonsense"], manager=manager)

    class Asked:
        args: Any = ("water is", {"until": [], "num_beams": 4})

    with pytest.raises(ConfigError, match="num_beams"):
        SateenLM(llm).generate_until([Asked()])
    with pytest.raises(ConfigError, match="go with --lm-eval"):
        faces.main("nowhere", limit=3)


def test_the_device_that_the_harness_assumes_is_not_needed(tmp_path: Path, llm: LLM) -> None:
    if torch.cuda.is_available():
        pytest.skip("the harness's default device is here")
    assert llm.tokenizer is not None
    save(llm.model, tmp_path / "model")
    llm.tokenizer.save(tmp_path / "model")
    assert SateenLM(str(tmp_path / "model"), device="cuda:0", batch_size=2).llm.model.device.type == "cpu"
