// Packed causal attention on the CPU: the arguments that the Python side fills and the kernels read.
#pragma once

#include "isa.h"

namespace sateen {

// A float32 tensor [tokens, heads, channels] whose channels are contiguous; strides in elements.
struct Rows {
    const float* data;
    long token_stride, head_stride;

    const float* at(long token, long head) const { return data + token * token_stride + head * head_stride; }
};

struct AttentionShape {
    Rows q, k, v;
    const float* sink;              // [N] logits that join the softmax without a value, or null
    const int *cu_q, *cu_k;         // [num_sequences + 1]
    long num_sequences;
    long T, S, N, K, H, V;          // tokens, keys, query heads, key/value heads, qk channels, value channels
    float scale;
    long window;                    // keys a query sees, its own included; 0: all earlier ones
    int num_threads;
};

// Keys and values of 16 bits; `AttentionShape` has their strides.
struct HalfRows {
    const unsigned short *k = nullptr, *v = nullptr;  // null: they are floats
    bool is_bf16 = false;                             // else float16
};

struct AttentionForward : AttentionShape {
    HalfRows half;
    float* out;                     // [T, N, V]
    float* lse;                     // [N, T], without the sink
};

struct AttentionBackward : AttentionShape {
    Rows d_out;
    const float* out;               // [T, N, V]
    const float* lse;               // [N, T]
    float *d_q, *d_k, *d_v;         // [T, N, H], [S, K, H], [S, K, V]
    float* d_sink;                  // [N], or null without sinks
};

SATEEN_DECLARE(attention_forward, AttentionForward)
SATEEN_DECLARE(attention_backward, AttentionBackward)

}  // namespace sateen
