// Attention of a decode step over bfloat16 rows with the processor's bfloat16 dot products: cached rows are read as they
// lie, queries and the weights of the softmax are rounded to bfloat16, sums are float32.
//
// With few query rows the time is that of reading the cache, and memory is fastest in the order of its addresses. So a
// block's keys of all heads come before its values, eight tokens at a time, and what comes later is asked for on the way.
#pragma once

#include "decode_rows.h"

namespace sateen::SATEEN_ISA {
namespace {

#ifdef __AVX512BF16__
constexpr long kPairs = 32;      // channels of one vector
constexpr long kQuad = 4;        // keys whose dot products share a vector
constexpr long kStep = 8;        // tokens whose heads are read one after another
constexpr long kBf16Block = 64;  // keys of one step of the online softmax

inline bool fits_bf16(const DecodeLayer& l) { return l.cache.format == Format::bf16 && l.H % kPairs == 0 && l.V % kPairs == 0; }

// Some keys of all heads: those of a head follow those of the head before, `stride` numbers lead to the next key.
struct Bf16Keys {
    const bits16 *k, *v;
    long k_stride, v_stride, count;
};

SATEEN_INLINE __m512bh load_pairs(const bits16* p) { return load_all<__m512bh>(p); }

// Scores of four keys and ROWS queries; those of query i go to to + i * to_stride. CHANNELS is H, or 0; ask() comes with
// every 256 bytes.
template <int ROWS, int CHANNELS, typename Ask>
SATEEN_INLINE void dot_quad(const bits16* const (&key)[kQuad], long H, const bits16* q, float* to, long to_stride, Ask ask) {
    vfloat dot[ROWS][kQuad];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kQuad; ++j) dot[i][j] = vfloat{};
    const auto step = [&](long h) SATEEN_LAMBDA {
        ask();
        __m512bh row[kQuad];
#pragma GCC unroll 4
        for (int j = 0; j < kQuad; ++j) row[j] = load_pairs(key[j] + h);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const __m512bh x = load_pairs(q + i * H + h);
#pragma GCC unroll 4
            for (int j = 0; j < kQuad; ++j) dot[i][j] = Bf16::add(dot[i][j], row[j], x);
        }
    };
    if constexpr (CHANNELS > 0) {
#pragma GCC unroll 4
        for (long h = 0; h < CHANNELS; h += kPairs) step(h);
    } else {
        for (long h = 0; h < H; h += kPairs) step(h);
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
        const auto join = [](vfloat x, vfloat y) SATEEN_LAMBDA {
            return (vfloat)_mm512_add_ps(_mm512_unpacklo_ps((__m512)x, (__m512)y), _mm512_unpackhi_ps((__m512)x, (__m512)y));
        };
        const __m512d a = (__m512d)join(dot[i][0], dot[i][1]), b = (__m512d)join(dot[i][2], dot[i][3]);
        const __m512 four = (__m512)((vfloat)_mm512_unpacklo_pd(a, b) + (vfloat)_mm512_unpackhi_pd(a, b));
        const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
        _mm_storeu_ps(to + i * to_stride, _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1)));
    }
}

// Pairs of neighbouring keys, channel by channel: even lanes one key, odd lanes the next. The order of the channels is
// that of in_order().
struct KeyPair {
    __m512bh low, high;

    KeyPair(const bits16* one, const bits16* other) {
        const __m512i a = load_all<__m512i>(one), b = load_all<__m512i>(other);
        low = (__m512bh)_mm512_maskz_unpacklo_epi16(0xffffffff, a, b);
        high = (__m512bh)_mm512_maskz_unpackhi_epi16(0xffffffff, a, b);
    }
};

// Rows of sums from the order of KeyPair to that of memory.
inline void in_order(const float* x, long count, float* to) {
    for (long c = 0; c < count; c += kPairs) {
        const vfloat low = load(x + c), high = load(x + c + W);
        store(to + c, __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
        store(to + c + W, __builtin_shufflevector(low, high, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31));
    }
}

// Places of four keys from number `s` on, `stride` apart; behind the last of `count` it is that one again.
template <bool WHOLE, typename Work>
SATEEN_INLINE void quad_of(const bits16* first, long stride, long s, long count, Work work) {
    const bits16* key[kQuad];
    if constexpr (WHOLE) {
        key[0] = first + s * stride;
#pragma GCC unroll 4
        for (int j = 1; j < kQuad; ++j) key[j] = key[j - 1] + stride;
    } else {
        for (int j = 0; j < kQuad; ++j) key[j] = first + (s + j < count ? s + j : count - 1) * stride;
    }
    work(key);
}

// out[row] += weights[row] times the values of KEYS keys, or of those up to `last`, for VECTORS * 32 channels; ask() comes
// with every 256 bytes.
template <int ROWS, int VECTORS, int KEYS, typename Ask>
SATEEN_INLINE void add_values(const bits16* v, long stride, long first, long last, const bits16* weights, long V, float* out, Ask ask) {
    vfloat sum[ROWS][2 * VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 2 * VECTORS; ++j) sum[i][j] = load(out + i * V + j * W);
    const auto add = [&](long s) SATEEN_LAMBDA {
#pragma GCC unroll 2
        for (int j = 0; j < VECTORS; ++j) ask();
        quad_of<KEYS != 0>(v, stride, s, last, [&](const bits16* const (&key)[kQuad]) SATEEN_LAMBDA {
#pragma GCC unroll 2
            for (int k = 0; k < kQuad; k += 2)
#pragma GCC unroll 2
                for (int j = 0; j < VECTORS; ++j) {
                    const KeyPair pair(key[k] + j * kPairs, key[k + 1] + j * kPairs);
#pragma GCC unroll 4
                    for (int i = 0; i < ROWS; ++i) {
                        int both;
                        __builtin_memcpy(&both, weights + i * kBf16Block + s + k, sizeof both);
                        const __m512bh share = (__m512bh)splat_int(both);
                        sum[i][2 * j] = Bf16::add(sum[i][2 * j], pair.low, share);
                        sum[i][2 * j + 1] = Bf16::add(sum[i][2 * j + 1], pair.high, share);
                    }
                }
        });
    };
    if constexpr (KEYS > 0) {
#pragma GCC unroll 16
        for (int s = 0; s < KEYS; s += kQuad) add(first + s);
    } else {
        for (long s = first; s < last; s += kQuad) add(s);  // weights behind the last key are zeros
    }
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < 2 * VECTORS; ++j) store(out + i * V + j * W, sum[i][j]);
}

// What folding a block needs besides its keys.
struct Bf16Fold {
    const Tile& tile;
    long H, V, rows;
    const bits16* query;  // [heads, rows, H], times scale and log2(e)
    float* scores;        // [heads, rows, 64]
    bits16* weights;      // [heads, rows, 64]
    float* out;           // [heads, rows, V], in the order of KeyPair
    SoftRows soft;
    long soft_stride;     // from head to head: rows, in whole vectors where heads are folded one by one

    // work(integral_constant of some rows, first of them) for all rows; ROWS is their number, or 0.
    template <int ROWS, typename Work>
    SATEEN_INLINE void each_rows(Work work) const {
        if constexpr (ROWS > 0) return work(std::integral_constant<int, ROWS>{}, 0l);
        long i = 0;
        for (; i + 4 <= rows; i += 4) work(std::integral_constant<int, 4>{}, i);
        if (rows - i == 3) work(std::integral_constant<int, 3>{}, i);
        if (rows - i == 2) work(std::integral_constant<int, 2>{}, i);
        if (rows - i == 1) work(std::integral_constant<int, 1>{}, i);
    }

    // Scores of keys [begin, end) for heads [first, last). With STEP these are kStep keys; CHANNELS is H, or 0.
    template <int ROWS, int CHANNELS, int STEP>
    SATEEN_APART void dots(const Bf16Keys& keys, long begin, long end, long first, long last, LaterRows later) const {
        const bits16 *k = keys.k + first * H, *q = query + first * rows * H;
        float* x = scores + first * rows * kBf16Block;
        const long channels = CHANNELS ? CHANNELS : H, stride = keys.k_stride;
        const auto ask = [&]() SATEEN_LAMBDA {
            if constexpr (STEP > 0) later.ask();
        };
        for (long head = first; head < last; ++head, k += channels, q += rows * channels, x += rows * kBf16Block) {
            const auto quad = [&](long s) SATEEN_LAMBDA {
                quad_of<STEP != 0>(k, stride, s, end, [&](const bits16* const (&key)[kQuad]) SATEEN_LAMBDA {
                    each_rows<ROWS>([&](auto some, long i) SATEEN_LAMBDA {
                        dot_quad<some.value, CHANNELS>(key, channels, q + i * channels, x + i * kBf16Block + s, kBf16Block, ask);
                    });
                });
            };
            if constexpr (STEP > 0) {
#pragma GCC unroll 16
                for (int s = 0; s < STEP; s += kQuad) quad(begin + s);
            } else {
                for (long s = begin; s < end; s += kQuad) quad(s);
            }
        }
    }

    // Adds the values of keys [begin, end) to the outputs of heads [first, last); CHANNELS is V, or 0.
    template <int ROWS, int CHANNELS, int STEP>
    SATEEN_APART void values(const Bf16Keys& keys, long begin, long end, long first, long last, LaterRows later) const {
        const long channels = CHANNELS ? CHANNELS : V, stride = keys.v_stride;
        const bits16 *v = keys.v + first * channels, *share = weights + first * rows * kBf16Block;
        float* to = out + first * rows * channels;
        const auto ask = [&]() SATEEN_LAMBDA {
            if constexpr (STEP > 0) later.ask();
        };
        for (long head = first; head < last; ++head, v += channels, share += rows * kBf16Block, to += rows * channels) {
            each_rows<ROWS>([&](auto some, long i) SATEEN_LAMBDA {
                long c = 0;
                for (; c + 2 * kPairs <= channels; c += 2 * kPairs)
                    add_values<some.value, 2, STEP>(v + c, stride, begin, end, share + i * kBf16Block, channels, to + i * channels + c, ask);
                if (c < channels)
                    add_values<some.value, 1, STEP>(v + c, stride, begin, end, share + i * kBf16Block, channels, to + i * channels + c, ask);
            });
        }
    }

    // Calls one of the two with its number of channels, where it is a usual one, and of keys.
#define SATEEN_FOLD(function, channels)                                                                                     \
    template <int ROWS, int STEP>                                                                                           \
    SATEEN_INLINE void function(const Bf16Keys& keys, long begin, long end, long first, long last, LaterRows later) const { \
        if (channels == 64) function<ROWS, 64, STEP>(keys, begin, end, first, last, later);                                 \
        else if (channels == 128) function<ROWS, 128, STEP>(keys, begin, end, first, last, later);                          \
        else function<ROWS, 0, STEP>(keys, begin, end, first, last, later);                                                 \
    }
    SATEEN_FOLD(dots, H)
    SATEEN_FOLD(values, V)
#undef SATEEN_FOLD

    // Scores of heads [first, last) to weights; what the online softmax carries goes along. With ASKS memory is not left
    // idle meanwhile.
    template <bool MASKED, bool ASKS>
    SATEEN_APART void soften(long count, long begin, long first, long last, LaterRows later) const {
        vint lane;
        for (int j = 0; j < W; ++j) lane[j] = j;
        const vint end = splat_int(int(begin + count));
        const auto each = [&](auto work) SATEEN_LAMBDA {
            for (long head = first; head < last; ++head)
                for (long i = 0; i < rows; ++i) work(head * rows + i, head * soft_stride + i, i);
        };
        each([&](long row, long at_soft, long i) SATEEN_LAMBDA {
            float* const x = scores + row * kBf16Block;
            vfloat most = splat(-kInf);
#pragma GCC unroll 4
            for (long s = 0; s < kBf16Block; s += W) {
                vfloat y = load(x + s);
                if constexpr (MASKED) {
                    const vint at = lane + splat_int(int(begin + s));
                    y = (at <= splat_int(tile.newest[i])) & (at >= splat_int(tile.oldest[i])) & (at < end) ? y : splat(-kInf);
                    store(x + s, y);
                }
                most = maximum(y, most);
            }
            soft.most[at_soft] = most;
            if constexpr (ASKS) later.ask();
        });
        soft.raise(first * soft_stride, last * soft_stride);
        each([&](long row, long at_soft, long) SATEEN_LAMBDA {
            const float* const x = scores + row * kBf16Block;
            const vfloat from = splat(soft.base[at_soft]);
            vfloat total{};
#pragma GCC unroll 4
            for (long s = 0; s < kBf16Block; s += W) {
                const vfloat weight = exp2_fast(load(x + s) - from);
                total += weight;
                const auto rounded = _mm512_maskz_cvtneps_pbh(0xffff, (__m512)weight);
                __builtin_memcpy(weights + row * kBf16Block + s, &rounded, sizeof rounded);
            }
            soft.total[at_soft] = total;
            if constexpr (ASKS) later.ask();
            const float shrink = soft.shrink[at_soft];
            float* const to = out + row * V;
            if (shrink != 1.0f)
                for (long c = 0; c < V; c += W) store(to + c, load(to + c) * shrink);
        });
        soft.add(first * soft_stride, last * soft_stride);
    }

    // Folds at most 64 keys, the first at place `begin`, into heads [first, last), few rows a few keys of all heads at a
    // time. `later_keys(s)` is what is asked for while keys from number s on are read.
    template <int ROWS, typename LaterKeys, typename LaterValues>
    SATEEN_INLINE void fold(const Bf16Keys& keys, long begin, long first, long last, LaterKeys later_keys, LaterValues later_values) const {
        const long count = keys.count;
        constexpr int STEP = ROWS ? kStep : 0;
        long s = 0;
        for (; ROWS && s + kStep <= count; s += kStep) {
            if (ROWS == 1) touch(keys.k + s * keys.k_stride, kStep * keys.k_stride * sizeof(bits16));
            dots<ROWS, STEP>(keys, s, s + kStep, first, last, later_keys(s));
        }
        if (s < count) dots<ROWS, 0>(keys, s, count, first, last, later_keys(s));
        bool is_masked = count < kBf16Block;
        for (long i = 0; i < rows; ++i) is_masked |= tile.oldest[i] > begin || tile.newest[i] < begin + count - 1;
        const LaterRows later = later_values(0);
        if (is_masked) soften<true, ROWS != 0>(count, begin, first, last, later);
        else soften<false, ROWS != 0>(count, begin, first, last, later);
        for (s = 0; ROWS && s + kStep <= count; s += kStep) {
            if (ROWS == 1) touch(keys.v + s * keys.v_stride, kStep * keys.v_stride * sizeof(bits16));
            values<ROWS, STEP>(keys, s, s + kStep, first, last, later_values(s));
        }
        if (s < count) values<ROWS, 0>(keys, s, count, first, last, later_values(s));
    }
};
#endif

}  // namespace
}  // namespace sateen::SATEEN_ISA
