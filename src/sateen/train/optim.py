"""The optimizers: AdamW for vectors, embeddings, output matrix and router; Muon for every other matrix.

`build_optimizer` sorts a model's parameters by name and shape; the training step calls `Optimizer.step` with
the schedule's factor; checkpoints read and write `state_tensors`, keyed by parameter name. Shape letters: E
experts, M rows, N columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sateen.config import AdamWConfig, MuonConfig
from sateen.errors import CheckpointError, ConfigError
from sateen.train.precision import has_bfloat16_matmul

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic in Keller Jordan's Muon (2024): steep at zero, values end in 0.7 to 1.2."""

NEWTON_SCHULZ_STEPS = 5


def orthogonalize(grad_EMN: Tensor) -> Tensor:
    """Each matrix of a stack with its singular values driven towards 1, by a quintic Newton-Schulz iteration.

    Runs in bfloat16 where the hardware multiplies it, twice as fast as float32 on such a CPU, and in float32
    elsewhere, where that measured five times faster than emulated bfloat16. The result is float32. Source:
    Keller Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = grad_EMN.shape[-2] > grad_EMN.shape[-1]
    x = (grad_EMN.mT if is_tall else grad_EMN).float()
    # Frobenius norm bounds the spectral norm, so every singular value starts in [0, 1].
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    if x.is_cuda or has_bfloat16_matmul():
        x = x.to(torch.bfloat16)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    x = x.float()
    return x.mT if is_tall else x


class Muon:
    """Momentum, orthogonalized per matrix; a 3-D parameter [E, M, N] counts as E matrices.

    The step is `p -= lr * sqrt(max(1, M / N)) * orthogonalize(nesterov momentum)` after decoupled decay.
    Matrices of one shape go through one batched iteration.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ):
        self.parameters = dict(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.buffers = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}
        shapes: dict[tuple[int, ...], list[str]] = {}
        for name, p in self.parameters.items():
            shapes.setdefault(tuple(p.shape[-2:]), []).append(name)
        self._groups = list(shapes.values())

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rate; parameters without a gradient stay."""
        lr = self.lr * factor
        for group in self._groups:
            names = [name for name in group if self.parameters[name].grad is not None]
            if not names:
                continue
            rows, columns = self.parameters[names[0]].shape[-2:]
            updates = []
            for name in names:
                grad = self.parameters[name].grad
                assert grad is not None
                buffer = self.buffers[name].lerp_(grad.float(), 1 - self.momentum)
                updates.append(grad.float().lerp(buffer, self.momentum).reshape(-1, rows, columns))
            stacked = orthogonalize(torch.cat(updates))
            scale = lr * max(1.0, rows / columns) ** 0.5
            for name, update in zip(names, torch.split(stacked, [len(u) for u in updates]), strict=True):
                p = self.parameters[name]
                p.mul_(1 - lr * self.weight_decay).add_(update.reshape(p.shape), alpha=-scale)

    def state_tensors(self) -> dict[str, Tensor]:
        """Momentum buffers by `momentum.<parameter>`."""
        return {f"momentum.{name}": buffer for name, buffer in self.buffers.items()}


class AdamW:
    """torch's fused AdamW, with its state by parameter name."""

    def __init__(
        self,
        decayed: Mapping[str, nn.Parameter],
        undecayed: Mapping[str, nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        self.parameters = {**decayed, **undecayed}
        self.lr = lr
        groups = [
            {"params": list(decayed.values()), "weight_decay": weight_decay},
            {"params": list(undecayed.values()), "weight_decay": 0.0},
        ]
        self.inner = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=True
        )
        for p in self.parameters.values():
            # Created here and not at the first step, so that state has one shape from the beginning.
            self.inner.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def step(self, factor: float) -> None:
        """One update at `factor` times the peak rate; parameters without a gradient stay."""
        for group in self.inner.param_groups:
            group["lr"] = self.lr * factor
        self.inner.step()

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by `<word>.<parameter>`."""
        return {
            f"{word}.{name}": self.inner.state[p][word]
            for name, p in self.parameters.items()
            for word in ("step", "exp_avg", "exp_avg_sq")
        }


class Optimizer:
    """Muon and AdamW side by side over disjoint parameters.

    Attributes:
        parts: `adamw` and, where it has parameters, `muon`.
        groups: part -> its parameter names; `adamw.decayed`, `adamw.undecayed`, `muon`.
        learning_rate: the recipe's peak rate (Muon's, where it is used); metrics report it times the factor.
    """

    def __init__(
        self, parts: Mapping[str, Muon | AdamW], groups: Mapping[str, list[str]], learning_rate: float
    ):
        self.parts = dict(parts)
        self.groups = dict(groups)
        self.learning_rate = learning_rate

    def parameters(self) -> Iterable[nn.Parameter]:
        """Every parameter that is trained."""
        for part in self.parts.values():
            yield from part.parameters.values()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for p in self.parameters():
            p.grad = None

    def step(self, factor: float = 1.0) -> None:
        """One update at `factor` (the schedule's value, 0 to 1) times the peak rates."""
        for part in self.parts.values():
            part.step(factor)

    def state_tensors(self) -> dict[str, Tensor]:
        """All state, live tensors, by `<part>.<word>.<parameter>`."""
        return {
            f"{label}.{key}": tensor
            for label, part in self.parts.items()
            for key, tensor in part.state_tensors().items()
        }

    @torch.no_grad()
    def load_state_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Overwrites the state with `state_tensors` of an equal optimizer.

        Raises:
            CheckpointError: names or shapes differ.
        """
        own = self.state_tensors()
        wrong = sorted(own.keys() ^ saved.keys()) or [k for k in own if own[k].shape != saved[k].shape]
        if wrong:
            raise CheckpointError(
                f"optimizer state does not fit this model and optimizer: {len(wrong)} tensors differ, first "
                f"{wrong[0]!r}; resume with the recipe that wrote it, or start a new run from its model"
            )
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def sort_parameters(model: nn.Module, *, with_muon: bool) -> dict[str, dict[str, nn.Parameter]]:
    """Trainable parameters by group: `muon`, `adamw.decayed`, `adamw.undecayed`.

    Matrices go to Muon except embedding, output matrix and router, whose rows are separate vectors; so do 3-D
    stacks of experts. Norms, biases, sinks and embeddings have no weight decay (ours: MiMo-7B §2.3 and
    MiMo-V2-Flash §3.2 give 0.1 and no exclusions); a tied output matrix counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, dict[str, nn.Parameter]] = {"muon": {}, "adamw.decayed": {}, "adamw.undecayed": {}}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim == 2 or (p.ndim == 3 and ".experts." in name)
        is_rows = name.endswith((".gate.weight", "lm_head.weight"))
        if p.ndim < 2 or id(p) in embeddings:
            groups["adamw.undecayed"][name] = p
        elif with_muon and is_matrix and not is_rows:
            groups["muon"][name] = p
        else:
            groups["adamw.decayed"][name] = p
    return groups


def build_optimizer(model: nn.Module, config: AdamWConfig | MuonConfig) -> Optimizer:
    """The optimizer of a model's trainable parameters.

    Raises:
        ConfigError: nothing is trainable.
    """
    groups = sort_parameters(model, with_muon=isinstance(config, MuonConfig))
    if not any(groups.values()):
        raise ConfigError("no parameter requires a gradient; unfreeze some before building the optimizer")
    rate = config.adamw_learning_rate if isinstance(config, MuonConfig) else config.learning_rate
    parts: dict[str, Muon | AdamW] = {}
    decayed, undecayed = groups["adamw.decayed"], groups["adamw.undecayed"]
    if decayed or undecayed:
        parts["adamw"] = AdamW(
            decayed, undecayed, lr=rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
    if isinstance(config, MuonConfig) and groups["muon"]:
        parts["muon"] = Muon(
            groups["muon"],
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
    return Optimizer(parts, {k: list(v) for k, v in groups.items()}, config.learning_rate)
