"""The HySparse family: published cache sizes, layouts, tensor names, refusals, save and load."""

from __future__ import annotations

import json

import pytest
import torch

from sateen.checkpoint.hf import load_model
from sateen.checkpoint.inspect import main
from sateen.checkpoint.load import parameter_entries
from sateen.engine.cache.kv_cache import KVCache
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder, count_parameters
from sateen.models.inspect import kv_bytes
from sateen.models.registry import preset
from sateen.nn.attention import LayerLinks, Sequences

TINY = ("hysparse-tiny", "hysparse-moe-tiny", "hysparse2-tiny")


def config(name, **changes):
    return ModelConfig.from_hf(preset(name) | changes)


@pytest.mark.parametrize(
    ("name", "context", "gigabytes", "ratio"),
    [
        # arXiv 2602.03560: 5 of 49 layers keep all rows, 44 keep 128; 9.8x in the limit.
        ("hysparse-80b-a3b", 32768, None, 9.47),
        ("hysparse-80b-a3b", 1048576, None, 9.79),
        # arXiv 2609.26368 Fig. 4, FP8 at 1M tokens.
        ("hysparse-80b-a3b-h2", 1048576, 6.72, 9.79),
        ("hysparse2-80b-a3b", 1048576, 2.69, None),
    ],
)
def test_inspect_gives_the_published_cache_sizes(name, context, gigabytes, ratio, capsys):
    assert main(name, context=[32768, 1048576], kv_dtype="fp8", json=True) == 0
    rows = {row["context"]: row for row in json.loads(capsys.readouterr().out)["kv"]}
    if gigabytes is not None:
        assert round(rows[context]["bytes"] / 1e9, 2) == gigabytes
    if ratio is not None:
        assert round(rows[context]["ratio"], 2) == ratio


def test_cache_bytes_follow_the_formula():
    for n in (1, 127, 128, 129, 1000):
        row = kv_bytes(config("hysparse-80b-a3b"), n, "bf16")
        assert row["bytes"] == 2 * (5 * n + 44 * min(n, 128)) * 4 * 256
        row = kv_bytes(config("hysparse2-80b-a3b"), n, "bf16")
        assert row["bytes"] == 2 * (5 * n + 24 * min(n, 128)) * 512


def test_the_7b_follows_its_layout_and_ends_in_a_full_layer():
    specs = config("hysparse-7b").layers()
    full = [spec.index for spec in specs if spec.attention != "sparse_attention"]
    assert full == [0, 4, 8, 12, 16, 20, 24, 28, 32, 35]
    assert specs[35].attention == "full_attention"  # nothing reads it, so it chooses nothing
    assert all(specs[i].attention == "oracle_attention" for i in full[:-1])
    assert [specs[i].kv_source for i in (1, 3, 5, 34)] == [0, 0, 4, 32]
    assert dict(specs[0].options) == {"block_size": 64, "num_blocks": 16, "forced_window": None}
    assert (specs[1].window, specs[0].has_sink, specs[0].rotary_dim) == (128, False, 128)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("hysparse-80b-a3b", 80.7, 3.04), ("hysparse-7b", 6.39, 6.39)]
)
def test_parameters_without_the_vocabulary_fit_the_names(name, total, active):
    with torch.device("meta"):
        model = Decoder(config(name))
    counts, vocabulary = count_parameters(model), 2 * model.lm_head.weight.numel()
    assert round((counts["total"] - vocabulary) / 1e9, len(str(total).split(".")[1])) == total
    assert round((counts["active"] - vocabulary) / 1e9, len(str(active).split(".")[1])) == active


def test_hysparse2_bridges_and_selects_single_tokens():
    specs = config("hysparse2-80b-a3b").layers()
    assert [s.index for s in specs if s.attention == "oracle_attention"] == [12, 25, 31, 37, 43]
    assert dict(specs[12].options) == {"publishes_input": True}
    assert dict(specs[31].options) == {
        "block_size": 1, "num_blocks": 1024, "forced_window": 128, "input_from": 12,
    }  # fmt: skip
    assert (specs[31].rotary_dim, specs[32].rotary_dim, specs[3].rotary_dim) == (0, 0, 64)
    assert (specs[3].attention, specs[3].rope_theta, specs[3].has_sink) == (
        "gated_sliding_attention",
        1e4,
        True,
    )
    assert specs[32].window is None
    off = config("hysparse2-80b-a3b", sparse_bridge=False, sparse_local="none").layers()
    assert off[12].attention == "full_attention"
    assert dict(off[31].options) == {"block_size": 1, "num_blocks": 1024, "forced_window": None}


def test_tensors_have_their_names():
    model = Decoder(config("hysparse-tiny"))
    names = {entry.name: tuple(tensor.shape) for _, tensor, entry in parameter_entries(model)}
    attention = {
        name.split("self_attn.")[1]: shape for name, shape in names.items() if "layers.1.self_attn" in name
    }
    assert attention == {
        "q_proj.weight": (128, 128), "o_proj.weight": (128, 128), "swa_k_proj.weight": (64, 128),
        "swa_v_proj.weight": (64, 128), "gate_proj.weight": (8, 128), "sink_sa": (4,), "sink_swa": (4,),
    }  # fmt: skip
    full = {name.split("self_attn.")[1] for name in names if "layers.0.self_attn" in name}
    assert full == {f"{x}_proj.weight" for x in "qkvo"}


@pytest.mark.parametrize(
    ("changes", "own", "rows"),
    [
        # arXiv 2602.03560 Table 4; rows of a context of 100 in units of one token's keys and values.
        ({}, {"swa_k_proj.weight", "swa_v_proj.weight", "sink_swa"}, 3 * 100 + 4 * 32),
        ({"share_kv_sa": False}, {"k_proj.weight", "v_proj.weight", "sink_swa"}, 7 * 100),
        ({"share_kv_sa": False, "sparse_local": "none"}, {"k_proj.weight", "v_proj.weight"}, 7 * 100),
        ({"share_kv_swa": True}, {"sink_swa"}, 3 * 100),
    ],
    ids=["HySparse", "no sharing", "no sharing and no window", "both share"],
)
def test_the_rows_of_the_ablation_own_and_store_what_they_read(changes, own, rows):
    model = Decoder(config("hysparse-tiny", **changes))
    names = {name for name, _ in model.model.layers[1].self_attn.named_parameters()}
    assert names == {"q_proj.weight", "o_proj.weight", "gate_proj.weight", "sink_sa"} | own
    layouts = [layout for layer in model.config.kv_layouts() for layout in layer]
    assert sum(layout.rows(100) for layout in layouts) == rows
    assert {layout.row_elements for layout in layouts if layout.kind != "shared"} == {2 * 2 * 32}


@pytest.mark.parametrize("name", TINY)
def test_save_and_load_are_bit_identical(name, tmp_path):
    model = Decoder(config(name)).init_weights(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".sink" in key:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.config.to_hf() == model.config.to_hf()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def test_mtp_heads_are_plain_sliding_layers_with_dense_mlps(tmp_path):
    model = Decoder(
        config("hysparse2-tiny", num_nextn_predict_layers=2, mtp_intermediate_size=48)
    ).init_weights(3)
    names = {entry.name: tuple(tensor.shape) for _, tensor, entry in parameter_entries(model)}
    head = {name.split("layers.1.")[1]: shape for name, shape in names.items() if "mtp.layers.1." in name}
    assert head["eh_proj.weight"] == (64, 128)
    assert head["mlp.gate_proj.weight"] == (48, 64)
    assert head["self_attn.attention_sink_bias"] == (4,)
    assert not any("gate_proj" in name for name in head if "self_attn" in name)
    (layout,) = model.config.kv_layouts()[-1]
    assert (layout.kind, layout.window) == ("ring", 8)
    model.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.num_mtp_heads == 2
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(ConfigError, match="mtp_intermediate_size gives its width"):
        config("hysparse2-tiny", num_nextn_predict_layers=2)
    assert config("hysparse-tiny", num_nextn_predict_layers=1).mtp.layer.intermediate_size == 320


@torch.no_grad()
def test_the_bridge_projects_keys_from_the_input_of_the_first_full_layer():
    model = Decoder(config("hysparse2-tiny", initializer_range=0.1)).init_weights(0)
    seq, links = Sequences.of_lengths([40]), LayerLinks()
    tokens = torch.arange(40)
    model.trunk(tokens, seq, links=links)
    x = model.model.embed_tokens(tokens)
    x = model.model.layers[0](x, seq, None, LayerLinks())
    source = model.model.layers[1].input_layernorm(x)
    for index in (3, 6):
        k, v, _ = links.kv[index]
        own = model.model.layers[index].self_attn
        torch.testing.assert_close(k.flatten(1), own.k_proj(source))  # no rotation
        torch.testing.assert_close(v.flatten(1), own.v_proj(source))
    assert set(links.kv) == {3, 6}
    chosen = links.selections[3][0, -1].tolist()
    assert chosen[24:] == list(range(32, 40))  # the window
    assert all(0 <= token < 32 for token in chosen[:24])


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_decoding_makes_the_lists_of_one_forward(name):
    model = Decoder(config(name, initializer_range=0.1)).init_weights(0)
    tokens = torch.randint(500, (90,), generator=torch.Generator().manual_seed(2))
    whole = LayerLinks()
    model.trunk(tokens, Sequences.of_lengths([90]), links=whole)
    cache = KVCache(
        model.config.kv_layouts(),
        num_trunk_layers=model.config.num_hidden_layers,
        num_pages=2,
        num_slots=1,
        max_model_len=100,
    )
    entry, parts = cache.open(), {index: [] for index in whole.selections}
    for count in [31, *[1] * 30, 20, *[1] * 9]:
        start, links = entry.length, LayerLinks()
        assert cache.reserve(entry, start + count)
        seq = Sequences(torch.tensor([0, count], dtype=torch.int32), torch.arange(start, start + count))
        model.trunk(tokens[start : start + count], seq, cache.forward([entry], [count]), links)
        for index, found in parts.items():
            found.append(links.selections[index])
    assert parts
    for index, found in parts.items():
        assert torch.equal(torch.cat(found, dim=1), whole.selections[index])
        assert (whole.selections[index][:, -1] < 0).sum() == 0  # full lists: the choice is a real one


@torch.no_grad()
def test_the_group_may_rank_by_its_mean():
    specs = config("hysparse-tiny", gqa_score_reduce="mean").layers()
    assert [spec.options.get("aggregate") for spec in specs[:4]] == ["mean", None, None, "mean"]
    lists = []
    for word in ("max", "mean"):
        raw = config("hysparse-tiny", gqa_score_reduce=word, initializer_range=0.1)
        links = LayerLinks()
        Decoder(raw).init_weights(0).trunk(torch.arange(200), Sequences.of_lengths([200]), links=links)
        lists.append(links.selections[0])
    assert lists[0].shape == lists[1].shape
    assert not torch.equal(*lists)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparse_select": "page"}, r"sparse_select 'page' is not supported; accepted: 'block', 'token'"),
        ({"sparse_local": "ring"}, r"sparse_local 'ring'.*'gated', 'forced', 'none'"),
        ({"gqa_score_reduce": "sum"}, "gqa_score_reduce 'sum' is not supported; accepted: 'max', 'mean'"),
        ({"gate_granularity": "layer"}, "gate_granularity 'layer'"),
        ({"share_kv_swa": "yes"}, "share_kv_swa 'yes' is not supported; accepted: False, True"),
        ({"share_kv_swa": True, "share_kv_sa": False}, "both true, both false"),
        ({"share_kv_swa": True, "swa_rope_theta": 7}, "swa_rope_theta 7 has no meaning .* or give 10000.0"),
        ({"share_kv_sa": False, "swa_num_key_value_heads": 1}, "swa_num_key_value_heads 1 .* or give 2"),
        ({"sparse_topk_tokens": 40}, "40 is not a positive multiple of the block size 16"),
        ({"sparse_topk_tokens": 0}, "0 is not a positive multiple"),
        ({"layer_types": ["sparse_attention"] * 7}, r"layer_types\[0\] is sparse_attention with no full"),
        ({"layer_types": None}, "layer_types is missing"),
        ({"sparse_bridge": True, "sparse_bridge_source": 1}, "1 is not a full_attention layer"),
        ({"n_routed_experts": 4, "moe_layer_freq": [1]}, "1 entries for num_hidden_layers 7"),
        ({"sparse_blok_size": 4, "sparse_block_size": 16}, None),
        ({"gate_granularty": "head"}, None),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    raw = preset("hysparse-tiny")
    if message is None:
        for key in ("gate_granularity", "sparse_block_size"):
            raw.pop(key, None)
        changes = {key: value for key, value in changes.items() if key != "sparse_block_size"}
        message = "did you mean"
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw | changes)
