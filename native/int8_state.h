// What int8 attention keeps of a tile of query rows while blocks of keys go by, and how it ends.
#pragma once

#include "attention_rows.h"
#include "int8_quantize.h"

#include <math.h>

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kMaxBlock = 1024;  // keys
constexpr long kPitch = kMaxBlock + 64;  // rows of a power of two bytes would evict each other from the cache
constexpr long kRows = 48;        // rows of a tile: whole groups of kGroup rows, and of 12 for float values

inline long whole(long n, long to) { return n > 0 ? round_up(n, to) : to; }

// A tile's queries as codes, and what its online softmax carries from one block to the next.
struct RowStates {
    float *step, *shift, *top, *sum, *out;  // [kRows]; the size of a code in base-2 scores; what smoothing took off the lse; out [kRows, columns]
    int* start;                             // [kRows] -128 times the sum of the codes
    code* codes;                            // [kRows, stride]
    long stride, columns;

    static long size(long H, long V) { return kRows * (5 + whole(V, 16)) + kRows * whole(H, 64) / 4; }

    RowStates(float* at, long H, long V) : stride(whole(H, 64)), columns(whole(V, 16)) {
        step = at, shift = at + kRows, top = at + 2 * kRows, sum = at + 3 * kRows;
        start = reinterpret_cast<int*>(at + 4 * kRows);
        out = at + 5 * kRows;
        codes = reinterpret_cast<code*>(out + kRows * columns);
    }

    // Quantises rows [0, used) and begins `all`; `query(i)` is a row's channels.
    template <typename RowAt>
    void begin(RowAt query, long used, long H, float scale, const float* k_mean, long all = kRows) {
        for (long i = 0; i < used; ++i) {
            const float* const x = query(i);
            const RowCodes row = quantize_row(x, nullptr, H, scale < 0.0f ? -1.0f : 1.0f, codes + i * stride);
            for (long c = round_up(H, W); c < round_up(H, 4); ++c) codes[i * stride + c] = 0;
            step[i] = row.scale * (fabsf(scale) * kLog2e);
            start[i] = -128 * row.sum;
            float dot = 0.0f;
            if (k_mean)
                for (long c = 0; c < H; ++c) dot += x[c] * k_mean[c];
            shift[i] = scale * dot;
            top[i] = -kInf, sum[i] = 0.0f;
        }
        for (long i = used; i < all; ++i) {
            step[i] = sum[i] = shift[i] = 0.0f, top[i] = -kInf, start[i] = 0;
            for (long c = 0; c < stride; ++c) codes[i * stride + c] = 0;
        }
        for (long i = 0; i < all * columns; i += W) store(out + i, vfloat{});
    }
};

// Keys [first, first + count) of one sequence and key/value head. Values are codes, or floats [keys, columns].
struct KeyBlock {
    const byte* k;
    const float* k_scale;
    const code* v;
    const float* v_float;
    const float* v_scale;  // one per key, or null
    long first, count;
};

// Divides by the row sums, applies the sinks, and writes the tile's rows of `out` and `lse`.
// `v_scale` is per channel and `levels` what P's codes count to; null and 1 where the values have them already.
template <typename Problem>
void finish(const Problem& p, const Sequence& s, const Tile& tile, const RowStates& states, long head, const float* v_scale,
            float levels) {
    const long group = p.N / p.K;
    for (long i = 0; i < tile.last - tile.first; ++i) {
        const long row = tile.first + i, n = head * group + row % group, t = s.q0 + row / group;
        float* const out = p.out + (t * p.N + n) * p.V;
        const float sum = states.sum[i];
        const bool is_empty = tile.newest[i] < tile.oldest[i] || s.num_keys == 0;
        const float lse = is_empty ? -kInf : states.top[i] * kLn2 + logf(sum) + states.shift[i];
        p.lse[n * p.T + t] = lse;
        float factor = 1.0f / (sum * levels);
        if (p.sink) factor /= 1.0f + expf(p.sink[n] - lse);
        const float* const from = states.out + i * states.columns;
        // An empty row's values and scales may be anything, also not finite.
        for (long c = 0; c < p.V; ++c) out[c] = is_empty ? 0.0f : from[c] * factor * (v_scale ? v_scale[c] : 1.0f);
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
