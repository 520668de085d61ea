// One decode step on the CPU: the layers of a decoder for a few packed tokens against the engine's caches, in one call.
// decode_plan.h collects what stays from step to step, decode_step.cpp computes.
//
// Shape letters: T tokens, B sequences, D hidden size, N query heads, K key/value heads, H and V their channels,
// F feed-forward size, E experts, A active experts per token.
#pragma once

#include "isa.h"
#include "linear.h"

namespace sateen {

// Where the threads of a step meet; zero before the first time.
struct Meeting {
    int arrived;
    char apart[60];  // another cache line
    int round;
};

// What int8 rows have besides their codes; see src/sateen/engine/cache/kv_cache.py.
struct CacheScales {
    float *k, *v;    // [rows, K]; null for rows of floats
    float* k_mean;   // [slots, K, H], what was taken off the keys of each sequence
    bool integers;   // attention with integer products; otherwise over the floats that the codes stand for
};

// The rows of one layer's cache: [rows, K, H] keys and [rows, K, V] values.
struct CacheRows {
    void *k, *v;
    Format format;   // f32, bf16 or f16, or int8 with scales
    long ring_rows;  // rows of a sequence's ring; 0 for pages
    CacheScales scales;
};

// A mixture of experts; `gate`, `up` and `down` of the layer are then those of expert 0, the others follow in memory.
struct Experts {
    long E, A;          // E = 0: a dense layer
    Linear router;      // float32 [E, D]
    const float* bias;  // [E], for the choice alone
    float scaling;      // of the routed output
    bool normalised;    // the weights of a token's experts are divided by their sum
    long routes;        // experts per token of all layers before this one
};

// What stands around the layer of an MTP head.
struct DecodeHead {
    const float *hidden_norm, *embedding_norm, *final_norm;  // [D]
    Linear join;                                             // [D, 2 D]
    bool hidden_first;
};

// What layers of HySparse have besides; see decode_sparse.h. All zero in other layers.
struct SparseParts {
    long listed, recent;             // of an oracle: blocks that a query chooses, and most that its newest keys touch
    long block_size, forced_window;  // keys
    long lists;                      // columns of the lists of all oracles before this one, all heads
    int source;                      // of a reader: 1 + the oracle whose rows it reads
    int angles;                      // its queries' over them
    const float* sink;               // [N] over them, or null
    Linear gate;                     // [branches N, D] or [branches N V, D]; no rows: no gate
    bool lends_input, borrows_input; // the normed input, for keys and values of later layers
};

// A layer without rows in `k` has none of its own: then `cache`, K, H and V are those of its source.
struct DecodeLayer {
    const float *input_norm, *mlp_norm;  // [D]
    const float *q_norm, *k_norm;        // [H] or null
    const float* sink;                   // [N] or null
    Linear q, k, v, o, gate, up, down;
    CacheRows cache;
    long N, K, H, V, F;
    float value_scale;
    int angles, span;  // which of the step's
    Experts experts;
    SparseParts sparse;
};

// Rotary angles of one base: cosines and sines [T, half] of the step's positions.
struct Angles {
    const float* frequencies;  // [half]
    long half;
    float *cos, *sin;
};

// Keys [from, to) for rows [first, first + rows) of one sequence, where row r is query r / G of a head's group r % G.
struct SpanTask {
    long sequence, first, rows, from, to;
    long state;  // rows of all tasks before this one
};

// The tasks of one tile of rows, one after another.
struct SpanTile {
    long first_task, num_tasks;
};

// How attention is divided in all layers with the same group size and window.
struct Span {
    long group, window;  // G = N / K; keys a query sees, 0: all
    long num_tasks, state_rows;
    const SpanTask* tasks;
    const SpanTile* tiles;
    const long* first_tile;  // [B]
};

constexpr long kSpanRows = 32;  // rows that share each block of keys

// Scratch of a step, sized by decode_plan.cpp. Channels of qr, kr and vr are padded to whole vectors of 16.
struct DecodeScratch {
    float *normed, *q, *k, *v, *qr, *kr, *vr, *states, *attended, *gate, *up, *y, *joined;
    float* own_rows;                    // of layers with int8 rows: see decode_int8.h
    float *listed_q, *listed_out, *gates, *lent_input, *maxima;  // see decode_sparse.h
    float *scores, *shares, *expert_y;  // of mixtures: [T, E], [T, A], [T A, D]
    int *slots, *groups;                // of mixtures: see decode_moe.h
    void* prepared;
    int* counters;
    Meeting* meeting;
};

struct DecodeStep : DecodeScratch {
    const DecodeLayer* layers;
    long num_layers, D, T, B, page;  // page: rows
    float eps;
    const Angles* angles;
    long num_angles;
    const Span* spans;
    const long* first_token;  // [B + 1]
    const long* start;        // [B] rows in the cache before this step
    const long* page_rows;    // first row of every page, sequence after sequence
    const long* first_page;   // [B]
    const long* slot;         // [B] which ring
    const long* mean_rows;    // [B] first rows, at most, whose mean int8 keys are stored without
    const long* sequence;     // [T]
    const long* ids;          // [T]
    Linear embedding;
    const DecodeHead* head;   // null for the trunk
    const float* hidden;      // [T, D] what a head reads
    float* x;                 // [T, D] the residual stream, at the end the result
    long longest;             // keys of the longest sequence
    int* lists;               // the blocks of every oracle's queries: [K, T, listed + recent], one after another
    int* routes;              // the experts of every layer, one layer's [T, A] after another
    int num_threads;
};

// Logits [M, rows of `head`] of hidden states x [M, D]; `norm` is null where they are normed already.
struct DecodeLogits : DecodeScratch {
    const float *x, *norm;
    long M, D;
    float eps;
    Linear head;
    float* logits;
    int num_threads;
};

SATEEN_DECLARE(decode_step, DecodeStep)
SATEEN_DECLARE(decode_logits, DecodeLogits)

}  // namespace sateen
