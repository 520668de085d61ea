// Attention with int8 queries, keys and values on the CPU: the arguments that the Python side fills. What the words mean
// stands in src/sateen/ops/int8_attention; the algorithm is INT-FlashAttention (Chen et al. 2024, arXiv 2409.16997).
#pragma once

#include "attention.h"

namespace sateen {

// Float queries, keys and values, quantised here. `window` counts only with `is_causal`.
struct Int8Attention : AttentionShape {
    bool is_causal, smooth_k, float_values, scale_per_channel, sum_codes;
    int levels;                     // P's codes are 0..levels
    long block;                     // keys per block, a multiple of 64
    float* out;                     // [T, N, V]
    float* lse;                     // [N, T], without the sink
};

// Rows of a cache: codes [S, K, channels] without gaps, a scale per row and head. AttentionShape's k and v are not used.
struct Int8RowsAttention : AttentionShape {
    const signed char *k_codes, *v_codes;
    const float *k_scale, *v_scale; // [S, K]
    const float* k_mean;            // [num_sequences, K, H]
    long block;
    float* out;
    float* lse;
};

// The integer products alone, for tests: a [M, L] times b [S, L] transposed, or b [L, S]; both packed as attention does.
struct Int8Products {
    const signed char* queries;     // [M, L], or null
    const unsigned char* shares;    // [M, L], or null
    const signed char* b;
    long M, L, S;
    int* out;                       // [M, S]
};

SATEEN_DECLARE(int8_attention, Int8Attention)
SATEEN_DECLARE(int8_rows_attention, Int8RowsAttention)
SATEEN_DECLARE(int8_products, Int8Products)

}  // namespace sateen
