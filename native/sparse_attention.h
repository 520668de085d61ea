// Attention over listed key blocks, and full attention that says which blocks to list: the arguments that the Python
// side fills and the kernels read.
#pragma once

#include "isa.h"
#include "linear.h"

namespace sateen {

// A tensor [tokens, heads, channels] of float32, bfloat16 or float16 whose channels are contiguous; strides in numbers.
struct NumberRows {
    const void* data;
    Format format;
    long token_stride, head_stride;
};

struct NumbersShape {
    NumberRows q, k, v;
    const float* sink;           // [N] logits that join the softmax without a value, or null
    const int *cu_q, *cu_k;      // [num_sequences + 1]
    long num_sequences;
    long T, S, N, K, H, V;       // tokens, keys, query heads, key/value heads, qk channels, value channels
    long block_size;             // keys per block; block b of a sequence is its keys from b * block_size on
    float scale;
    int num_threads;
};

struct SparseShape : NumbersShape {
    const int* lists;            // [K, T, listed] block numbers, distinct in a row; -1 pads
    long listed;
};

struct SparseForward : SparseShape {
    float* out;                  // [T, N, V]
    float* lse;                  // [N, T], without the sink
};

struct SparseBackward : SparseShape {
    NumberRows d_out;
    const float* out;            // [T, N, V]
    const float* lse;            // [N, T]
    float *d_q, *d_k, *d_v;      // [T, N, H], [S, K, H], [S, K, V]
    float* d_sink;               // [N], or null without sinks
};

// Causal attention without a window that also gives the largest score of every block, or the blocks chosen by it.
struct OracleForward : NumbersShape {
    float* out;                  // [T, N, V]
    float* lse;                  // [N, T], without the sink
    float* maxima;               // [N, T, num_blocks], -inf where no key is visible; or null
    int* lists;                  // [K, T, listed + recent]; or null
    long num_blocks, listed;
    long forced_window, recent;  // newest keys whose blocks, at most `recent`, are listed besides; 0: none
    bool is_mean;                // a group ranks a block by the mean of its heads' probabilities, else by the largest
};

SATEEN_DECLARE(sparse_forward, SparseForward)
SATEEN_DECLARE(sparse_backward, SparseBackward)
SATEEN_DECLARE(oracle_forward, OracleForward)

}  // namespace sateen
