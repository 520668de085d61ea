"""One training step, which knows no method: objectives make losses, optimizers consume gradients.

A stage hands over one or more `(Objective, Optimizer)` pairs that run in turn on the same batches. Loops call
the step; data, schedules and checkpoints are theirs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sateen.errors import TrainingError
from sateen.nn.moe import MoE, update_router_bias
from sateen.train.objective import Objective
from sateen.train.optim import Optimizer
from sateen.train.precision import matmul_dtype


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Attributes:
        metrics: `loss`, `loss_<part>` and `grad_norm`; those of a second pair and later carry `<index>_` in
            front. expert_counts: layer index -> int64 [E] tokens each expert received, all micro-batches
            together.
    """

    metrics: dict[str, float]
    expert_counts: dict[int, Tensor]


class TrainStep:
    """Runs the pairs over the micro-batches of one step.

    Attributes:
        model: what the objectives run.
        pairs: objectives with the optimizers of the parameters they train.
        clip_norm: largest norm of all gradients of a pair; 0 only measures it.
        dtype: of the matmuls, see `train.precision`.
        router_bias_rate: step of the routers' selection biases; 0 leaves them.
    """

    def __init__(
        self,
        model: nn.Module,
        pairs: Sequence[tuple[Objective, Optimizer]],
        *,
        clip_norm: float = 1.0,
        dtype: torch.dtype = torch.float32,
        router_bias_rate: float = 0.0,
    ):
        self.model = model
        self.pairs = list(pairs)
        self.clip_norm = clip_norm
        self.dtype = dtype
        self.router_bias_rate = router_bias_rate
        self._moe = [m for m in model.modules() if isinstance(m, MoE)]

    def __call__(self, batches: Sequence[Any], factor: float = 1.0) -> StepResult:
        """One update of every pair.

        Args:
            batches: the micro-batches; objectives normalise over all of them.
            factor: the schedule's value, multiplies the peak learning rates.

        Raises:
            TrainingError: a loss or gradient is not finite; the pair's parameters are untouched.
        """
        metrics: dict[str, float] = {}
        counts: dict[int, Tensor] = {}
        for index, (objective, optimizer) in enumerate(self.pairs):
            prefix = f"{index}_" if index else ""
            optimizer.zero_grad()
            sums, pair_counts = self._accumulate(objective, batches)
            parameters = [p for p in optimizer.parameters() if p.grad is not None]
            if self.clip_norm > 0:
                norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm, foreach=True)
            else:
                norm = nn.utils.get_total_norm(
                    [p.grad for p in parameters if p.grad is not None], foreach=True
                )
            values = {name: float(value) for name, value in sums.items()} | {"grad_norm": float(norm)}
            _check_finite(values)
            optimizer.step(factor)
            optimizer.zero_grad()
            metrics |= {f"{prefix}{name}": value for name, value in values.items()}
            counts = counts or pair_counts
        if self.router_bias_rate > 0:
            for layer in self._moe:
                if layer.layer_index in counts:
                    update_router_bias(layer.gate, counts[layer.layer_index], self.router_bias_rate)
        return StepResult(metrics, counts)

    def _accumulate(
        self, objective: Objective, batches: Sequence[Any]
    ) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
        """Gradients of all micro-batches added up in the parameters; summed losses and expert counts."""
        objective.begin_step(batches)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        counts: dict[int, Tensor] = {}
        device = next(self.model.parameters()).device.type
        for batch in batches:
            with matmul_dtype(device, self.dtype):
                loss = objective.loss(self.model, batch)
            if loss.total.requires_grad:
                loss.total.backward()
            named = {"loss": loss.total.detach()} | {f"loss_{k}": v for k, v in loss.parts.items()}
            for name, value in named.items():
                sums[name] = sums[name].to(value.device) + value
            for layer, count in loss.expert_counts.items():
                counts[layer] = counts[layer] + count if layer in counts else count
        return dict(sums), counts


def _check_finite(values: dict[str, float]) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        raise TrainingError(
            f"{bad[0]} is not finite ({shown}); the parameters are those before this step; lower the "
            "learning rate or the clip norm and resume from the last checkpoint"
        )
