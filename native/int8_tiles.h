// Exact products of small integers out of registers, and the packed forms of keys and values that they read.
//
// Keys: stripes of 64, [channels / 4][64 keys][4 channels], codes plus 128. Values: [keys / 4][channels][4 keys]. A lane
// of 32 bits holds four numbers to be summed, as VNNI reads them; levels without VNNI widen to 16 bits, so that no sum of
// a pair saturates, and every level gives the same int32.
#pragma once

#include "linear_integer.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kStripe = 64;
constexpr int kGroup = 6;                    // rows whose sums fill the registers
constexpr int kSpread = W == 16 ? 4 : 2;     // vectors of sums per row

typedef signed char code;
typedef unsigned char byte;

// Four consecutive codes of P, for every lane.
struct FourShares {
#ifdef __AVX512VNNI__
    vint all;
    explicit SATEEN_INLINE FourShares(const byte* at) {
        int four;
        __builtin_memcpy(&four, at, 4);
        all = splat_int(four);
    }
#elif defined(__AVX2__)
    vint even, odd;
    explicit SATEEN_INLINE FourShares(const byte* at) {
        even = splat_int(at[0] | (at[2] << 16));
        odd = splat_int(at[1] | (at[3] << 16));
    }
#else
    int each[4];
    explicit SATEEN_INLINE FourShares(const byte* at) : each{at[0], at[1], at[2], at[3]} {}
#endif
};

// sum + the products of four signed bytes in every lane of v with the shares.
SATEEN_INLINE vint add_shares(vint sum, vint v, const FourShares& p) {
#ifdef __AVX512VNNI__
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)p.all, (__m512i)v);
#elif defined(__AVX512BW__)
    const __m512i even = _mm512_madd_epi16(_mm512_srai_epi16(_mm512_slli_epi16((__m512i)v, 8), 8), (__m512i)p.even);
    return sum + (vint)even + (vint)_mm512_madd_epi16(_mm512_srai_epi16((__m512i)v, 8), (__m512i)p.odd);
#elif defined(__AVX2__)
    const __m256i even = _mm256_madd_epi16(_mm256_srai_epi16(_mm256_slli_epi16((__m256i)v, 8), 8), (__m256i)p.even);
    return sum + (vint)even + (vint)_mm256_madd_epi16(_mm256_srai_epi16((__m256i)v, 8), (__m256i)p.odd);
#else
    return sum + ((v << 24) >> 24) * p.each[0] + ((v << 16) >> 24) * p.each[1] + ((v << 8) >> 24) * p.each[2] +
           (v >> 24) * p.each[3];
#endif
}

SATEEN_INLINE vint load_bytes(const code* p) { return load_bytes(reinterpret_cast<const byte*>(p)); }

// take(row, key, sums of W keys) for a stripe; `q` is [ROWS, stride] codes, `start` what a row's sums begin with.
template <int ROWS, typename Take>
SATEEN_INLINE void multiply_keys(const byte* k, long quads, const code* q, long stride, const int* start, Take take) {
    for (int at = 0; at < kStripe; at += kSpread * W) {
        vint sum[ROWS][kSpread];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < kSpread; ++j) sum[r][j] = splat_int(start[r]);
        const byte* from = k + at * 4;
        for (long d = 0; d < quads; ++d, from += kStripe * 4) {
            vint keys[kSpread];
            for (int j = 0; j < kSpread; ++j) keys[j] = load_bytes(from + j * W * 4);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const Codes x(q + r * stride + d * 4);
                for (int j = 0; j < kSpread; ++j) sum[r][j] = add_products(sum[r][j], keys[j], x);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < kSpread; ++j) take(r, at + j * W, sum[r][j]);
    }
}

template <int ROWS, int N, typename Take>
SATEEN_INLINE void multiply_columns(const code* v, long columns, long quads, const byte* p, long stride, long column, Take take) {
    vint sum[ROWS][N] = {};
    const code* from = v + column * 4;
    for (long d = 0; d < quads; ++d, from += columns * 4) {
        vint values[N];
        for (int j = 0; j < N; ++j) values[j] = load_bytes(from + j * W * 4);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const FourShares x(p + r * stride + d * 4);
            for (int j = 0; j < N; ++j) sum[r][j] = add_shares(sum[r][j], values[j], x);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < N; ++j) take(r, column + j * W, sum[r][j]);
}

// take(row, channel, sums of W channels); `p` is [ROWS, stride] codes of the keys of `quads`, `columns` a multiple of 16.
template <int ROWS, typename Take>
SATEEN_INLINE void multiply_values(const code* v, long columns, long quads, const byte* p, long stride, Take take) {
    long c = 0;
    for (; c + kSpread * W <= columns; c += kSpread * W) multiply_columns<ROWS, kSpread>(v, columns, quads, p, stride, c, take);
    if constexpr (W == 16) {
        if (c + 2 * W <= columns) multiply_columns<ROWS, 2>(v, columns, quads, p, stride, c, take), c += 2 * W;
        if (c < columns) multiply_columns<ROWS, 1>(v, columns, quads, p, stride, c, take);
    }
}

// `count` rows of `channels` codes, `stride` apart, into a stripe from key `at` on, a multiple of W; keys up to the next
// multiple of W become zero.
inline void pack_keys(const code* rows, long stride, long count, long channels, byte* stripe, long at) {
    for (long key = 0; key < count; key += W)
        for (long c = 0; c < channels; c += 4 * W) {
            const long bytes = channels - c < 4 * W ? channels - c : 4 * W;
            vfloat block[W];
            for (int i = 0; i < W; ++i) {
                vint x{};
                if (key + i < count) {
                    const code* const from = rows + (key + i) * stride + c;
                    if (bytes == 4 * W) x = load_bytes(from);
                    else __builtin_memcpy(&x, from, bytes);
                }
                block[i] = from_bits(x ^ int(0x80808080));
            }
            transpose(block);
            byte* const to = stripe + (c / 4 * kStripe + at + key) * 4;
            for (int j = 0; j * 4 < bytes; ++j) store(reinterpret_cast<float*>(to + j * kStripe * 4), block[j]);
        }
}

// `count` rows of `channels` codes, `stride` apart, to values of round_up(count, 4) keys and `columns` channels.
inline void pack_values(const code* rows, long stride, long count, long channels, code* to, long columns) {
    typedef code codes16 __attribute__((vector_size(16)));
    typedef short pairs8 __attribute__((vector_size(16)));
    for (long key = 0; key < count; key += 4, to += columns * 4)
        for (long c = 0; c < columns; c += 16) {
            const long bytes = channels - c < 16 ? channels - c : 16;
            codes16 x[4] = {};
            for (int i = 0; i < 4 && key + i < count; ++i) {
                const code* const from = rows + (key + i) * stride + c;
                if (bytes == 16) __builtin_memcpy(&x[i], from, 16);
                else if (bytes > 0) __builtin_memcpy(&x[i], from, bytes);
            }
            const auto low = [](codes16 a, codes16 b) {
                return (pairs8)__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            };
            const auto high = [](codes16 a, codes16 b) {
                return (pairs8)__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            };
            const pairs8 ab[2] = {low(x[0], x[1]), high(x[0], x[1])}, cd[2] = {low(x[2], x[3]), high(x[2], x[3])};
            for (int half = 0; half < 2; ++half) {
                const pairs8 first = __builtin_shufflevector(ab[half], cd[half], 0, 8, 1, 9, 2, 10, 3, 11);
                const pairs8 second = __builtin_shufflevector(ab[half], cd[half], 4, 12, 5, 13, 6, 14, 7, 15);
                __builtin_memcpy(to + (c + 8 * half) * 4, &first, 16);
                __builtin_memcpy(to + (c + 8 * half) * 4 + 16, &second, 16);
            }
        }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
