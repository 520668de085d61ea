"""Fairy±i's published shapes as config dictionaries, and a small one of the same structure.

Source: arXiv 2508.05571 and its published code (PKULab1806/Fairy-plus-minus-i). Sizes count complex entries;
`700m` and `1.3b` are complex weights in the projections. The small shape is ours.
"""

from __future__ import annotations

from typing import Any

FAIRY_700M: dict[str, Any] = {
    "architectures": ["ComplexNetLM"],
    "model_type": "complexnet",
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}

FAIRY_1_3B: dict[str, Any] = FAIRY_700M | {
    "hidden_size": 2048,
    "intermediate_size": 5460,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}

FAIRY_TINY: dict[str, Any] = {key: value for key, value in FAIRY_700M.items() if key != "torch_dtype"} | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
}

PRESETS: dict[str, dict[str, Any]] = {
    "fairy-700m": FAIRY_700M,
    "fairy-1.3b": FAIRY_1_3B,
    "fairy-tiny": FAIRY_TINY,
}
