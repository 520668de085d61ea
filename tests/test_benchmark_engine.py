"""`benchmarks/engine.py`: our engine as a worker, rows for engines that are not there, inputs, flags."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _engine_bench import SCRIPTS, Bench, Side
from _engine_inputs import Prompts, hybrid_shapes, kv_formula
from _gguf import rewrite
from _worker import WorkerError

from sateen import LLM, SamplingParams
from sateen.models.base import ModelConfig

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    return Bench(
        files=None, prompts=None, pythons={"sateen": sys.executable, "vLLM": None}, threads=1, pairs=2,
        is_quick=True, logs=tmp_path,
    )  # fmt: skip


def test_our_worker_decodes_what_the_engine_does(bench):
    from sateen.models.decoder import Decoder

    prompts = [[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]]
    side = Side("ours", "sateen", {"model": TINY, "max_num_seqs": 2})
    with bench.open(side) as (worker, said):
        first = worker.ask("begin", prompts=prompts, num_tokens=6)
        more = worker.ask("decode", num_tokens=6)
        worker.ask("end")
        whole = worker.ask("generate", prompts=prompts, num_tokens=7)
        worker.ask("begin", prompts=prompts[:1], num_tokens=1)
        worker.ask("decode", num_tokens=1)
        with pytest.raises(WorkerError, match="0 tokens from 1 steps"):
            worker.ask("decode", num_tokens=1)
    model = Decoder(ModelConfig.from_hf(TINY)).init_weights(0).bfloat16()
    params = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)
    wanted = [output.outputs[0].token_ids for output in LLM(model).generate(prompts, params)]
    assert first["tokens"] == [ids[0] for ids in wanted]
    assert (more["last"], more["tokens"]) == ([ids[-1] for ids in wanted], 12)
    assert (whole["ids"], whole["tokens"]) == (wanted, 14)
    # Embedding 64 x 32; q and o of 32 x 32, k and v of 16 x 32, three of 48 x 32, two norms; a norm.
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert said["weight_bytes"] == 2 * (64 * 32 + 2 * layer + 32)
    assert said["cache_bytes"] == kv_formula(TINY, 128, 2) == 2 * 128 * 2 * 2 * 2 * 8 * 2


def test_perplexity_by_steps_is_that_of_transformers(monkeypatch):
    import _peer_sateen
    import transformers

    from sateen.models.decoder import Decoder

    raw = TINY | {"tie_word_embeddings": False}
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0)
    llm = LLM(model, max_num_seqs=1, max_num_batched_tokens=1)
    llm.tokenizer = SimpleNamespace(eos_id=0, encode=lambda text: [ord(letter) - 64 for letter in text])
    monkeypatch.setattr(_peer_sateen, "ENGINE", llm, raising=False)
    found = _peer_sateen.step_perplexity(["ABRACADABRA", "SIX"], context=8)
    config = transformers.LlamaConfig(**{key: raw[key] for key in raw if key != "model_type"})
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(model.state_dict())
    nats = []
    for ids in ([0, 1, 2, 18, 1, 3, 1, 4], [0, 19, 9, 24]):  # the first is cut after eight tokens
        with torch.inference_mode():
            logprobs = theirs(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats += [-float(logprobs[i, token]) for i, token in enumerate(ids[1:])]
    assert found["tokens"] == len(nats) == 10
    assert found["nats"] == pytest.approx(nats, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-5)


TOY = """
import sys
sys.path.insert(0, {folder!r})
from _worker import serve
def load(threads, fails=False):
    if fails: raise type("BackendUnavailable", (Exception,), {{}})("no such weights")
    return {{"version": "7"}}
def rate(number, fails_at=None):
    if number == fails_at: raise ValueError("too hot")
    return {{"rate": 3.0}}
serve({{"load": load, "rate": rate}})
"""


@pytest.fixture
def toys(bench, tmp_path, monkeypatch):
    """A bench with engines that start at once: `toy`, and `vLLM` without a Python for it."""
    (tmp_path / "toy.py").write_text(TOY.format(folder=str(FOLDER)))
    monkeypatch.setitem(SCRIPTS, "toy", str(tmp_path / "toy.py"))
    bench.pythons["toy"] = sys.executable
    return bench


def test_peers_that_are_not_there_get_a_row_and_the_others_go_on(toys):
    peers = [
        Side("vLLM", "vLLM", {}, bar=1.5),
        Side("twin", "toy", {}, bar=0.5),
        Side("future", "toy", {"fails": True}),
    ]
    measure = lambda worker, number: worker.ask("rate", number=number)["rate"]  # noqa: E731
    toys.compare(Side("ours", "toy", {}), peers, {"speed": ("tokens/s", measure)}, note="same")
    verdicts = {found["peer"]["name"]: found["verdict"] for found in toys.rows}
    assert verdicts == {"vLLM": "not measured", "twin": "too few pairs (2 of 9)", "future": "not built"}
    assert "use --vllm PYTHON" in toys.rows[0]["why"]
    assert (toys.rows[1]["note"], toys.rows[1]["ratio"]["median"]) == ("same", 1.0)
    assert toys.rows[2]["why"] == "future: no such weights"
    assert toys.versions == {"toy": "7"}


def test_without_our_side_no_peer_is_loaded_and_every_row_says_why(toys):
    ours = Side("ours", "toy", {"fails": True})
    toys.compare(ours, [Side("a", "toy", {}), Side("b", "vLLM", {})], {"speed": ("tokens/s", None)})
    assert [(found["verdict"], found["why"]) for found in toys.rows] == 2 * [
        ("not built", "ours: no such weights")
    ]
    assert toys.versions == {}


def test_a_side_that_fails_on_the_way_is_left_out_and_the_rest_begins_again(toys):
    seen = []

    def measure(worker, number):
        seen.append(worker.name)
        return worker.ask("rate", number=number, fails_at=1 if worker.name == "bad" else None)["rate"]

    peers = [Side("good", "toy", {}), Side("bad", "toy", {})]
    toys.compare(Side("ours", "toy", {}), peers, {"speed": ("tokens/s", measure)})
    assert [found["verdict"] for found in toys.rows] == ["no bar", "failed"]
    assert toys.rows[1]["why"] == "bad: too hot"
    assert seen == ["ours", "good", "bad", "bad", "ours", "good", "good", "ours", "ours", "good"]


def test_the_hybrid_differs_from_its_twin_in_windows_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_hidden_layers": 6, "dtype": "bfloat16"}))
    hybrid, full = (ModelConfig.from_hf(raw) for raw in hybrid_shapes(tmp_path, 1024))
    assert [spec.window for spec in hybrid.specs] == [128] * 5 + [None]
    assert [spec.window for spec in full.specs] == [None] * 6
    assert hybrid.max_position_embeddings == full.max_position_embeddings == 1024
    raw = hybrid_shapes(tmp_path, 1024)[0]
    # Five rings of 128 rows, one layer of 1,024; two heads of 8, keys and values of 2 bytes, 4 times.
    assert kv_formula(raw, 1024, 4) == 4 * (5 * 128 + 1024) * 2 * 8 * 2 * 2


def test_prompts_do_not_repeat_until_the_text_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", {"b": "second " * 20, "a": "first " * 20})
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    prompts = Prompts(tmp_path / "tokenizer.json")
    # A token per letter; the topics in the order of their names, a line each.
    first, second = prompts.take(120), prompts.take(140)
    assert prompts.tokenizer.decode(first) == "first " * 20
    assert prompts.tokenizer.decode(second) == "\n" + ("second " * 20)[:-1]
    assert prompts.text(6) == "first "


@pytest.mark.parametrize(("matrices", "error"), [("F16", 1e-3), ("Q8_0", 1 / 127)])
def test_a_rewritten_gguf_has_the_same_numbers(matrices, error, tmp_path):
    gguf = pytest.importorskip("gguf")
    matrix = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_context_length(77)
    writer.add_tensor("m.weight", gguf.quantize(matrix, gguf.GGMLQuantizationType.Q4_1),
                      raw_dtype=gguf.GGMLQuantizationType.Q4_1)  # fmt: skip
    writer.add_tensor("n.weight", matrix[0])
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    rewrite(tmp_path / "a.gguf", tmp_path / "b.gguf", matrices)
    tensors = [
        {
            t.name: (t.tensor_type.name, gguf.dequantize(t.data, t.tensor_type))
            for t in gguf.GGUFReader(path).tensors
        }
        for path in (tmp_path / "a.gguf", tmp_path / "b.gguf")
    ]
    (before, after), largest = tensors, np.abs(tensors[0]["m.weight"][1]).max()
    assert after["m.weight"][0] == matrices
    assert np.abs(after["m.weight"][1] - before["m.weight"][1]).max() <= error * largest
    assert after["n.weight"][0] == "F32"
    assert np.array_equal(after["n.weight"][1], before["n.weight"][1])
    assert gguf.GGUFReader(tmp_path / "b.gguf").fields["llama.context_length"].contents() == 77


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such.gguf"], "no-such.gguf is not there"),
        ([str(FOLDER / "engine.py"), "--only", "decode,speed"], "--only: speed is not one of decode, "),
    ],
)
def test_wrong_flags_are_told_before_any_work(words, said):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "engine.py"), *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


def test_sections_stay_in_the_file_until_they_are_measured_again_on_the_same_machine(tmp_path):
    import engine

    path, flags = tmp_path / "out.json", Namespace(model=Path("m.gguf"), demo=None)
    assert engine.begin(path, "ab", flags)["sections"] == {}
    document = engine.begin(path, "ab", flags) | {"sections": {"decode": {"rows": []}}}
    path.write_text(json.dumps(document))
    assert engine.begin(path, "ab", flags)["sections"] == {"decode": {"rows": []}}
    assert engine.begin(path, "cd", flags)["sections"] == {}
    path.write_text(json.dumps(document | {"hardware": {"cpu": "another"}}))
    assert engine.begin(path, "ab", flags)["sections"] == {}
