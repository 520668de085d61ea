// Attention of a decode step over bfloat16 rows with the processor's bfloat16 dot products: cached rows are read as they
// lie, queries and the weights of the softmax are rounded to bfloat16, sums are float32.
#pragma once

#include "decode.h"
#include "linear_float.h"

namespace sateen::SATEEN_ISA {
namespace {

#ifdef __AVX512BF16__
constexpr long kPairs = 32;  // channels of one vector

inline bool fits_bf16(const DecodeLayer& l) { return l.cache.format == Format::bf16 && l.H % kPairs == 0 && l.V % kPairs == 0; }

// Some keys of one key/value head: rows `stride` numbers apart.
struct Bf16Keys {
    const bits16 *k, *v;
    long k_stride, v_stride, count;
};

SATEEN_INLINE __m512bh load_pairs(const bits16* p) { return load_all<__m512bh>(p); }

// Scores of one row of queries [H] and at most kBlock keys, -inf beyond `visible`; returns the largest.
inline float bf16_scores(const Bf16Keys& keys, long H, const bits16* q, vint newest, vint oldest, long begin, float* scores) {
    vint lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    vfloat top = splat(-kInf);
    for (long s = 0; s < keys.count; s += W) {
        vfloat dot[W];
        const bits16* key[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
            dot[i] = vfloat{};
            key[i] = keys.k + (s + i < keys.count ? s + i : keys.count - 1) * keys.k_stride;
        }
        for (long h = 0; h < H; h += kPairs) {
            const __m512bh x = load_pairs(q + h);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) dot[i] = Bf16::add(dot[i], load_pairs(key[i] + h), x);
        }
        const vint at = lane + splat_int(int(begin + s));
        const vint seen = (at <= newest) & (at >= oldest) & (at < splat_int(int(begin + keys.count)));
        const vfloat x = seen ? sum_each(dot) : splat(-kInf);
        store(scores + s, x);
        top = maximum(x, top);
    }
    return max_lanes(top);
}

// Pairs of neighbouring keys, channel by channel: even lanes one key, odd lanes the next. The order of the channels is
// that of in_order().
struct KeyPair {
    __m512bh low, high;

    KeyPair(const bits16* one, const bits16* other) {
        const __m512i a = load_all<__m512i>(one), b = other ? load_all<__m512i>(other) : __m512i{};
        low = (__m512bh)_mm512_maskz_unpacklo_epi16(0xffffffff, a, b);
        high = (__m512bh)_mm512_maskz_unpackhi_epi16(0xffffffff, a, b);
    }
};

// Two vectors of sums of 32 channels, from the order of KeyPair to that of memory.
SATEEN_INLINE void in_order(vfloat& low, vfloat& high) {
    const vfloat first = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const vfloat second = __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    low = first, high = second;
}

// out[row] += weights[row] times the values, for ROWS rows; `weights` is bfloat16 [rows, width], zeros behind the last key.
template <int ROWS>
inline void add_values(const Bf16Keys& keys, long V, const bits16* weights, long width, float* out) {
    for (long c = 0; c < V; c += kPairs) {
        vfloat low[ROWS], high[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) low[i] = high[i] = vfloat{};
        for (long s = 0; s < keys.count; s += 2) {
            const bits16* const one = keys.v + s * keys.v_stride + c;
            const KeyPair pair(one, s + 1 < keys.count ? one + keys.v_stride : nullptr);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i) {
                int both;
                __builtin_memcpy(&both, weights + i * width + s, sizeof both);
                const __m512bh share = (__m512bh)splat_int(both);
                low[i] = Bf16::add(low[i], pair.low, share);
                high[i] = Bf16::add(high[i], pair.high, share);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            in_order(low[i], high[i]);
            float* const to = out + i * V + c;
            store(to, load(to) + low[i]), store(to + W, load(to + W) + high[i]);
        }
    }
}

inline void add_values(const Bf16Keys& keys, long V, const bits16* weights, long width, long rows, float* out) {
    long i = 0;
    for (; i + 8 <= rows; i += 8) add_values<8>(keys, V, weights + i * width, width, out + i * V);
    if (rows - i >= 4) add_values<4>(keys, V, weights + i * width, width, out + i * V), i += 4;
    switch (rows - i) {
        case 3: return add_values<3>(keys, V, weights + i * width, width, out + i * V);
        case 2: return add_values<2>(keys, V, weights + i * width, width, out + i * V);
        case 1: return add_values<1>(keys, V, weights + i * width, width, out + i * V);
    }
}

// Folds at most `width` keys, the first at place `begin`, into what the online softmax of a tile's rows carries. `query`
// is bfloat16 [rows, H], times scale and log2(e); `scores` and `weights` are scratch of [rows, width].
inline void fold_bf16(const Bf16Keys& keys, long H, long V, const Tile& tile, const bits16* query, long begin, long width,
                      float* scores, bits16* weights, float* top, float* sum, float* out) {
    const long rows = tile.last - tile.first;
    for (long i = 0; i < rows; ++i) {
        float* const x = scores + i * width;
        const vint newest = splat_int(tile.newest[i]), oldest = splat_int(tile.oldest[i]);
        const float before = top[i], largest = bf16_scores(keys, H, query + i * H, newest, oldest, begin, x);
        top[i] = largest > before ? largest : before;
        const float base = top[i] == -kInf ? 0.0f : top[i];
        vfloat total{};
        for (long s = 0; s < keys.count; s += W) {
            const vfloat weight = exp2_fast(load(x + s) - base);
            total += weight;
            const auto rounded = _mm512_maskz_cvtneps_pbh(0xffff, (__m512)weight);
            __builtin_memcpy(weights + i * width + s, &rounded, sizeof rounded);
        }
        const float shrink = largest > before ? exp2_fast(splat(before - base))[0] : 1.0f;
        sum[i] = sum[i] * shrink + sum_lanes(total);
        if (shrink != 1.0f)
            for (long c = 0; c < V; c += W) store(out + i * V + c, load(out + i * V + c) * shrink);
    }
    add_values(keys, V, weights, width, rows, out);
}
#endif

}  // namespace
}  // namespace sateen::SATEEN_ISA
