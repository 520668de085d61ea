"""Configs of audio tokenizers by name: the published one, and a small one of the same structure.

Source: the values that two ports of the published checkpoint agree on (sgl-project/sglang-jax, mlx-audio).
"""

from __future__ import annotations

from typing import Any

# The values of the published checkpoint.
MIMO_AUDIO_TOKENIZER: dict[str, Any] = {
    "model_type": "mimo_audio_tokenizer",
    "max_audio_seconds": 1800,
    "stride_size": 2,
    "avg_pooler": 2,
    "d_model": 1280,
    "scale_embedding": False,
    "kernel_size": 3,
    "activation_function": "gelu",
    "encoder_layers": 32,
    "encoder_skip_layer_id": 3,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_causal": False,
    "encoder_attn_window_size": [-1, -1],
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "decoder_kernel_size": 3,
    "decoder_stride_size": 2,
    "decoder_causal": True,
    "decoder_attn_window_size": [-1, -1],
    "nfft": 960,
    "window_size": 960,
    "hop_length": 240,
    "n_mels": 128,
    "sampling_rate": 24000,
    "fmin": 0,
    "fmax": None,
    "vocoder_dim": 256,
    "vocoder_intermediate_dim": 1024,
    "vocoder_num_layers": 16,
    "vocoder_attention_heads": 16,
    "vocoder_attn_window_size": [40, 10],
    "vocoder_padding": "same",
    "num_quantizers": 20,
    "codebook_size": [1024, 1024] + [128] * 18,
    "threshold_ema_dead_code": 2,
    "position_embedding_type": "rope",
    "rope_theta": 10000,
    "rope_type": "default",
    "ln_type": "LayerNorm",
}

# The same structure at 16 kHz for a CPU (source: ours).
MIMO_AUDIO_TOKENIZER_MINI: dict[str, Any] = MIMO_AUDIO_TOKENIZER | {
    "d_model": 128,
    "encoder_layers": 6,
    "encoder_skip_layer_id": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 512,
    "decoder_layers": 6,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 512,
    "nfft": 640,
    "window_size": 640,
    "hop_length": 160,
    "n_mels": 80,
    "sampling_rate": 16000,
    "vocoder_dim": 128,
    "vocoder_intermediate_dim": 512,
    "vocoder_num_layers": 4,
    "vocoder_attention_heads": 4,
    "num_quantizers": 8,
    "codebook_size": [256, 256] + [64] * 6,
}

AUDIO_TOKENIZER_PRESETS: dict[str, dict[str, Any]] = {
    "mimo-audio-tokenizer": MIMO_AUDIO_TOKENIZER,
    "mimo-audio-tokenizer-mini": MIMO_AUDIO_TOKENIZER_MINI,
}
