"""Activation checkpointing, switched on for a model that trains; `nn.recompute` does it."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from sateen.models.decoder import DecoderLayer
from sateen.nn.mtp import MTPHead
from sateen.nn.recompute import Recompute
from sateen.train.precision import matmul_dtype


def checkpoint_activations(model: nn.Module, dtype: torch.dtype) -> None:
    """Lets every layer and MTP head of a model keep its inputs alone, patch transformers included.

    Args:
        model: on the device where it trains.
        dtype: of the step's matmuls; second forwards run in it, and the backward pass around them does not.
    """
    recompute = Recompute(partial(matmul_dtype, next(model.parameters()).device.type, dtype))
    for module in model.modules():
        if isinstance(module, DecoderLayer | MTPHead):
            module.recompute = recompute
