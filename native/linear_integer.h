// int8 and int4 weights times int8 activations. The lanes are the 16 rows of a panel; a group of 32 columns is summed
// in int32, exactly and alike on every level, and scaled in float32.
#pragma once

#include "linear.h"
#include "simd.h"

#ifdef SATEEN_X86
#include <immintrin.h>
#endif

namespace sateen::SATEEN_ISA {
namespace {

constexpr int kParts = int(kLinearRows) / W;  // vectors of int32 that hold one number per row of a panel
constexpr float kTiny = 0x1p-100f;            // groups of smaller activations count as zero: 127 / x stays finite

// 32 numbers of a token.
struct Group {
    signed char codes[kLinearGroup];
    float scale;   // the size of one code
    int offset;    // -128 times the sum of the codes: what int8 weights, stored with 128 added, bring in too much
    float total;   // scale times the sum of the codes, for the minima of int4
    int padding;
};

SATEEN_INLINE long groups_of(long columns) { return (columns + kLinearGroup - 1) / kLinearGroup; }
SATEEN_INLINE long integer_stride(long columns) { return round_up(groups_of(columns) * sizeof(Group), 64); }

SATEEN_INLINE Group* group_at(const void* scratch, long columns, long token) {
    return reinterpret_cast<Group*>(static_cast<char*>(const_cast<void*>(scratch)) + token * integer_stride(columns));
}

// Halves to even.
SATEEN_INLINE vint nearest(vfloat x) {
#if defined(__AVX512F__)
    return (vint)_mm512_maskz_cvtps_epi32(0xffff, (__m512)x);
#elif defined(__AVX2__)
    return (vint)_mm256_cvtps_epi32((__m256)x);
#elif defined(SATEEN_X86)
    return (vint)_mm_cvtps_epi32((__m128)x);
#else
    vint y;
    for (int i = 0; i < W; ++i) y[i] = __builtin_irintf(x[i]);
    return y;
#endif
}

inline void prepare_group(const float* x, Group& group) {
    typedef signed char vcode __attribute__((vector_size(W)));
    vint top{}, sum{};
    for (int i = 0; i < kLinearGroup; i += W) {
        const vint size = bits(load(x + i)) & 0x7fffffff;  // ordered like the numbers, NaN above infinity
        top = size > top ? size : top;
    }
    const int top_bits = join_lanes(top, [](vint a, vint b) { return a > b ? a : b; });
    float most;
    __builtin_memcpy(&most, &top_bits, sizeof most);
    const bool is_finite = top_bits < 0x7f800000, is_coded = is_finite && most >= kTiny;
    const vfloat levels = splat(is_coded ? 127.0f / most : 0.0f);
    for (int i = 0; i < kLinearGroup; i += W) {
        const vint code = is_coded ? nearest(load(x + i) * levels) : vint{};
        sum += code;
        const vcode bytes = __builtin_convertvector(code, vcode);
        __builtin_memcpy(group.codes + i, &bytes, sizeof bytes);
    }
    const int total = join_lanes(sum, [](vint a, vint b) { return a + b; });
    group.scale = is_coded ? most / 127.0f : is_finite ? 0.0f : __builtin_nanf("");
    group.offset = -128 * total;
    group.total = group.scale * float(total);
}

inline void prepare_integer(const float* x, long x_stride, long columns, long first, long last, void* scratch) {
    const long whole = columns / kLinearGroup, rest = columns % kLinearGroup;
    for (long m = first; m < last; ++m) {
        Group* const token = group_at(scratch, columns, m);
        const float* const row = x + m * x_stride;
        for (long g = 0; g < whole; ++g) prepare_group(row + g * kLinearGroup, token[g]);
        if (rest) {
            float padded[kLinearGroup] = {};
            __builtin_memcpy(padded, row + whole * kLinearGroup, rest * sizeof(float));
            prepare_group(padded, token[whole]);
        }
    }
}

inline void prepare_rest(const float* x, long columns, long from, long to, void* scratch) {
    const Group* const rounded = group_at(scratch, columns, from);
    Group* const token = group_at(scratch, columns, to);
    for (long g = 0; g < groups_of(columns); ++g) {
        const long first = g * kLinearGroup, count = columns - first < kLinearGroup ? columns - first : kLinearGroup;
        float rest[kLinearGroup] = {};
        for (long i = 0; i < count; ++i) rest[i] = x[first + i] - rounded[g].scale * float(rounded[g].codes[i]);
        prepare_group(rest, token[g]);
    }
}

// Four consecutive codes of a token, for every lane, as products need them.
struct Codes {
#ifdef __AVX512VNNI__
    vint all;
    explicit SATEEN_INLINE Codes(const signed char* at) {
        int four;
        __builtin_memcpy(&four, at, 4);
        all = splat_int(four);
    }
#elif defined(__AVX2__)
    vint even, odd;  // pairs of int16: codes 0 and 2, codes 1 and 3
    explicit SATEEN_INLINE Codes(const signed char* at) {
        even = splat_int((at[0] & 0xffff) | (at[2] << 16));
        odd = splat_int((at[1] & 0xffff) | (at[3] << 16));
    }
#else
    int each[4];
    explicit SATEEN_INLINE Codes(const signed char* at) : each{at[0], at[1], at[2], at[3]} {}
#endif
};

// sum + the products of four unsigned bytes in every lane of w with the codes; nothing saturates.
SATEEN_INLINE vint add_products(vint sum, vint w, const Codes& x) {
#ifdef __AVX512VNNI__
    return (vint)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x.all);
#elif defined(__AVX512BW__)
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), (__m512i)x.even);
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16((__m512i)w, 8), (__m512i)x.odd);
    return sum + (vint)even + (vint)odd;
#elif defined(__AVX2__)
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)), (__m256i)x.even);
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)w, 8), (__m256i)x.odd);
    return sum + (vint)even + (vint)odd;
#else
    return sum + (w & 255) * x.each[0] + ((w >> 8) & 255) * x.each[1] + ((w >> 16) & 255) * x.each[2] +
           ((w >> 24) & 255) * x.each[3];
#endif
}

SATEEN_INLINE vint load_bytes(const unsigned char* p) {
    vint x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

SATEEN_INLINE vfloat load_bf16(const unsigned short* p) {
    typedef unsigned short half __attribute__((vector_size(W * 2)));
    half x;
    __builtin_memcpy(&x, p, sizeof x);
    return from_bits(__builtin_convertvector(x, vint) << 16);
}

// The sum of one group for T tokens into sum[T][kParts], which holds what it starts from.
template <int T>
SATEEN_INLINE void int8_group(const unsigned char* w, const Group* const* token, long g, vint (&sum)[T][kParts]) {
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
        vint rows[kParts];
        for (int p = 0; p < kParts; ++p) rows[p] = load_bytes(w + q * 64 + p * W * 4);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Codes x(token[t][g].codes + q * 4);
            for (int p = 0; p < kParts; ++p) sum[t][p] = add_products(sum[t][p], rows[p], x);
        }
    }
}

template <int T>
SATEEN_INLINE void int4_group(const unsigned char* w, const Group* const* token, long g, vint (&sum)[T][kParts]) {
    const vint nibble = splat_int(0x0f0f0f0f);
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
        vint low[kParts], high[kParts];
        for (int p = 0; p < kParts; ++p) {
            const vint both = load_bytes(w + q * 64 + p * W * 4);
            low[p] = both & nibble;
            high[p] = (both >> 4) & nibble;
        }
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) {
            const Codes x(token[t][g].codes + q * 4), y(token[t][g].codes + 16 + q * 4);
            for (int p = 0; p < kParts; ++p) sum[t][p] = add_products(add_products(sum[t][p], low[p], x), high[p], y);
        }
    }
}

// FETCH: these are the first tokens, for which the weights come from memory; it asks for those further on, so that the
// products hide the wait, also where the processor's own guess ends with a page.
template <bool INT4, int T, bool FETCH>
void integer_tile(const Linear& linear, const void* scratch, long m, long row, float* y, long y_stride) {
    constexpr long kBytes = INT4 ? kLinearRows * kLinearGroup / 2 : kLinearRows * kLinearGroup;  // of a group
    constexpr long kAhead = T >= 4 ? 8192 : 4096;  // bytes
    constexpr long kScales = INT4 ? 2 * kLinearRows : kLinearRows;
    const long groups = groups_of(linear.columns), panel = row / kLinearRows;
    const unsigned char* w = static_cast<const unsigned char*>(linear.weight) + panel * groups * kBytes;
    const Group* token[T];
    for (int t = 0; t < T; ++t) token[t] = group_at(scratch, linear.columns, m + t);
    vfloat out[T][kParts] = {};
    for (long g = 0; g < groups; ++g, w += kBytes) {
        if constexpr (FETCH)
#pragma GCC unroll 8
            for (long i = 0; i < kBytes; i += 64) __builtin_prefetch(w + i + kAhead, 0, T >= 4 ? 2 : 3);
        vint sum[T][kParts];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
            for (int p = 0; p < kParts; ++p) sum[t][p] = INT4 ? vint{} : splat_int(token[t][g].offset);
        if constexpr (INT4)
            int4_group<T>(w, token, g, sum);
        else
            int8_group<T>(w, token, g, sum);
        const auto* const scales = static_cast<const unsigned short*>(linear.scales) + (panel * groups + g) * kScales;
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
            const vfloat step = load_bf16(scales + p * W);
            const vfloat minimum = INT4 ? load_bf16(scales + kLinearRows + p * W) : vfloat{};
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) {
                out[t][p] += __builtin_convertvector(sum[t][p], vfloat) * (step * splat(token[t][g].scale));
                if constexpr (INT4) out[t][p] += minimum * splat(token[t][g].total);
            }
        }
    }
    for (int t = 0; t < T; ++t)
        for (int p = 0; p < kParts; ++p) {
            const long at = row + p * W, count = linear.rows - at < W ? linear.rows - at : W;
            if (count <= 0) break;
            vfloat x = out[t][p];
            if (linear.bias) x += load_some(linear.bias + at, count);
            store_some(y + t * y_stride + at, x, count);
        }
}

template <bool INT4, int T>
void integer_panel(const Linear& linear, const void* scratch, long m, long row, float* y, long y_stride) {
    if (m == 0) integer_tile<INT4, T, true>(linear, scratch, m, row, y, y_stride);
    else integer_tile<INT4, T, false>(linear, scratch, m, row, y + m * y_stride, y_stride);
}

template <bool INT4>
void multiply_integer(const Linear& linear, const void* scratch, long M, long first, long last, float* y, long y_stride) {
    for (long row = first; row < last; row += kLinearRows) {
        long m = 0;
        if constexpr (W == 16)  // with its 32 registers
            for (; m + 8 <= M; m += 8) integer_panel<INT4, 8>(linear, scratch, m, row, y, y_stride);
        for (; m + 4 <= M; m += 4) integer_panel<INT4, 4>(linear, scratch, m, row, y, y_stride);
        for (; m + 2 <= M; m += 2) integer_panel<INT4, 2>(linear, scratch, m, row, y, y_stride);
        if (m < M) integer_panel<INT4, 1>(linear, scratch, m, row, y, y_stride);
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
