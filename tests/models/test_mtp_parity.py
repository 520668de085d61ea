"""MTP heads against the formulas of their papers in float64; transformers has no class for them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sateen.checkpoint.hf import load_model
from sateen.nn.attention import Sequences


def norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, theta, dim):
    """Half-split rotation of [T, C] by row number, one pair of channels at a time."""
    out = x.clone()
    for t in range(len(x)):
        for j in range(dim // 2):
            angle = t * theta ** (-2 * j / dim)
            a, b = x[t, j], x[t, j + dim // 2]
            out[t, j] = a * math.cos(angle) - b * math.sin(angle)
            out[t, j + dim // 2] = a * math.sin(angle) + b * math.cos(angle)
    return out


def block_by_hand(w, x, *, N, K, H, V, theta, dim, window, value_scale, mlp_norm):
    """One pre-norm decoder layer in float64 from its tensors."""
    normed = norm(x, w["input_layernorm.weight"])

    def project(letter):
        out = normed @ w[f"self_attn.{letter}_proj.weight"].T
        return out + w[f"self_attn.{letter}_proj.bias"] if f"self_attn.{letter}_proj.bias" in w else out

    q, k, v = project("q"), project("k"), project("v") * value_scale
    heads = []
    for n in range(N):
        group = n // (N // K)
        queries = rotate(q[:, n * H : (n + 1) * H], theta, dim)
        keys = rotate(k[:, group * H : (group + 1) * H], theta, dim)
        rows = []
        for t in range(len(x)):
            first = max(0, t - window + 1) if window else 0
            weights = (keys[first : t + 1] @ queries[t] / math.sqrt(H)).exp()
            total = weights.sum()
            if "self_attn.attention_sink_bias" in w:
                total = total + w["self_attn.attention_sink_bias"][n].exp()
            rows.append(weights / total @ v[first : t + 1, group * V : (group + 1) * V])
        heads.append(torch.stack(rows))
    x = x + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
    normed = norm(x, w[f"{mlp_norm}.weight"])
    gate = normed @ w["mlp.gate_proj.weight"].T
    up = normed @ w["mlp.up_proj.weight"].T
    return x + (gate / (1 + (-gate).exp()) * up) @ w["mlp.down_proj.weight"].T


def head_tensors(prefix, names, D, qkv, o, width, *, sink=None, bias=False):
    """Empty tensors of one MTP head under its published names."""
    embedding_norm, hidden_norm, join, mlp_norm = names
    shapes = {f"{word}.weight": (D,) for word in (embedding_norm, hidden_norm, mlp_norm)}
    shapes |= {"final_layernorm.weight": (D,), "input_layernorm.weight": (D,), f"{join}.weight": (D, 2 * D)}
    shapes |= {f"self_attn.{x}_proj.weight": (n, D) for x, n in zip("qkv", qkv, strict=True)}
    shapes |= {f"self_attn.{x}_proj.bias": (n,) for x, n in zip("qkv", qkv, strict=True) if bias}
    shapes |= {"self_attn.o_proj.weight": (D, o), "mlp.down_proj.weight": (D, width)}
    shapes |= {"mlp.gate_proj.weight": (width, D), "mlp.up_proj.weight": (width, D)}
    if sink:
        shapes["self_attn.attention_sink_bias"] = (sink,)
    return {f"{prefix}.{name}": torch.empty(shape) for name, shape in sorted(shapes.items())}


def under(tensors, prefix):
    return {
        name[len(prefix) + 1 :]: t.double() for name, t in tensors.items() if name.startswith(prefix + ".")
    }


def states_before_norm(model, ids):
    seen = []
    hook = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    hook.remove()
    return seen[0][0]


def ours_per_head(model, ids):
    """The normed output of each MTP head for the rows that have a token to read."""
    T = len(ids)
    outs = []
    with torch.no_grad():
        hidden = model.trunk(ids, Sequences.of_lengths([T]))
        for k in range(model.num_mtp_heads):
            rows = T - k - 1
            hidden, out = model.mtp(k, hidden[:rows], ids[k + 1 :], Sequences.of_lengths([rows]))
            outs.append(out)
    return outs


def test_mimo_7b_heads_match_the_formulas(build, randomise, tokens, assert_close, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500.0}
    theirs = build("Qwen2Config", {"num_hidden_layers": 3, "rms_norm_eps": 1e-5, "rope_parameters": rope})
    names = ("token_layernorm", "hidden_layernorm", "input_proj", "post_attention_layernorm")
    heads = {}
    for k in range(2):
        heads |= head_tensors(f"model.mtp_layers.{k}", names, 32, (32, 16, 16), 32, 48, bias=True)
    randomise(heads.items(), seed=7)
    save_file(load_file(tmp_path / "model.safetensors") | heads, tmp_path / "model.safetensors")
    raw = {
        "architectures": ["MiMoForCausalLM"], "model_type": "mimo", "vocab_size": 97, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 500.0, "attention_bias": True,
        "hidden_act": "silu",
        "max_window_layers": 3, "use_sliding_window": False, "sliding_window": 32768, "use_mrope": False,
        "max_position_embeddings": 256, "tie_word_embeddings": False, "num_nextn_predict_layers": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ours = load_model(tmp_path)
    ids = tokens(3, 21)
    right = torch.arange(21) < torch.tensor([21, 13, 1])[:, None]
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)
        for mask in (right, right.flip(1)):
            want = theirs(ids, attention_mask=mask.long()).logits[mask]
            assert_close(ours(ids, mask.long()).logits[mask], want)
    ids = ids[:1]

    embedding = theirs.model.embed_tokens.weight.detach().double()
    hidden = states_before_norm(theirs, ids).double()
    for k, got in enumerate(ours_per_head(ours, ids[0])):
        w = under(heads, f"model.mtp_layers.{k}")
        rows = 21 - k - 1
        # Hidden first; the state before the trunk's final norm; the second head reads the first one's output.
        joined = torch.cat(
            [norm(hidden[:rows], w["hidden_layernorm.weight"]),
             norm(embedding[ids[0, k + 1 :]], w["token_layernorm.weight"])], -1,
        )  # fmt: skip
        y = block_by_hand(
            w, joined @ w["input_proj.weight"].T,
            N=4, K=2, H=8, V=8, theta=500.0, dim=8, window=None, value_scale=1.0,
            mlp_norm="post_attention_layernorm",
        )  # fmt: skip
        hidden = norm(y, w["final_layernorm.weight"])
        assert_close(got.double(), hidden)
        want = hidden @ theirs.lm_head.weight.detach().double().T
        assert_close(ours.logits(got).detach().double(), want)


FLASH = {
    "num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 24, "v_head_dim": 16, "sliding_window": 9,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture
def flash(build, randomise, tmp_path):
    """transformers' model in `tmp_path`, to which the test has added three MTP heads, and their tensors."""
    theirs = build("MiMoV2FlashConfig", FLASH)
    names = ("enorm", "hnorm", "eh_proj", "pre_mlp_layernorm")
    heads = {}
    for k in range(3):
        heads |= head_tensors(f"model.mtp.layers.{k}", names, 32, (96, 48, 32), 64, 48, sink=4)
    randomise(heads.items(), seed=7)
    save_file(load_file(tmp_path / "model.safetensors") | heads, tmp_path / "model.safetensors")
    return theirs, heads


def flash_heads_by_hand(theirs, heads, ids):
    """The normed output of each head over one sequence [T], in float64."""
    embedding = theirs.model.embed_tokens.weight.detach().double()
    hidden = states_before_norm(theirs, ids[None]).double()
    outs = []
    for k in range(3):
        w = under(heads, f"model.mtp.layers.{k}")
        rows = len(ids) - k - 1
        # Embedding first; every head reads the trunk's own state.
        joined = torch.cat(
            [norm(embedding[ids[k + 1 :]], w["enorm.weight"]), norm(hidden[:rows], w["hnorm.weight"])], -1
        )
        y = block_by_hand(
            w, joined @ w["eh_proj.weight"].T,
            N=4, K=2, H=24, V=16, theta=1e4, dim=8, window=9, value_scale=0.707, mlp_norm="pre_mlp_layernorm",
        )  # fmt: skip
        outs.append(norm(y, w["final_layernorm.weight"]))
    return outs


def test_mimo_v2_flash_heads_match_the_formulas(flash, tokens, assert_close, tmp_path):
    theirs, heads = flash
    ours = load_model(tmp_path)
    assert ours.num_mtp_heads == 3  # counted from the tensor names; the config does not say
    ids = tokens(1, 21)[0]
    wanted = flash_heads_by_hand(theirs, heads, ids)
    for got, want in zip(ours_per_head(ours, ids), wanted, strict=True):
        assert_close(got.double(), want)
        head = theirs.lm_head.weight.detach().double()
        assert_close(ours.logits(got).detach().double(), want @ head.T)


def test_a_hub_checkpoint_with_heads_in_padded_and_packed_batches(flash, hub, tokens, assert_close, tmp_path):
    theirs, heads = flash
    (tmp_path / "config.json").write_text(json.dumps(hub))
    ours = load_model(tmp_path)
    assert ours.num_mtp_heads == 3
    ids = tokens(3, 33)
    right = torch.arange(33) < torch.tensor([33, 20, 10])[:, None]
    with torch.no_grad():
        assert_close(ours(ids).logits, theirs(ids).logits)
        for mask in (right, right.flip(1)):
            # Rotations depend on distances only, so the positions that transformers counts from the padding's
            # start, and those that it is given here, are the same to it.
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            got = ours(ids, mask.long()).logits[mask]
            assert_close(got, theirs(ids, attention_mask=mask.long()).logits[mask])
            want = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits[mask]
            assert_close(got, want)
    # Three sequences end to end, two of them longer than the window of 9.
    sequences = [row[keep] for row, keep in zip(ids, right, strict=True)]
    lengths = [len(sequence) for sequence in sequences]
    wanted = [flash_heads_by_hand(theirs, heads, sequence) for sequence in sequences]
    with torch.no_grad():
        hidden = ours.trunk(torch.cat(sequences), Sequences.of_lengths(lengths)).split(lengths)
        for k in range(3):
            rows = [length - k - 1 for length in lengths]
            read = torch.cat([states[:count] for states, count in zip(hidden, rows, strict=True)])
            tokens_T = torch.cat([sequence[k + 1 :] for sequence in sequences])
            _, out = ours.mtp(k, read, tokens_T, Sequences.of_lengths(rows))
            for got, want in zip(out.split(rows), wanted, strict=True):
                assert_close(got.double(), want[k])
