"""Config dictionaries by name: the published models, and small ones of the same structure.

Sources: `mimo-7b` arXiv 2505.07608 §2.2 and its config.json; `mimo-v2-flash` arXiv 2601.02780 Table 1
and its config.json, where `num_nextn_predict_layers` is ours (the released file leaves the three heads
to be counted).
"""

from __future__ import annotations

from typing import Any

from sateen.models import hysparse_presets

MIMO_7B: dict[str, Any] = {
    "architectures": ["MiMoForCausalLM"],
    "model_type": "mimo",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 640000,
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "vocab_size": 151680,
    "num_nextn_predict_layers": 1,
}

MIMO_V2_FLASH: dict[str, Any] = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "add_full_attention_sink_bias": False,
    "add_swa_attention_sink_bias": True,
    "attention_bias": False,
    "attention_value_scale": 0.707,
    "head_dim": 192,
    "v_head_dim": 128,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "swa_num_attention_heads": 64,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "hybrid_layer_pattern": [int(i != 0 and (i + 1) % 6 != 0) for i in range(48)],
    "moe_layer_freq": [int(i > 0) for i in range(48)],
    "intermediate_size": 16384,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
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
    "sliding_window": 128,
    "sliding_window_size": 128,
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 152576,
    "num_nextn_predict_layers": 3,
}

MIMO_7B_TINY: dict[str, Any] = MIMO_7B | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_theta": 10000,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
}

MIMO_V2_FLASH_TINY: dict[str, Any] = MIMO_V2_FLASH | {
    "hidden_size": 64,
    "head_dim": 24,
    "v_head_dim": 16,
    "swa_head_dim": 24,
    "swa_v_head_dim": 16,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 1,
    "swa_num_key_value_heads": 2,
    "num_hidden_layers": 6,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
    "moe_layer_freq": [0, 1, 1, 1, 1, 1],
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 15,
    "sliding_window_size": 15,
    "max_position_embeddings": 2048,
    "vocab_size": 512,
}

DEMO: dict[str, Any] = MIMO_V2_FLASH | {
    "hidden_size": 192,
    "head_dim": 48,
    "v_head_dim": 32,
    "swa_head_dim": 48,
    "swa_v_head_dim": 32,
    "partial_rotary_factor": 0.667,
    "attention_value_scale": 1.0,
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "hybrid_layer_pattern": [1, 1, 1, 0],
    "moe_layer_freq": [0, 1, 1, 1],
    "intermediate_size": 512,
    "mtp_intermediate_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 10000,
    "sliding_window": 63,
    "sliding_window_size": 63,
    "max_position_embeddings": 2048,
    "vocab_size": 1024,
    "num_nextn_predict_layers": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "demo": DEMO,
    "mimo-7b": MIMO_7B,
    "mimo-7b-tiny": MIMO_7B_TINY,
    "mimo-v2-flash": MIMO_V2_FLASH,
    "mimo-v2-flash-tiny": MIMO_V2_FLASH_TINY,
    **hysparse_presets.PRESETS,
}
