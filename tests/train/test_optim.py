"""Muon and AdamW by hand and against torch; parameter groups by name; state round trip."""

import pytest
import torch
from torch import nn

from sateen.config import AdamWConfig, MuonConfig
from sateen.errors import CheckpointError, ConfigError
from sateen.train.optim import Muon, build_optimizer, orthogonalize, sort_parameters


class Toy(nn.Module):
    """One parameter of every kind, under the names a decoder uses."""

    def __init__(self, tied: bool = False):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate = nn.Linear(4, 3, bias=False)
        self.mlp.gate_proj = nn.Linear(4, 6, bias=False)
        self.mlp.down_proj = nn.Linear(6, 4, bias=True)
        self.mlp.experts = nn.Module()
        self.mlp.experts.up_proj = nn.Parameter(torch.empty(3, 5, 4))
        self.sinks = nn.Parameter(torch.empty(2))
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        for p in self.parameters():
            nn.init.normal_(p, generator=g)

    def randomize_gradients(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            p.grad = torch.randn(p.shape, generator=g)


def quintic(s: float) -> float:
    """The fate of one singular value under five iterations, as a scalar recurrence."""
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.fixture
def float32_products(monkeypatch):
    """As on a CPU that has no bfloat16 products."""
    monkeypatch.setattr("sateen.train.optim.has_bfloat16_matmul", lambda: False)


@pytest.mark.parametrize("shape", [(4, 4), (3, 8), (8, 3), (1, 5)])
@pytest.mark.usefixtures("float32_products")
def test_orthogonalize_moves_singular_values_along_the_quintic(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, *shape, generator=g)
    got = orthogonalize(x)
    for a, b in zip(x.double(), got.double(), strict=True):
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        want = u @ torch.diag(torch.tensor([quintic(float(v)) for v in s / s.norm()]).double()) @ vh
        torch.testing.assert_close(b, want, rtol=1e-3, atol=1e-4)


def test_orthogonalize_in_bfloat16_stays_near_float32(monkeypatch):
    """Five rounds of products at 2^-8 each; measured 1.4 % of the norm."""
    x = torch.randn(3, 48, 96, generator=torch.Generator().manual_seed(1))
    found = []
    for has in (True, False):
        monkeypatch.setattr("sateen.train.optim.has_bfloat16_matmul", lambda has=has: has)
        found.append(orthogonalize(x))
    assert found[0].dtype == torch.float32
    assert not torch.equal(*found)
    assert ((found[0] - found[1]).norm() / found[1].norm()).item() < 0.03


@pytest.mark.usefixtures("float32_products")
def test_muon_first_step_by_hand():
    """Momentum only scales a first gradient, which the norm removes; a diagonal one keeps its directions."""
    p = nn.Parameter(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]]))
    p.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    Muon({"w": p}, lr=0.1, momentum=0.9, weight_decay=0.5).step(0.5)
    lr, scale = 0.05, 2**0.5  # sqrt(4 rows / 2 columns)
    want = [2 * (1 - lr * 0.5) - lr * scale * quintic(0.6), 2 * (1 - lr * 0.5) - lr * scale * quintic(0.8)]
    assert [p[0, 0].item(), p[1, 1].item()] == pytest.approx(want, rel=1e-5)


def test_muon_second_step_mixes_momentum_as_nesterov():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [3.0, 0.0]])
    p = nn.Parameter(torch.zeros(2, 2))
    muon = Muon({"w": p}, lr=1.0, momentum=0.9)
    for grad in (first, second):
        before = p.detach().clone()
        p.grad = grad
        muon.step(1.0)
    buffer = 0.9 * (0.1 * first) + 0.1 * second
    want = orthogonalize((0.1 * second + 0.9 * buffer)[None])[0]
    torch.testing.assert_close(p.detach(), before - want, rtol=1e-5, atol=1e-6)


def test_stacked_experts_step_as_separate_matrices():
    g = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 5, 4, generator=g)
    grads = torch.randn(3, 5, 4, generator=g)
    joint = nn.Parameter(stack.clone())
    joint.grad = grads.clone()
    Muon({"w": joint}, lr=0.1).step(1.0)
    for i in range(3):
        single = nn.Parameter(stack[i].clone())
        single.grad = grads[i].clone()
        Muon({"w": single}, lr=0.1).step(1.0)
        torch.testing.assert_close(joint[i], single, rtol=1e-5, atol=1e-6)


def test_groups_by_name():
    groups = {k: sorted(v) for k, v in sort_parameters(Toy(), with_muon=True).items()}
    assert groups == {
        "muon": ["mlp.down_proj.weight", "mlp.experts.up_proj", "mlp.gate_proj.weight"],
        "adamw.decayed": ["lm_head.weight", "mlp.gate.weight"],
        "adamw.undecayed": ["embed_tokens.weight", "mlp.down_proj.bias", "sinks"],
    }


def test_adamw_alone_takes_every_parameter_and_a_tied_head_is_not_decayed():
    groups = {k: sorted(v) for k, v in sort_parameters(Toy(tied=True), with_muon=False).items()}
    assert groups["muon"] == []
    assert "lm_head.weight" not in groups["adamw.decayed"]
    assert "embed_tokens.weight" in groups["adamw.undecayed"]
    assert "mlp.gate_proj.weight" in groups["adamw.decayed"]


def test_frozen_parameters_are_left_out():
    toy = Toy().requires_grad_(False)
    toy.sinks.requires_grad_(True)
    assert build_optimizer(toy, MuonConfig()).groups["adamw.undecayed"] == ["sinks"]
    with pytest.raises(ConfigError, match="unfreeze"):
        build_optimizer(Toy().requires_grad_(False), AdamWConfig())


def test_adamw_first_step_by_hand():
    """The first step is lr * sign(grad) beside the decay, whatever the size of the gradient."""
    toy = Toy()
    before = {n: p.detach().clone() for n, p in toy.named_parameters()}
    toy.randomize_gradients(1)
    build_optimizer(toy, AdamWConfig(learning_rate=0.1, weight_decay=0.5)).step(0.5)
    for name, p in toy.named_parameters():
        kept = 1.0 if name in ("embed_tokens.weight", "mlp.down_proj.bias", "sinks") else 1 - 0.05 * 0.5
        torch.testing.assert_close(
            p.detach(), before[name] * kept - 0.05 * p.grad.sign(), rtol=1e-4, atol=1e-5
        )


def test_state_round_trip_continues_bit_for_bit():
    config = MuonConfig()
    one, two = Toy(), Toy()
    a, b = build_optimizer(one, config), build_optimizer(two, config)
    for seed in (1, 2):
        one.randomize_gradients(seed)
        a.step(1.0)
    two.load_state_dict(one.state_dict())
    b.load_state_tensors({k: v.clone() for k, v in a.state_tensors().items()})
    for model, optimizer in ((one, a), (two, b)):
        model.randomize_gradients(3)
        optimizer.step(0.7)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name
    for name, tensor in a.state_tensors().items():
        assert torch.equal(tensor, b.state_tensors()[name]), name


def test_state_of_another_optimizer_is_refused():
    muon, adamw = build_optimizer(Toy(), MuonConfig()), build_optimizer(Toy(), AdamWConfig())
    with pytest.raises(CheckpointError, match=r"does not fit.*resume with the recipe"):
        adamw.load_state_tensors(muon.state_tensors())
