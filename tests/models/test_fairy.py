"""Fairy±i: published names, shapes and sizes; the whole model against its equations in NumPy complex128.

The equations read the tensors under their published names from the saved file, so the names are checked to
mean what they say.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import sateen
from sateen.checkpoint.inspect import inspect, lines
from sateen.checkpoint.load import parameter_entries
from sateen.engine.cache.kv_cache import KVCache
from sateen.errors import CheckpointError, ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.models.registry import preset
from sateen.nn.attention import Sequences
from sateen.nn.spec import QuantSpec

FLOATS = {"quantization_config": {"quant_method": "none"}}
TINY = {
    "model_type": "complexnet", "vocab_size": 61, "hidden_size": 12, "intermediate_size": 10,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-3,
    "rope_theta": 100.0, "max_position_embeddings": 256,
} | FLOATS  # fmt: skip
EPS = 1e-3


def build(seed=0, **changes):
    """Random weights far enough from zero that every term counts, norms and their two gains included."""
    model = Decoder(ModelConfig.from_hf(TINY | changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.normal_(centre, 0.4, generator=generator)
    return model


def pair(tensors, name):
    return tensors[f"{name}_real"].astype(np.float64) + 1j * tensors[f"{name}_imag"].astype(np.float64)


def gain(z, weight):
    """The published norm: mean over complex entries, each part with its own real gains."""
    z = z / np.sqrt((np.abs(z) ** 2).mean(-1, keepdims=True) + EPS)
    return z.real * weight.real + 1j * z.imag * weight.imag


def phases(w):
    """A matrix as the published code quantises it: by angle, one scale for either axis."""
    angle = np.angle(w)
    real = (np.abs(angle) <= np.pi / 4) | (np.abs(angle) >= 3 * np.pi / 4)
    s_re, s_im = np.abs(w.real[real]).mean(), np.abs(w.imag[~real]).mean()
    return np.where(real, np.sign(w.real) * s_re, 1j * np.sign(w.imag) * s_im)


def rounded(z):
    """Int8 activations: each part of a token with a scale of its own."""

    def part(x):
        step = np.abs(x).max(-1, keepdims=True) / 127
        return np.round(x / step) * step

    return part(z.real) + 1j * part(z.imag)


def logits_by_formula(tensors, raw, ids, head_scale, is_quantized=False):
    """Logits [T, V] of one sequence from published tensors."""
    T, N, K = len(ids), raw["num_attention_heads"], raw["num_key_value_heads"]
    c = raw["hidden_size"] // N
    x = tensors["token_embeddings_real.weight"][ids] + 1j * tensors["token_embeddings_imag.weight"][ids]

    def project(name, z):
        w = pair(tensors, f"{name}.weight")
        return rounded(z).conj() @ phases(w).T if is_quantized else z.conj() @ w.T

    turn = np.exp(1j * np.arange(T)[:, None] * raw["rope_theta"] ** (-np.arange(c) / c))[:, None]
    mask = np.tril(np.ones((T, T), dtype=bool))
    for layer in range(raw["num_hidden_layers"]):
        at = f"layer.{layer}."
        y = gain(x, pair(tensors, at + "pre_layernorm.weight"))
        q, k, v = (
            project(f"{at}self_attn.{n}_proj", y).reshape(T, count, c)
            for n, count in (("q", N), ("k", K), ("v", K))
        )
        q, k = q * turn, k * turn
        heads = []
        for n in range(N):
            group = n // (N // K)
            scores = np.where(mask, (q[:, n] @ k[:, group].conj().T).real * head_scale, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, group])
        o = gain(np.concatenate(heads, axis=-1), pair(tensors, at + "self_attn.attn_layernorm.weight"))
        x = x + project(at + "self_attn.o_proj", o)
        y = gain(x, pair(tensors, at + "post_layernorm.weight"))
        g, u = project(at + "mlp.gate_proj", y), project(at + "mlp.up_proj", y)
        g = np.where((g.real < 0) & (g.imag < 0), 0, g)
        a = g.real**2 + 1j * g.imag**2
        x = x + project(
            at + "mlp.down_proj", gain(a.conj() * u, pair(tensors, at + "mlp.ffn_layernorm.weight"))
        )
    x = gain(x, pair(tensors, "final_norm.weight"))
    return np.concatenate([x.real, x.imag], axis=-1) @ tensors["lm_head.weight"].T


@pytest.mark.parametrize(
    ("changes", "head_scale"),
    [({}, 12**-0.5), ({"num_key_value_heads": 1}, 12**-0.5), ({"softmax_scale": "eager"}, 6**-0.5)],
    ids=["default", "gqa", "eager"],
)
def test_the_model_is_its_published_equations(changes, head_scale, tmp_path):
    model = build(**changes)
    model.save(tmp_path / "model")
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = model(ids).logits.double().numpy()
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for row, tokens in zip(got, ids.numpy(), strict=True):
        want = logits_by_formula(tensors, TINY | changes, tokens, head_scale)
        assert np.abs(row - want).max() / np.abs(want).max() < 1e-5


def test_masters_without_a_quantization_config_run_quantised(tmp_path):
    """As the published code runs the released files; `none` and null ask for the masters themselves."""
    raw = {key: value for key, value in TINY.items() if key != "quantization_config"}
    assert ModelConfig.from_hf(raw).quant == QuantSpec("phase", act="int8")
    for table in ({"quant_method": "none"}, None):
        assert ModelConfig.from_hf(raw | {"quantization_config": table}).quant is None

    build().save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    model = sateen.load_model(tmp_path / "model")
    ids = torch.randint(61, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        got = model(ids).logits.double().numpy()
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for row, tokens in zip(got, ids.numpy(), strict=True):
        want = logits_by_formula(tensors, TINY, tokens, 12**-0.5, is_quantized=True)
        # A code that the last bit of a float32 turns over costs up to 1/127 of one input of one token.
        assert np.linalg.norm(row - want) < 1e-3 * np.linalg.norm(want)


def test_a_saved_model_loads_bit_for_bit_in_any_dtype(tmp_path):
    model = build()
    model.save(tmp_path / "model")
    again = sateen.load_model(tmp_path / "model")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    again.to(torch.bfloat16).save(tmp_path / "half")
    half = sateen.load_model(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (name, a), (_, b) in zip(model.named_parameters(), half.named_parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16), b), name


def test_a_missing_half_is_refused(tmp_path):
    from safetensors.torch import load_file as read
    from safetensors.torch import save_file

    build().save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = read(file)
    del tensors["final_norm.weight_imag"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"final_norm\.weight_imag"):
        sateen.load_model(tmp_path / "model")


def published_tensors(h, f, num_layers, vocab):
    """Name -> shape, as the released files have them."""
    want = {"lm_head.weight": (vocab, 2 * h)}
    for part in ("real", "imag"):
        want |= {f"token_embeddings_{part}.weight": (vocab, h), f"final_norm.weight_{part}": (h,)}
        for layer in range(num_layers):
            block = {f"self_attn.{x}_proj": (h, h) for x in "qkvo"}
            block |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
            block |= {"pre_layernorm": (h,), "post_layernorm": (h,)}
            block |= {"self_attn.attn_layernorm": (h,), "mlp.ffn_layernorm": (f,)}
            want |= {f"layer.{layer}.{name}.weight_{part}": shape for name, shape in block.items()}
    return want


@pytest.mark.parametrize(
    ("name", "h", "f", "heads", "complex_weights", "checkpoint_gb", "kv_bytes"),
    [
        ("fairy-700m", 1536, 4096, 16, 679_477_248, 3.11, 294_912),
        ("fairy-1.3b", 2048, 5460, 32, 1_207_762_944, 5.36, 393_216),
    ],
)
def test_published_names_shapes_and_sizes(name, h, f, heads, complex_weights, checkpoint_gb, kv_bytes):
    with torch.device("meta"):
        model = Decoder(ModelConfig.from_hf(preset(name) | FLOATS))
    stored = {entry.name: tuple(entry.part(tensor).shape) for _, tensor, entry in parameter_entries(model)}
    assert stored == published_tensors(h, f, 24, 32000)

    matrices = [p for key, p in model.named_parameters() if key.endswith("proj.weight_real")]
    assert len(matrices) == 24 * 7
    assert sum(p.numel() for p in matrices) == complex_weights
    total = count_parameters(model)["total"]
    norms = 24 * (3 * 2 * h + 2 * f) + 2 * h
    assert total == 2 * complex_weights + 4 * 32000 * h + norms
    assert round(2 * total / 1e9, 2) == checkpoint_gb

    found = inspect(name, context=[2048])
    assert found["kv_dtype"] == "bf16"
    assert sum(row["num_layers"] * row["bytes"] for row in found["kv_bytes_per_token"]) == kv_bytes
    assert found["kv"][0]["bytes"] == 2048 * kv_bytes
    assert f"re and im of {h} and {kv_bytes // (24 * 8 * heads)} complex entries" in "\n".join(lines(found))


@pytest.mark.parametrize("name", ["fairy-700m", "fairy-1.3b"])
def test_layers_count_real_numbers(name):
    config = ModelConfig.from_hf(preset(name))
    spec, channels = config.layers()[0], {"fairy-700m": 96, "fairy-1.3b": 64}[name]
    assert config.hidden_size == 2 * preset(name)["hidden_size"]
    assert spec.head_dim == spec.v_head_dim == spec.rotary_dim == 2 * channels
    assert "scale" not in spec.options  # the operators' default, 1/sqrt(2 * head_dim)
    eager = ModelConfig.from_hf(preset(name) | {"softmax_scale": "eager"}).layers()[0]
    assert eager.options["scale"] == channels**-0.5


def test_fresh_weights_have_half_the_variance_in_each_part():
    raw = TINY | {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512}
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0, zero_outputs=True)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif ".o_proj." in name or ".down_proj." in name:
            assert not parameter.any(), name
        else:
            std = 0.02 * (0.5**0.5 if "weight_" in name else 1.0)
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.03), name


def test_the_optimizer_takes_both_parts_of_a_matrix_for_matrices():
    from sateen.train.optim import sort_parameters

    groups = sort_parameters(build(), with_muon=True)
    matrices = [f"{x}_proj.weight_{part}" for x in ("q", "k", "v", "o") for part in ("real", "imag")]
    matrices += [f"{x}_proj.weight_{part}" for x in ("gate", "up", "down") for part in ("real", "imag")]
    assert sorted(name.split(".", 4)[-1] for name in groups["muon"]) == sorted(2 * matrices)
    assert list(groups["adamw.decayed"]) == ["lm_head.weight"]


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [17, 1, 1, 21]], ids=["whole", "decode", "chunks"])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1, "softmax_scale": "eager"}])
def test_the_cached_forward_equals_the_whole_one(chunks, changes):
    model = build(**changes)
    ids = torch.randint(61, (40,), generator=torch.Generator().manual_seed(4))
    cache = KVCache(
        model.config.kv_layouts(), num_trunk_layers=2, num_pages=3, num_slots=2, max_model_len=192
    )
    entry, parts = cache.open(), []
    with torch.inference_mode():
        want = model(ids[None]).logits[0]
        for count in chunks:
            start = entry.length
            assert cache.reserve(entry, start + count)
            seq = Sequences(torch.tensor([0, count], dtype=torch.int32), torch.arange(start, start + count))
            hidden = model.trunk(ids[start : start + count], seq, cache.forward([entry], [count]))
            parts.append(model.logits(model.head_input(hidden)))
    gap = torch.cat(parts) - want
    assert float(gap.norm() / want.norm()) < 1e-5
    assert float(gap.abs().max() / want.abs().max()) < 1e-5


def greedy_by_hand(model, prompt, count):
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("settings", [{}, {"max_num_batched_tokens": 16}], ids=["whole", "chunked"])
def test_the_engine_generates_greedy_tokens(settings):
    model = build()
    prompts = [torch.randint(61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (70, 5)]
    params = sateen.SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    outputs = sateen.LLM(model, **settings).generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.outputs[0].token_ids == greedy_by_hand(model, prompt, 12)


@pytest.mark.parametrize("settings", [{"kv_cache_dtype": "int8"}, {"attention": "int8"}])
def test_int8_rows_and_int8_attention_stay_close(settings):
    """Weights of deviation 0.1 and the bound that tests/engine/cache/test_int8.py has for other families."""
    raw = TINY | {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}
    model = Decoder(ModelConfig.from_hf(raw)).init_weights(0).eval()
    tokens = torch.randint(61, (90,), generator=torch.Generator().manual_seed(4)).tolist()
    params = sateen.SamplingParams(temperature=0.0, max_tokens=1, logprobs=61)
    tops = [
        llm.generate([tokens], params)[0].outputs[0].logprobs[0]
        for llm in (sateen.LLM(model), sateen.LLM(model, **settings))
    ]
    exact, rounded = ([top[token].logprob for token in range(61)] for top in tops)
    assert 0 < np.abs(np.subtract(exact, rounded)).max() < 0.04


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "12 is not a multiple of num_attention_heads 5"),
        ({"softmax_scale": "flesh"}, "did you mean flash"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported"),
        ({"intermediate_sise": 4, "intermediate_size": None}, "wrong type|did you mean"),
    ],
)
def test_what_does_not_fit_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(TINY | changes)
