"""HySparse's published shapes as config dictionaries, and small ones of the same structure.

Sources: `hysparse-7b`, `hysparse-80b-a3b` arXiv 2602.03560 Table 1 and §4.1; `-h2` and `hysparse2-80b-a3b`
arXiv 2609.26368 Table 1 and §4.1. Ours, because the papers do not say: vocabularies, MLP and expert widths,
the router, norm epsilon and initialisation, where the 7B's last full layers stand, and the order of
HySparse2's layers. The successor's simplified residual mixing is not part of these configs.
"""

from __future__ import annotations

from typing import Any

FULL, SLIDING, SPARSE = "full_attention", "sliding_attention", "sparse_attention"

HYSPARSE_7B: dict[str, Any] = {
    "architectures": ["HySparseForCausalLM"],
    "model_type": "hysparse",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    # 1:3 over 36 layers would end in a sparse layer, which §4.1 rules out.
    "layer_types": [FULL if i % 4 == 0 or i == 35 else SPARSE for i in range(36)],
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "v_head_dim": 128,
    "sparse_select": "block",
    "sparse_local": "gated",
    "sparse_bridge": False,
    "sparse_block_size": 64,
    "sparse_topk_tokens": 1024,
    "gate_granularity": "head",
    "sink_sa": True,
    "sink_swa": True,
    "sliding_window": 128,
    "rope_theta": 640000,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.006,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
    "vocab_size": 151680,
}

_SHARED = {key: value for key, value in HYSPARSE_7B.items() if key != "intermediate_size"}

HYSPARSE_80B: dict[str, Any] = _SHARED | {
    "hidden_size": 2048,
    "num_hidden_layers": 49,
    "layer_types": [FULL if i % 12 == 0 else SPARSE for i in range(49)],
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "n_routed_experts": 512,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
}

HYSPARSE_80B_H2: dict[str, Any] = HYSPARSE_80B | {"head_dim": 192, "max_position_embeddings": 262144}

HYSPARSE2_80B: dict[str, Any] = HYSPARSE_80B | {
    # 25 layers before the cut, one of them full, then four times one full and five sparse.
    "layer_types": [*[SLIDING] * 12, FULL, *[SLIDING] * 12, *[FULL, *[SPARSE] * 5] * 4],
    "num_key_value_heads": 1,
    "head_dim": 256,
    "v_head_dim": 256,
    "sparse_select": "token",
    "sparse_local": "forced",
    "sparse_bridge": True,
    "sparse_bridge_source": 12,
    "swa_output_gate": True,
    "partial_rotary_factor": 0.0,
    "swa_partial_rotary_factor": 0.25,
    "swa_rope_theta": 10000,
    "max_position_embeddings": 262144,
}

HYSPARSE_TINY: dict[str, Any] = HYSPARSE_7B | {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 7,
    "layer_types": [FULL, SPARSE, SPARSE, FULL, SPARSE, SPARSE, FULL],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "v_head_dim": 32,
    "sparse_block_size": 16,
    "sparse_topk_tokens": 64,
    "sliding_window": 32,
    "rope_theta": 10000,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "vocab_size": 1024,
}

HYSPARSE_MOE_TINY: dict[str, Any] = {
    key: value for key, value in HYSPARSE_TINY.items() if key != "intermediate_size"
} | {
    "num_hidden_layers": 9,
    "layer_types": [FULL, SPARSE, SPARSE, SPARSE, FULL, SPARSE, SPARSE, SPARSE, FULL],
    "num_attention_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
}

HYSPARSE2_TINY: dict[str, Any] = HYSPARSE2_80B | {
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SPARSE, SPARSE, FULL, SPARSE],
    "sparse_bridge_source": 1,
    "num_attention_heads": 4,
    "head_dim": 16,
    "v_head_dim": 16,
    "sparse_topk_tokens": 24,
    "sliding_window": 8,
    "swa_partial_rotary_factor": 0.5,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
}

PRESETS: dict[str, dict[str, Any]] = {
    "hysparse-7b": HYSPARSE_7B,
    "hysparse-80b-a3b": HYSPARSE_80B,
    "hysparse-80b-a3b-h2": HYSPARSE_80B_H2,
    "hysparse-moe-tiny": HYSPARSE_MOE_TINY,
    "hysparse-tiny": HYSPARSE_TINY,
    "hysparse2-80b-a3b": HYSPARSE2_80B,
    "hysparse2-tiny": HYSPARSE2_TINY,
}
