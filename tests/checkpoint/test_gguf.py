"""GGUF files written by the `gguf` package, loaded by us.

Truth: block formats dequantised here in numpy from ggml's description of them, and transformers' models with
the same weights. Rows of rotated projections are put into transformers' order one index at a time.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from sateen.checkpoint import inspect
from sateen.checkpoint.file_notes import file_notes
from sateen.checkpoint.gguf_file import BLOCK_TYPES, read_gguf
from sateen.checkpoint.hf import load_model, save
from sateen.checkpoint.load import check
from sateen.checkpoint.shards import read_config
from sateen.engine.engine import LLM
from sateen.engine.request import SamplingParams
from sateen.errors import CheckpointError, ConfigError

gguf = pytest.importorskip("gguf", reason="needs the gguf package (extra gguf)")
transformers = pytest.importorskip("transformers", reason="needs the transformers package")

Kind = gguf.GGMLQuantizationType
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 256, 512, 2, 8, 2, 64
ROPE_BASE, EPS = 5000.0, 2e-5
CLASSES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
THEIRS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def half(raw):
    return np.ascontiguousarray(raw).view("<f2").astype(np.float64)


def blocks_of(kind, rows, columns, rng):
    """Random bytes of a format [rows, bytes] with scales of a weight's size, and their values in float64."""
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, size=(rows * columns // size, nbytes), dtype=np.uint8)

    def put_half(column, largest):
        values = rng.uniform(-largest, largest, size=len(raw)).astype("<f2")
        raw[:, column : column + 2] = values[:, None].view(np.uint8)

    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        values = torch.from_numpy(rng.normal(size=(rows * columns)) * 0.06)
        form = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
        stored = values.to(form)
        as_bytes = stored.view(torch.uint8).numpy()
        return as_bytes.reshape(rows, -1), stored.double().numpy().reshape(rows, columns)
    if kind == Kind.Q8_0:  # d, 32 signed bytes
        put_half(0, 0.001)
        values = half(raw[:, :2]) * raw[:, 2:].view(np.int8)
    elif kind in (Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1):
        # d, in the _1 formats a minimum, in Q5 32 high bits, 16 bytes: first half in the low nibbles.
        bits, has_minimum = int(kind.name[1]), kind.name.endswith("1")
        put_half(0, 0.02)
        start, offset = 2, -(2.0 ** (bits - 1)) * half(raw[:, :2])
        if has_minimum:
            put_half(2, 0.1)
            start, offset = 4, half(raw[:, 2:4])
        quants = np.concatenate([raw[:, -16:] & 15, raw[:, -16:] >> 4], axis=1).astype(int)
        if bits == 5:
            high = np.ascontiguousarray(raw[:, start : start + 4]).view("<u4").astype(int)
            quants += (high >> np.arange(32) & 1) * 16
        values = half(raw[:, :2]) * quants + offset
    elif kind in (Kind.Q4_K, Kind.Q5_K):
        # d, dmin, 12 bytes with 8 six-bit scales and 8 minima, in Q5 32 bytes of high bits, 128 of nibbles.
        put_half(0, 0.0005)
        put_half(2, 0.001)
        packed = raw[:, 4:16].astype(int)
        values = np.empty((len(raw), 256))
        for j in range(8):
            if j < 4:
                scale, minimum = packed[:, j] & 63, packed[:, j + 4] & 63
            else:
                scale = (packed[:, j + 4] & 15) | ((packed[:, j - 4] >> 6) << 4)
                minimum = (packed[:, j + 4] >> 4) | ((packed[:, j] >> 6) << 4)
            nibbles = raw[:, -128:][:, 32 * (j // 2) : 32 + 32 * (j // 2)].astype(int)
            quants = nibbles >> 4 if j % 2 else nibbles & 15
            if kind == Kind.Q5_K:
                quants = quants + (raw[:, 16:48].astype(int) >> j & 1) * 16
            d, dmin = half(raw[:, :2])[:, 0], half(raw[:, 2:4])[:, 0]
            values[:, 32 * j : 32 * j + 32] = (d * scale)[:, None] * quants - (dmin * minimum)[:, None]
    else:  # Q6_K: 128 bytes of low nibbles, 64 of high pairs, 16 signed scales, d
        assert kind == Kind.Q6_K
        put_half(208, 0.0001)
        low, high = raw[:, :128].astype(int), raw[:, 128:192].astype(int)
        scales, d = raw[:, 192:208].view(np.int8).astype(np.float64), half(raw[:, 208:])[:, 0]
        values = np.empty((len(raw), 256))
        for position in range(256):
            part, inside = divmod(position, 128)
            quarter, lane = divmod(inside, 32)
            nibble = low[:, 64 * part + 32 * (quarter % 2) + lane] >> (4 * (quarter // 2)) & 15
            pair = high[:, 32 * part + lane] >> (2 * quarter) & 3
            values[:, position] = d * scales[:, position // 16] * ((nibble | pair << 4) - 32)
    return raw.reshape(rows, -1), values.reshape(rows, columns)


def row_in_transformers(row):
    """Where llama.cpp's row of a head goes: neighbours rotate there, channels H/2 apart here."""
    head, channel = divmod(row, HEAD_DIM)
    pair, second = divmod(channel, 2)
    return head * HEAD_DIM + pair + second * HEAD_DIM // 2


class Written:
    """A GGUF file of random weights and what transformers calls them."""

    def __init__(
        self,
        path,
        arch="llama",
        kind=Kind.F32,
        *,
        tied=False,
        change=None,
        leave_out=(),
        also=(),
        tokens=None,
    ):
        rng = np.random.default_rng(7)
        self.path, self.weights, self.raw = path, {}, {}
        config = getattr(transformers, CLASSES[arch])(
            vocab_size=len(tokens or range(VOCAB)), hidden_size=HIDDEN, intermediate_size=INNER,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM, rms_norm_eps=EPS,
            max_position_embeddings=64, tie_word_embeddings=tied, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        self.theirs = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        writer = gguf.GGUFWriter(path, arch)
        meta = {
            "block_count": LAYERS, "context_length": 64, "embedding_length": HIDDEN,
            "feed_forward_length": INNER, "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS,
            "rope.dimension_count": HEAD_DIM, "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM, "attention.layer_norm_rms_epsilon": EPS,
            "rope.freq_base": ROPE_BASE,
        } | (change or {})  # fmt: skip
        for key, value in meta.items():
            if value is None:
                continue
            kind_of_value = {int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
            getattr(writer, f"add_{kind_of_value}")(f"{arch}.{key}", value)
        if tokens is not None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("smollm")
            writer.add_token_list(tokens)
            writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
            writer.add_token_merges(["t h", "th e"])
            writer.add_bos_token_id(1)
            writer.add_eos_token_id(2)
            writer.add_chat_template(TEMPLATE)
        for name, parameter in self.theirs.state_dict().items():
            if name == "lm_head.weight" and tied:
                continue
            if parameter.ndim == 1:
                centre = float(name.endswith("norm.weight"))
                values = rng.normal(centre, 0.3, size=parameter.shape).astype(np.float32)
                raw, form = values, Kind.F32
            else:
                raw, values = blocks_of(kind, *parameter.shape, rng)
                form = kind
            theirs = self.name_of(name)
            if theirs in leave_out:
                continue
            self.raw[theirs] = np.array(raw)
            writer.add_tensor(theirs, raw, raw_dtype=form)
            self.weights[name] = self.ordered(name, np.asarray(values)) if arch == "llama" else values
        for name, values in also:
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        state = {name: torch.from_numpy(np.array(v, dtype=np.float32)) for name, v in self.weights.items()}
        self.theirs.load_state_dict(state, strict=False)

    @staticmethod
    def name_of(name):
        outside = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }
        if name in outside:
            return outside[name]
        index, rest = name.removeprefix("model.layers.").split(".", 1)
        stem, leaf = rest.rsplit(".", 1)
        return f"blk.{index}.{THEIRS[stem]}.{leaf}"

    @staticmethod
    def ordered(name, values):
        if "q_proj" not in name and "k_proj" not in name:
            return values
        out = np.empty_like(values)
        for row in range(len(values)):
            out[row_in_transformers(row)] = values[row]
        return out


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


IDS = torch.tensor([[3, 1, 4, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3], [2, 7, 18, 28, 18, 28, 4, 5, 9, 0, 39, 1, 1]])
KINDS = [Kind[kind.name] for kind in BLOCK_TYPES.values()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_are_the_values_that_ggml_describes(kind, path):
    written = Written(path, kind=kind)
    ours = load_model(path)
    state = ours.state_dict()
    assert state.keys() == written.weights.keys()
    for name, values in written.weights.items():
        assert state[name].dtype == torch.float32
        largest = np.abs(values).max()
        # float32 rounds products and sums of the blocks; the floating-point formats are exact.
        bound = 2e-7 * largest if kind.name.startswith("Q") else 0.0
        assert np.abs(state[name].numpy().astype(np.float64) - values).max() <= bound, name
    assert torch.allclose(logits(ours, IDS), logits(written.theirs, IDS), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("arch", CLASSES)
def test_each_architecture_matches_transformers(arch, tied, path, tmp_path):
    written = Written(path, arch, Kind.Q8_0, tied=tied)
    ours = load_model(path)
    assert torch.allclose(logits(ours, IDS), logits(written.theirs, IDS), rtol=1e-4, atol=2e-5)
    ours.save(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.allclose(logits(again, IDS), logits(written.theirs, IDS), rtol=1e-4, atol=2e-5)
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


def test_the_config_is_an_ordinary_one(path):
    Written(path, kind=Kind.Q8_0)
    assert load_model(path, device="meta").config.raw == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 2e-5,
        "rope_theta": 5000.0, "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip


def test_what_the_metadata_may_leave_out(path):
    """Key length, rotary size and base, and the number of key heads have ggml's defaults."""
    left_out = ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base")
    change = dict.fromkeys(left_out) | {"attention.head_count": 4, "attention.head_count_kv": None}
    Written(path, change=change)
    raw = read_config(path)
    assert raw["head_dim"] == HIDDEN // 4
    assert raw["num_key_value_heads"] == 4
    assert raw["rope_theta"] == 10000.0


def test_biases_of_llama_are_permuted_with_their_rows(path):
    """Some Llama-shaped models have biases on all four projections; transformers calls it attention_bias."""
    written = Written(path)
    bias = np.arange(HEADS * HEAD_DIM, dtype=np.float32)
    also = [
        (f"blk.{layer}.attn_{which}.bias", bias[: HEAD_DIM * (KV_HEADS if which in "kv" else HEADS)])
        if which != "output"
        else (f"blk.{layer}.attn_output.bias", np.zeros(HIDDEN, dtype=np.float32))
        for layer in range(LAYERS)
        for which in ("q", "k", "v", "output")
    ]
    biased = path.with_name("biased.gguf")
    Written(biased, also=also)
    state = load_model(biased).state_dict()
    moved = written.ordered("q_proj", bias)
    assert state["model.layers.1.self_attn.q_proj.bias"].tolist() == moved.tolist()
    assert state["model.layers.1.self_attn.v_proj.bias"].tolist() == bias[: HEAD_DIM * KV_HEADS].tolist()


def test_dtypes_are_as_documented(path, caplog):
    Written(path, kind=Kind.F16)
    with caplog.at_level(logging.INFO, logger="sateen.checkpoint"):
        exact = load_model(path)
    assert "loaded as float32" in caplog.text
    assert {tensor.dtype for tensor in exact.state_dict().values()} == {torch.float32}
    rounded = load_model(path, dtype="bfloat16").state_dict()
    for name, tensor in exact.state_dict().items():
        assert torch.equal(rounded[name], tensor.to(torch.bfloat16))


def test_frequencies_are_accepted_only_where_they_change_nothing(path, caplog):
    ones = ("rope_freqs.weight", np.ones(HEAD_DIM // 2, dtype=np.float32))
    with caplog.at_level(logging.INFO, logger="sateen.checkpoint"):
        assert torch.equal(
            logits(load_model(Written(path, also=[ones]).path), IDS),
            logits(load_model(Written(path.with_name("b.gguf")).path), IDS),
        )
    assert "rope_freqs.weight is all ones" in caplog.text
    scaled = ("rope_freqs.weight", np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32))
    with pytest.raises(ConfigError, match=r"scales rotary frequencies .* accepted: unscaled"):
        load_model(Written(path, also=[scaled]).path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope.scaling.type": "yarn"}, "rope.scaling.type is yarn; .* accepted: unscaled"),
        ({"rope.scale_linear": 2.0}, "rope.scale_linear is 2.0"),
        ({"expert_count": 8}, "expert_count is 8; .* accepted: dense"),
        ({"attention.sliding_window": 32}, "sliding_window is 32; .* accepted: full attention"),
        ({"attention.head_count_kv": [2, 1]}, "head_count_kv differs between layers"),
        ({"rope.dimension_count": 16}, "rope.dimension_count is 16; accepted: the 64 channels"),
        ({"attention.value_length": 16}, "value_length is 16; accepted: the 64 channels"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"attention.head_count": 0}, "a value cannot be used"),
        ({"embedding_length": "wide"}, "a value cannot be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_our_models_do_not_have_is_refused(change, words, path):
    Written(path, change=change)
    with pytest.raises((ConfigError, CheckpointError), match=words) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_another_architecture_is_refused_with_the_accepted_ones(path):
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"'gemma3' \(known: llama, qwen2, qwen3\)"):
        load_model(path)


def test_every_tensor_finds_its_place(path):
    Written(path, also=[("blk.0.ffn_gate_inp.weight", np.zeros((4, HIDDEN), dtype=np.float32))])
    with pytest.raises(CheckpointError, match=r"the config does not account for: blk\.0\.ffn_gate_inp"):
        load_model(path)
    Written(path, leave_out=("blk.1.ffn_down.weight",))
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(path)
    Written(path, change={"feed_forward_length": 256})
    with pytest.raises(CheckpointError, match=r"has shape .* the config asks for"):
        load_model(path)


def test_two_tensors_for_one_place_are_refused(path):
    Written(path, also=[("model.norm.weight", np.zeros(HIDDEN, dtype=np.float32))])
    with pytest.raises(CheckpointError, match=r"output_norm\.weight and model\.norm\.weight both stand for"):
        load_model(path)


def test_files_that_are_no_models(path, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(path)
    written = Written(path, kind=Kind.Q8_0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"incomplete, \d+ bytes of \d+"):
        load_model(path)
    for cut in (0, 3, 4, 10, 24, 60, 200):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
            load_model(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(CheckpointError, match="does not begin with GGUF"):
        load_model(path)
    path.write_bytes(whole[:4] + (1).to_bytes(4, "little") + whole[8:])
    with pytest.raises(CheckpointError, match="GGUF version 1 is not read"):
        load_model(path)
    path.write_bytes(whole[:4] + (3).to_bytes(4, "big") + whole[8:])
    with pytest.raises(CheckpointError, match="big-endian"):
        load_model(path)
    assert written.raw


def test_a_format_that_is_not_read_is_named(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 84), dtype=np.uint8), raw_dtype=Kind.Q2_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"token_embd\.weight is Q2_K; accepted: F32, F16, Q4_0"):
        load_model(path)


def test_one_part_of_a_split_model_is_refused(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="one of 3 parts"):
        load_model(path)


def test_our_reader_sees_what_the_package_sees(path):
    extra = {"numbers": [1.5, 2.5], "note": "naïve ✓", "words": ["a", "", "é"]}
    Written(path, kind=Kind.Q6_K, change=extra)
    reader, ours = gguf.GGUFReader(path), read_gguf(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in ours.metadata.items()} == theirs
    assert ours.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        stored = ours.tensors[tensor.name]
        assert stored.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (stored.start, stored.num_bytes) == (tensor.data_offset, tensor.n_bytes)
        assert stored.kind.name == tensor.tensor_type.name
        assert np.array_equal(ours.rows(tensor.name).ravel(), np.array(tensor.data).view(np.uint8).ravel())


def test_without_the_package_quantised_blocks_are_refused(path, monkeypatch):
    Written(path, kind=Kind.Q8_0)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"pip install 'sateen\[gguf\]'"):
        load_model(path)
    assert load_model(path, device="meta").config.vocab_size == VOCAB


def test_the_engine_and_the_inspector_take_the_file(path):
    written = Written(path, kind=Kind.Q8_0, tied=True)
    out = LLM(str(path)).generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=6))[0].outputs[0]
    ids = torch.tensor([[5, 6, 7]])
    for _ in range(6):
        ids = torch.cat([ids, logits(written.theirs, ids)[:, -1:].argmax(-1)], dim=1)
    assert out.token_ids == ids[0, 3:].tolist()
    found = inspect.inspect(str(path))
    assert found["model_type"] == "llama"
    # Bytes by hand: 34 per 32 weights of Q8_0, 4 per norm weight.
    per_layer = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * INNER
    matrices = VOCAB * HIDDEN + LAYERS * per_layer
    assert found["weight_bytes"] == {"Q8_0": matrices // 32 * 34, "F32": 4 * HIDDEN * (2 * LAYERS + 1)}


def test_a_saved_directory_is_plain(path, tmp_path):
    Written(path, kind=Kind.Q4_1)
    model = load_model(path, dtype="bfloat16")
    save(model, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


# Bytes by GPT-2's letters: 33 to 126, 161 to 172 and 174 to 255 are themselves, the others follow from 256.
LETTERS = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68)]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *map(chr, LETTERS), "th", "the"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def test_text_goes_in_and_out_and_a_saved_directory_has_it_all(path, tmp_path):
    Written(path, kind=Kind.Q8_0, tied=True, tokens=TOKENS)
    llm = LLM(str(path))
    out = llm.generate("the 12", SamplingParams(temperature=0, max_tokens=5))[0]
    digits = [TOKENS.index(letter) for letter in ("Ġ", "1", "2")]
    assert out.prompt_token_ids == [TOKENS.index("the"), *digits]
    chat = llm.tokenizer.apply_chat_template([{"role": "user", "content": "the"}])
    assert chat == [1, TOKENS.index("the"), 2]
    assert llm.model.config.raw["eos_token_id"] == 2
    save(llm.model, tmp_path / "out")
    again = LLM(str(tmp_path / "out"))
    saved = again.generate("the 12", SamplingParams(temperature=0, max_tokens=5))[0]
    assert saved.outputs[0].token_ids == out.outputs[0].token_ids
    assert again.tokenizer.apply_chat_template([{"role": "user", "content": "the"}]) == chat
    assert again.tokenizer.fingerprint == llm.tokenizer.fingerprint


def test_saving_elsewhere_leaves_no_tokenizer_of_another_kind_behind(path, tmp_path):
    """A vocabulary we do not rebuild is refused where text is asked for, and the weights still load."""
    Written(path, tokens=TOKENS)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"smollm", b"smolln"))
    model = load_model(path)
    with pytest.raises(ConfigError, match=r"unknown tokenizer\.ggml\.pre 'smolln'; did you mean smollm"):
        LLM(str(path))
    with pytest.raises(ConfigError, match=r"unknown tokenizer\.ggml\.pre"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tokenizer.json").write_text("{}")
    save(model, tmp_path / "out", carry_from=tmp_path / "files")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("arch", "arguments", "notes"),
    [
        ("llama", {}, ["rows of q and k are stored in the order of rotations", "no tokenizer here"]),
        ("qwen2", {"kind": Kind.Q8_0}, ["blocks of Q8_0 become floats at loading", "no tokenizer here"]),
    ],
)
def test_inspect_says_what_a_file_holds(arch, arguments, notes, path):
    Written(path, arch, **arguments)
    found = file_notes(check(path))
    assert len(found) == len(notes)
    assert all(line.startswith(says) for line, says in zip(found, notes, strict=True))
