"""Training through two-bit weights: the qat stage on a tiny run, and models that learn a batch by heart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from sateen.checkpoint import hf
from sateen.checkpoint.state import latest_checkpoint
from sateen.config import AdamWConfig, QATConfig, RunConfig, Silent, StageContext, stage_function
from sateen.errors import ConfigError
from sateen.models.base import ModelConfig
from sateen.models.decoder import Decoder
from sateen.models.quantize import linear_bytes, pack_model
from sateen.nn.complex import ComplexLinear
from sateen.nn.spec import QuantSpec
from sateen.train.metrics import read_metrics
from sateen.train.qat import quant_spec


def recipe(texts: Path, *stages: dict, model: dict | None = None, vocabulary: int = 300) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test", "seed": 3, "threads": 1,
            "model": model or {"preset": "mimo-7b-tiny", "overrides": {"vocab_size": 300, "hidden_size": 32}},
            "tokenizer": {"vocab_size": vocabulary},
            "data": {"text": {"kind": "text_dir", "path": str(texts)}},
            "stages": list(stages),
        }
    )  # fmt: skip


def stage(name: str, steps: int, **changes) -> dict:
    return {"stage": name, "tokens": steps * 256, "seq_len": 64, "tokens_per_batch": 256} | changes


def run(config: RunConfig, folder: Path, index: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    one = config.stages[index]
    stage_function(one.stage)(StageContext(config, one, index, folder, Silent()))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_defaults_are_those_of_the_published_code():
    fairy2i = QATConfig(tokens=1)
    assert fairy2i.optimizer == AdamWConfig(
        learning_rate=3e-5, betas=(0.9, 0.95), weight_decay=0.0, clip_norm=2.0
    )
    assert quant_spec(fairy2i) == QuantSpec("fairy2i", stages=2, act="float")
    assert quant_spec(QATConfig(tokens=1, method="phase")) == QuantSpec("phase", act="int8")
    asked = QATConfig(tokens=1, num_stages=1, activations="int8", skip=("lm_head", "mtp"))
    assert quant_spec(asked) == QuantSpec("fairy2i", stages=1, act="int8", skip=("lm_head", "mtp"))


def test_a_pretrained_model_learns_on_in_two_bits_and_resumes_bit_for_bit(texts, tmp_path):
    before = stage("pretrain", 16, optimizer={"name": "adamw", "learning_rate": 1e-2})
    optimizer = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.0, "clip_norm": 2.0}
    after = stage("qat", 12, optimizer=optimizer, checkpoint_every_tokens=6 * 256)
    config = recipe(texts, before, after)
    run(config, tmp_path / "run")
    pretrained = hf.load(tmp_path / "run" / "model")
    run(config, tmp_path / "run", 1)
    seen = losses(tmp_path / "run")
    assert seen[-1] < seen[16]
    model = hf.load_model(tmp_path / "run" / "model")
    assert model.config.quant == QuantSpec("fairy2i", stages=2, act="float")
    moved = model.model.layers[0].mlp.up_proj.weight - pretrained.model.layers[0].mlp.up_proj.weight
    assert float(moved.detach().abs().max()) > 1e-4

    # The same stage, cut after its first checkpoint and taken up again.
    saved = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert len(saved) == 2
    whole = latest_checkpoint(tmp_path / "run")
    state = hf.load(whole.hf).state_dict()
    for part in sorted(whole.hf.parent.rglob("*"), reverse=True):
        part.unlink() if part.is_file() else part.rmdir()
    whole.hf.parent.rmdir()
    (tmp_path / "run" / "model").unlink()
    run(config, tmp_path / "run", 1)
    for name, tensor in hf.load(latest_checkpoint(tmp_path / "run").hf).state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_the_stage_starts_from_a_stored_model(texts, tmp_path):
    source = recipe(texts, stage("pretrain", 1))
    run(source, tmp_path / "first")
    given = tmp_path / "first" / "model"
    shape = {"config": str(given.resolve() / "config.json")}
    qat = stage("qat", 1, method="int2", model=str(given), optimizer={"name": "adamw", "learning_rate": 1e-9})
    run(recipe(texts, qat, model=shape), tmp_path / "second")
    start, end = hf.load(given), hf.load(tmp_path / "second" / "model")
    assert end.config.quant == QuantSpec("int2")
    for (name, a), b in zip(start.state_dict().items(), end.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)

    with pytest.raises(ConfigError, match=r"stages\.1\.model = .* would drop what the stages before trained"):
        run(recipe(texts, stage("pretrain", 1), qat), tmp_path / "first", 1)
    other = {"preset": "mimo-7b-tiny", "overrides": {"vocab_size": 320, "hidden_size": 32}}
    with pytest.raises(ConfigError, match="no model of the shape that the recipe's `model` describes"):
        run(recipe(texts, qat, model=other), tmp_path / "third")
    with pytest.raises(ConfigError, match="the run's tokenizer is not that of"):
        run(recipe(texts, qat, model=shape, vocabulary=280), tmp_path / "fourth")


def test_packed_weights_are_not_trained(texts, tmp_path):
    run(recipe(texts, stage("qat", 1, method="ternary")), tmp_path / "run")
    hf.save(pack_model(hf.load(tmp_path / "run" / "model")), tmp_path / "packed")
    qat = stage("qat", 1, method="ternary", model=str(tmp_path / "packed"))
    with pytest.raises(ConfigError, match="the model has ternary weights already, packed"):
        run(recipe(texts, qat), tmp_path / "again")


# Name -> family, width h, width f inside the MLP, method. The complex model has N complex weights of 2 bits,
# four real products per token each. Real two-bit models of its widths store as many bits; those of twice the
# widths do as many products. Stored floats take 16 bits.
COMPLEX = {"complex": ("complexnet", 64, 160, "phase")}
EQUAL_BYTES = COMPLEX | {
    "fairy2i": ("llama", 64, 160, "fairy2i"),
    "ternary": ("llama", 64, 160, "ternary"),
    "int2": ("llama", 64, 160, "int2"),
    "float": ("llama", 24, 48, None),
}
EQUAL_PRODUCTS = {
    "ternary": ("llama", 128, 320, "ternary"),
    "int2": ("llama", 128, 320, "int2"),
    "float": ("llama", 128, 320, None),
}


def small(kind: str, h: int, f: int, method: str | None) -> Decoder:
    raw = {
        "model_type": kind, "vocab_size": 64, "hidden_size": h, "intermediate_size": f,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "initializer_range": 0.05, "quantization_config": {"quant_method": method} if method else None,
    }  # fmt: skip
    return Decoder(ModelConfig.from_hf(raw)).init_weights(0)


def linears(model: Decoder) -> int:
    """Weights in the projections, a complex one counted once."""
    complex_ones = any(isinstance(module, ComplexLinear) for module in model.modules())
    named = [p for name, p in model.named_parameters() if "_proj." in name]
    return sum(p.numel() for p in named) // (2 if complex_ones else 1)


def overfit(model: Decoder, steps: int = 60, rate: float = 0.01) -> tuple[float, float]:
    """The first and the last loss on 64 random tokens; the rate rises over 10 steps and falls to the end."""
    ids = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    seen = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        seen.append(loss.item())
    return seen[0], seen[-1]


@pytest.mark.parametrize(
    ("models", "name"),
    [(EQUAL_BYTES, name) for name in EQUAL_BYTES] + [(EQUAL_PRODUCTS, name) for name in EQUAL_PRODUCTS],
    ids=[f"bytes-{name}" for name in EQUAL_BYTES] + [f"products-{name}" for name in EQUAL_PRODUCTS],
)
def test_a_batch_is_learnt_by_heart(models, name):
    model = small(*models[name])
    N = linears(small(*COMPLEX["complex"]))
    if models is EQUAL_BYTES:
        bits = 16 if name == "float" else 2
        assert bits * linears(model) == pytest.approx(2 * N, rel=0.03)
    else:
        assert linears(model) == 4 * N
    first, last = overfit(model)
    assert last <= 0.1 * first, f"{first:.3f} -> {last:.4f}"


def test_bits_of_the_packed_forms_without_padding():
    for name, bits in {"complex": 2, "ternary": 2, "int2": 2}.items():
        kind, _, _, method = EQUAL_BYTES[name]
        model = pack_model(small(kind, 256, 512, method))
        found = linear_bytes(model)
        weights = found["weights"] // (2 if name == "complex" else 1)
        scales = found["layers"] * (8 if name == "complex" else 4)
        assert 8 * (found["bytes"] - scales) == bits * weights
    # Two stages of U and W: two bits per real weight, columns of a half padded from 256 to a multiple of 256.
    found = linear_bytes(pack_model(small("llama", 512, 1024, "fairy2i")))
    assert 8 * (found["bytes"] - 32 * found["layers"]) == 2 * found["weights"]
