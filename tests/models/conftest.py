"""Tiny random models of transformers, saved where ours can load them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "attn_implementation": "eager",
}  # fmt: skip

# A tiny MiMo-V2-Flash in the hub's own words, written by hand; `FLASH` of the tests is the same model.
HUB = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "",
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "attention_bias": False,
    "attention_chunk_size": 8,
    "attention_dropout": 0.0,
    "attention_value_scale": 0.707,
    "head_dim": 24,
    "v_head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "hybrid_block_size": None,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
    "moe_layer_freq": [0, 1, 1, 1, 1, 1],
    "num_hidden_layers": 6,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": None,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": None,
    "layernorm_epsilon": 1e-5,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000,
    "swa_rope_theta": 10000,
    "rope_scaling": {"type": "default"},
    "sliding_window": 8,
    "sliding_window_size": 8,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 97,
}


def fill(tensors: Iterable[tuple[str, Tensor]], seed: int = 0) -> None:
    """Moves every tensor away from its initial value, so that none can be ignored unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tensors:
            if tensor.is_floating_point():
                centre = 1.0 if name.endswith(("norm.weight", "layernorm.weight")) else 0.0
                spread = 0.3 if tensor.ndim < 2 else 1.5 / math.sqrt(tensor.shape[-1])
                tensor.normal_(centre, spread, generator=generator)


@pytest.fixture
def randomise() -> Callable[..., None]:
    """`fill` of this file."""
    return fill


@pytest.fixture
def hub() -> dict[str, Any]:
    """The config of `FLASH` as the hub spells it."""
    return dict(HUB)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Any]:
    """(config class, its arguments) -> a transformers model with random weights, saved to `tmp_path`."""
    transformers = pytest.importorskip("transformers", reason="needs the transformers package")

    def make(kind: str, arguments: dict[str, Any]) -> Any:
        config = getattr(transformers, kind)(**(COMMON | arguments))
        model = (
            transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        )
        fill(sorted(model.state_dict().items()))
        model.save_pretrained(tmp_path)
        return model

    return make


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """(batch, length) -> random token ids of the tiny vocabulary."""

    def draw(batch: int, length: int, seed: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, COMMON["vocab_size"], (batch, length), generator=generator)

    return draw


@pytest.fixture
def assert_close() -> Callable[[Tensor, Tensor], None]:
    """Fails where two models' outputs differ by more than 1e-4 in the mean or 1e-3 anywhere, relatively."""

    def check(got: Tensor, want: Tensor) -> None:
        gap = float((got - want).norm() / want.norm())
        assert gap < 1e-4, f"relative RMS error {gap:.1e}"
        assert float((got - want).abs().max() / want.abs().max()) < 1e-3

    return check
