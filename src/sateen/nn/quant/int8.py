"""Linear layers with weights of eight or four bits, for serving models that were trained without them.

`models.lowbit` puts them in the place of `nn.Linear` and of stacked experts; `ops.lowbit_matmul` computes
them. They have buffers and no parameters but the bias. Shape letters: E experts, S rows sorted by expert, F
and D the output and input width of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from sateen import ops
from sateen.errors import ConfigError
from sateen.nn.moe import Experts
from sateen.ops import PackedInt4, PackedInt8
from sateen.ops.lowbit_matmul.packing import PANEL
from sateen.ops.lowbit_matmul.reference import activation_codes

PACK: dict[str, Callable[[Tensor], PackedInt8 | PackedInt4]] = {"int8": ops.pack_int8, "int4": ops.pack_int4}
STORED: dict[str, type[PackedInt8] | type[PackedInt4]] = {"int8": PackedInt8, "int4": PackedInt4}


class _Serving(nn.Module):
    """What integer layers share: their form, and that they do not train.

    Attributes:
        weights: `int8` or `int4`.
    """

    def __init__(self, weights: str):
        super().__init__()
        self.weights = weights
        self.training = False

    def train(self, mode: bool = True) -> _Serving:
        """Refuses training: there is nothing a gradient could move.

        Raises:
            ConfigError: always, when `mode` is true.
        """
        if mode:
            raise ConfigError(
                f"{self.weights} weights are for serving and do not train; use the model they were made from"
            )
        super().train(False)
        return self


class IntegerLinear(_Serving):
    """`nn.Linear` whose weight is stored in eight or four bits a number.

    Attributes:
        weights: `int8` or `int4`.
        out_features, in_features: F and D.
        codes, scales: buffers, as in `ops.PackedInt8` and `ops.PackedInt4`.
        bias: the layer's own parameter, or None.
        dtype: of the weight before.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear, weights: str):
        super().__init__(weights)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias
        for name, tensor in self.pack(linear.weight).items():
            self.register_buffer(name, tensor)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The buffers of a weight [F, D]."""
        packed = PACK[self.weights](weight)
        return {"codes": packed.codes, "scales": packed.scales}

    def stored(self) -> PackedInt8 | PackedInt4:
        """The weight in the form that `ops.lowbit_matmul` takes."""
        return STORED[self.weights](self.codes, self.scales, self.out_features, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The matrix [F, D] that the codes stand for, in `dtype`; made anew each time."""
        return ops.unpack_lowbit(self.stored()).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.lowbit_matmul(x.reshape(-1, self.in_features), self.stored())
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.weights}, in_features={self.in_features}, out_features={self.out_features}"


class IntegerHead(IntegerLinear):
    """An output matrix: its inputs are rounded to int8 in two parts, the second what the first leaves.

    Its errors go straight into the logits, and while weights are waited for a second product costs little.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).float()
        codes, size = activation_codes(rows)
        rounded = (codes * size.unsqueeze(-1)).flatten(1)[:, : self.in_features]
        both = ops.lowbit_matmul(torch.cat([rows, rows - rounded]), self.stored())
        y = both[: len(rows)] + both[len(rows) :]
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class IntegerExperts(_Serving):
    """`Experts` whose matrices are stored in eight or four bits a number.

    Attributes:
        weights: `int8` or `int4`.
        gate_proj_codes, gate_proj_scales and so on: buffers, the experts stacked along the first axis.
    """

    def __init__(self, experts: Experts, weights: str):
        super().__init__(weights)
        stacks = dict(experts.named_parameters())
        self.shapes = {name: tuple(stack.shape[1:]) for name, stack in stacks.items()}
        for name, tensor in self.pack(stacks).items():
            self.register_buffer(name, tensor)

    def pack(self, stacks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The buffers of stacks [E, F, D]."""
        buffers = {}
        for name, stack in stacks.items():
            E, F, _ = stack.shape
            rows = functional.pad(stack.detach(), (0, 0, 0, -F % PANEL)).flatten(0, 1)
            packed = PACK[self.weights](rows)
            buffers[f"{name}_codes"] = packed.codes.unflatten(0, (E, -1))
            buffers[f"{name}_scales"] = packed.scales.unflatten(0, (E, -1))
        return buffers

    def forward(self, x_SD: Tensor, counts_E: Tensor) -> Tensor:
        """Expert outputs for rows sorted by expert; `counts_E` rows go to each."""
        outputs = []
        for expert, x in enumerate(x_SD.split(counts_E.tolist())):
            if len(x):
                inner = functional.silu(self._multiply("gate_proj", expert, x))
                outputs.append(
                    self._multiply("down_proj", expert, inner * self._multiply("up_proj", expert, x))
                )
        return torch.cat(outputs) if outputs else x_SD

    def _multiply(self, name: str, expert: int, x: Tensor) -> Tensor:
        codes, scales = (
            cast(Tensor, getattr(self, f"{name}_{part}"))[expert] for part in ("codes", "scales")
        )
        return ops.lowbit_matmul(x, STORED[self.weights](codes, scales, *self.shapes[name]))
