"""lm-evaluation-harness through the server and in process: the same scores, by its own client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager  # noqa: E402

from sateen.engine.engine import LLM  # noqa: E402
from sateen.eval.lm_eval import SateenLM  # noqa: E402

SENTENCES = "the quick brown fox jumps over the lazy dog and runs through the quiet wood until night".split()
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{rest}
"""
CHOICE = """
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["e"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def write_tasks(folder: Path, answers: LLM) -> TaskManager:
    """Thirty questions; every other generated answer is the model's own."""
    rows = []
    for i in range(30):
        words = [SENTENCES[(i * step) % len(SENTENCES)] for step in (1, 2, 3, 5, 7)]
        rows.append({"question": " ".join(words[:3]), "choices": words[2:], "label": i % 3, "answer": "?"})
    harness = SateenLM(answers)

    class Asked:
        def __init__(self, row: dict[str, object]):
            self.args = (row["question"], {"until": ["e"], "max_gen_toks": 6})

    for row, text in zip(rows[::2], harness.generate_until([Asked(row) for row in rows[::2]]), strict=True):
        row["answer"] = text
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    for name, kind, rest in (("choice", "multiple_choice", CHOICE), ("answer", "generate_until", ANSWER)):
        source = TASK.format(name=f"toy_{name}", data=data, cache=folder / "cache", kind=kind, rest=rest)
        (folder / f"{name}.yaml").write_text(source)
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_the_server_gives_the_scores_of_the_process(noise: LLM, running, tmp_path: Path) -> None:
    manager = write_tasks(tmp_path, noise)
    assert noise.tokenizer is not None
    noise.tokenizer.save(tmp_path / "tokenizer")
    settings = {"tasks": ["toy_choice", "toy_answer"], "task_manager": manager, "bootstrap_iters": 0}
    inside = lm_eval.simple_evaluate(SateenLM(noise), **settings)
    with running(noise) as server:
        outside = lm_eval.simple_evaluate(
            "local-completions",
            model_args={
                "model": "tiny",
                "base_url": f"{server.url}/v1/completions",
                "tokenizer_backend": "huggingface",
                "tokenizer": str(tmp_path / "tokenizer"),
                "num_concurrent": 4,
                "max_length": 256,
            },
            **settings,
        )
    for task in settings["tasks"]:
        first, second = inside["results"][task], outside["results"][task]
        numbers = {key: value for key, value in first.items() if isinstance(value, float)}
        assert numbers, task
        assert {key: second[key] for key in numbers} == numbers
    samples = [
        [sample["filtered_resps"] for sample in results["samples"]["toy_choice"]]
        for results in (inside, outside)
    ]
    for ours, theirs in zip(*samples, strict=True):
        for (value, is_greedy), (other, was_greedy) in zip(ours, theirs, strict=True):
            assert float(value) == pytest.approx(float(other), abs=1e-4)
            assert is_greedy == was_greedy
    assert inside["results"]["toy_answer"]["exact_match,none"] == 0.5
