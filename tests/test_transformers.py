"""Our model types behind transformers' Auto classes: the same numbers, the same files, clear refusals."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import sateen
from sateen.checkpoint.hf import load_model
from sateen.errors import CheckpointError, ConfigError, ShapeError
from sateen.models.registry import preset

transformers = pytest.importorskip("transformers")
CONFIG_MAPPING = pytest.importorskip("transformers.models.auto.configuration_auto").CONFIG_MAPPING
interop = pytest.importorskip("sateen.transformers")
Auto = transformers.AutoModelForCausalLM
OURS = {
    "mimo-7b-tiny": "MiMoForCausalLM",
    "hysparse-tiny": "HySparseForCausalLM",
    "hysparse2-tiny": "HySparseForCausalLM",
    "fairy-tiny": "ComplexNetLM",
}


@pytest.fixture
def stored(tmp_path):
    """(preset) -> a directory with its random weights, a tokenizer file and token ids."""

    def make(name):
        model = load_model(name)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        model.save(tmp_path / "stored")
        (tmp_path / "stored" / "chat_template.jinja").write_text("{{ messages }}")
        words = {"eos_token_id": 7, "pad_token_id": 0, "bos_token_id": 1}
        (tmp_path / "stored" / "generation_config.json").write_text(json.dumps(words))
        return tmp_path / "stored"

    return make


def ids_of(batch, length, seed=5):
    return torch.randint(8, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset_name", OURS)
def test_logits_loss_and_gradients_are_those_of_the_decoder(preset_name, stored):
    model, decoder = Auto.from_pretrained(stored(preset_name)), load_model(stored(preset_name))
    assert type(model).__name__ == OURS[preset_name]
    assert not model.training
    ids = ids_of(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :13] = mask[1, 33:] = 0
    assert model(ids).logits.equal(decoder(ids).logits)
    labels = ids.masked_fill(mask == 0, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    assert out.logits.equal(decoder(ids, mask).logits)
    # The mean over the pairs of neighbours that are both real.
    logits = decoder(ids, mask).logits
    pairs = [(b, t) for b in range(2) for t in range(39) if mask[b, t] and mask[b, t + 1]]
    rows = torch.stack([logits[b, t] for b, t in pairs])
    want = cross_entropy(rows, torch.stack([ids[b, t + 1] for b, t in pairs]))
    torch.testing.assert_close(out.loss, want, rtol=1e-6, atol=1e-6)
    summed = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss
    torch.testing.assert_close(summed, want * len(pairs) / 10, rtol=1e-6, atol=1e-6)
    out.loss.backward()
    want.backward()
    theirs = dict(decoder.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(theirs)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert theirs[name].grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("preset_name", OURS)
def test_what_is_saved_is_what_was_loaded(preset_name, stored, tmp_path):
    folder = stored(preset_name)
    model = Auto.from_pretrained(folder)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "notes.txt").write_text("mine")
    (tmp_path / "again" / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    model.config.eos_token_id = 9
    model.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "chat_template.jinja"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert {key: after[key] for key in before} == before
    assert after["eos_token_id"] == 9
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == 7
    assert sorted(f.name for f in (tmp_path / "again").iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "notes.txt",
    ]  # fmt: skip
    ids = ids_of(1, 20)
    assert Auto.from_pretrained(tmp_path / "again")(ids).logits.equal(model(ids).logits)
    heads = [name for name in load_file(folder / "model.safetensors") if "mtp" in name]
    assert bool(heads) == (preset_name == "mimo-7b-tiny")


@pytest.mark.parametrize("preset_name", OURS)
def test_greedy_tokens_are_those_of_the_engine(preset_name, stored):
    model = Auto.from_pretrained(stored(preset_name))
    prompts = [ids_of(1, length, seed=length)[0].tolist() for length in (3, 9, 6)]
    greedy = sateen.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    want = [out.outputs[0].token_ids for out in sateen.LLM(model.decoder).generate(prompts, greedy)]
    padded = torch.tensor([[0] * (9 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (9 - len(p)) + [1] * len(p) for p in prompts])
    words = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(padded, attention_mask=mask, **words)[:, 9:]
    assert got.tolist() == want
    if preset_name == "mimo-7b-tiny":
        assert model.generate(torch.tensor(prompts[:1]), **words)[0, 3:].tolist() == want[0]
        # Eight beams of one step cannot miss the eight likeliest tokens.
        beams = model.generate(
            padded, attention_mask=mask, **words | {"max_new_tokens": 1}, num_beams=8, num_return_sequences=8
        )
        best = model(padded, attention_mask=mask).logits[:, -1].topk(8).indices
        assert beams[:, -1].tolist() == best.flatten().tolist()


@pytest.mark.parametrize("preset_name", OURS)
def test_a_cache_changes_no_logits(preset_name, stored):
    folder = stored(preset_name)
    if preset_name == "fairy-tiny":  # int8 activations would turn the last bit of a sum into a whole step
        change = {"quantization_config": {"quant_method": "phase", "activations": "float"}}
        (folder / "config.json").write_text(json.dumps(preset(preset_name) | change))
    model = Auto.from_pretrained(folder)
    ids = ids_of(3, 60)
    mask = torch.ones_like(ids)
    mask[0, :7] = mask[1, 25:31] = 0
    mask[2, 50:] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits
        got, cache = [], None
        for start, end in ((0, 30), (30, 31), (31, 32), (32, 55), (55, 60)):
            step = model(
                ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True,
                position_ids=(mask.cumsum(1) - 1)[:, start:end],
            )  # fmt: skip
            cache = step.past_key_values
            got.append(step.logits)
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-5)
    assert cache.lengths == mask.sum(1).tolist()
    assert cache.get_seq_length() == 60


def test_generation_reads_each_token_once_and_beams_are_those_without_a_cache(stored):
    model = Auto.from_pretrained(stored("mimo-7b-tiny"))
    widths = []
    hook = model.decoder.model.embed_tokens.register_forward_hook(lambda _, __, out: widths.append(len(out)))
    words = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids_of(1, 9), **words)
    assert widths == [9, 1, 1, 1, 1, 1]
    hook.remove()
    ids, mask = ids_of(2, 9), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    found = [
        model.generate(ids, attention_mask=mask, num_beams=3, num_return_sequences=3, use_cache=use, **words)
        for use in (True, False)
    ]
    assert found[0].tolist() == found[1].tolist()


def test_a_model_can_be_made_copied_and_pickled_from_a_config(stored):
    config = transformers.AutoConfig.from_pretrained(stored("mimo-7b-tiny"))
    torch.manual_seed(3)
    model = Auto.from_config(config)
    torch.manual_seed(3)
    assert Auto.from_config(config).lm_head.weight.equal(model.lm_head.weight)
    assert model.decoder.num_mtp_heads == 1
    ids = ids_of(1, 12)
    want = model(ids).logits
    assert float(want.detach().std()) > 0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.mul_(2.0)  # the decoder of the copy is the copy's own
        torch.testing.assert_close(other(ids).logits, 2 * want)
    assert model(ids).logits.equal(want)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtypes_and_devices(dtype, stored):
    folder = stored("mimo-7b-tiny")
    for device_map in (None, "cpu", {"": "cpu"}, torch.device("cpu")):
        model = Auto.from_pretrained(folder, dtype=dtype, device_map=device_map)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.config.dtype == torch.bfloat16
    assert Auto.from_pretrained(folder, dtype="auto").dtype == torch.float32


def test_tensors_given_by_a_trainer_are_what_is_saved(stored, tmp_path):
    model = Auto.from_pretrained(stored("mimo-7b-tiny"))
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=doubled)
    found = load_file(tmp_path / "given" / "model.safetensors")
    assert found.keys() == doubled.keys()
    assert all(found[name].equal(doubled[name]) for name in found)


def test_tied_embeddings_stay_tied_on_every_way(tmp_path):
    config = interop.MiMoConfig(**preset("mimo-7b-tiny") | {"tie_word_embeddings": True})
    model = Auto.from_config(config)
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for folder in ("first", "given"):
        again = Auto.from_pretrained(tmp_path / folder)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert "lm_head.weight" not in load_file(tmp_path / folder / "model.safetensors")
        assert again.lm_head.weight.equal(model.lm_head.weight)


def test_a_model_can_be_saved_where_it_came_from(stored):
    folder = stored("mimo-7b-tiny")
    before = load_file(folder / "model.safetensors")
    model = Auto.from_pretrained(folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(folder)
    after = load_file(folder / "model.safetensors")
    assert [name for name in before if not before[name].equal(after[name])] == ["model.norm.weight"]
    assert (folder / "chat_template.jinja").is_file()


@pytest.fixture
def undo_register():
    """Takes back what a test registers for `mimo_v2_flash`."""
    yield
    mine = CONFIG_MAPPING._extra_content.pop("mimo_v2_flash")
    del Auto._model_mapping._extra_content[mine]


@pytest.mark.usefixtures("undo_register")
def test_types_that_transformers_knows_stay_its_own_unless_asked(tmp_path):
    for known in ("llama", "mistral", "qwen2", "qwen3", "mimo_v2_flash"):
        assert CONFIG_MAPPING[known].__module__.startswith("transformers.models"), known
    load_model("mimo-v2-flash-tiny").save(tmp_path / "flash")
    interop.register("mimo_v2_flash")
    model = Auto.from_pretrained(tmp_path / "flash")
    assert isinstance(model, interop.SateenForCausalLM)
    ids = ids_of(1, 30)
    assert model(ids).logits.equal(load_model(tmp_path / "flash")(ids).logits)
    model.save_pretrained(tmp_path / "again")
    files = (tmp_path / folder / "model.safetensors" for folder in ("flash", "again"))
    first, second = (file.read_bytes() for file in files)
    assert first == second  # the MTP heads with it, which transformers' own class drops


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"device_map": "auto"}, "device_map 'auto' is not supported; accepted: one device"),
        ({"device_map": {"model": "cpu", "lm_head": "cpu"}}, "device_map .* is not supported"),
        ({"quantization_config": {"load_in_8bit": True}}, "from_pretrained: quantization_config is not"),
        ({"num_hidden_layers": 2}, "config: specs.* differ from those of the model"),
        ({"dtype": "int3"}, "dtype 'int3' is not accepted"),
    ],
)
def test_wishes_at_loading_that_are_not_met_are_refused(words, says, stored):
    folder = stored("mimo-7b-tiny")
    with pytest.raises(ConfigError, match=says):
        Auto.from_pretrained(folder, **words)


def test_a_hub_name_is_refused_with_what_a_model_is(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json here; a model is a directory"):
        interop.MiMoForCausalLM.from_pretrained(tmp_path / "MiMo-7B-RL")


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        ({"past_key_values": transformers.DynamicCache()}, ConfigError, "must be a cache that this model"),
        ({"inputs_embeds": torch.zeros(2, 9, 64)}, ConfigError, "forward: inputs_embeds is not supported"),
        ({"output_hidden_states": True}, ConfigError, "forward: output_hidden_states is not"),
        ({"position_ids": torch.arange(1, 10)[None]}, ShapeError, "position_ids must count the real tokens"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, ShapeError, "attention_mask of that shape"),
        (
            {"attention_mask": torch.tensor([[0] + [1] * 8] * 2), "labels": torch.ones(2, 9).long()},
            ShapeError,
            "labels at padded places must be -100",
        ),
    ],
)
def test_wishes_at_a_forward_that_are_not_met_are_refused(words, error, says, stored):
    model = Auto.from_pretrained(stored("mimo-7b-tiny"))
    with pytest.raises(error, match=says):
        model(ids_of(2, 9), **words)


def test_other_refusals(stored, tmp_path):
    model = Auto.from_pretrained(stored("mimo-7b-tiny"))
    ids = ids_of(1, 9)
    asked = transformers.GenerationConfig(cache_implementation="static")
    for words in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}, {"generation_config": asked}):
        with pytest.raises(ConfigError, match=r"generate: .* is not supported by sateen's models"):
            model.generate(ids, max_new_tokens=2, **words)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ShapeError, match=r"attention_mask is \(1, 2\) .* and 9 cached places"):
        model(ids[:, :2], attention_mask=torch.ones(1, 2), past_key_values=cache)
    with pytest.raises(ConfigError, match="goes without labels"):
        model(ids[:, :2], labels=ids[:, :2], past_key_values=cache)
    with pytest.raises(ConfigError, match="push_to_hub is not supported"):
        model.save_pretrained(tmp_path / "no", push_to_hub=True)
    with pytest.raises(ConfigError, match="resize_token_embeddings is not supported"):
        model.resize_token_embeddings(3)
    with pytest.raises(ConfigError, match="unknown text model_type 'mimo_audio'"):
        interop.register("mimo_audio")
    model.config.num_hidden_layers = 1
    with pytest.raises(ConfigError, match="specs, mtp differ from those of the model"):
        model.save_pretrained(tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_without_transformers_the_line_says_what_to_install():
    script = "import sys; sys.modules['transformers'] = None; import sateen.transformers"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'sateen[transformers]'" in found.stderr.splitlines()[-1]
