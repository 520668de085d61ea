// Rows of f32, bf16 or f16 weights times a few tokens. A tile has one vector of partial sums per output, W outputs in
// all, and adds the lanes of every vector at the end; columns run along the lanes, as the weights lie in memory.
#pragma once

#include "linear.h"
#include "simd.h"

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace sateen::SATEEN_ISA {
namespace {

typedef unsigned short vhalf __attribute__((vector_size(W * 2)));
typedef unsigned short bits16;

SATEEN_INLINE vfloat widen_bf16(vhalf x) {
#if defined(__AVX512F__)
    return from_bits((vint)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x) << 16);  // GCC halves the vector otherwise
#else
    return from_bits(__builtin_convertvector(x, vint) << 16);
#endif
}

SATEEN_INLINE vfloat widen_f16(vhalf x) {
#if defined(__AVX512F__)
    return (vfloat)_mm512_maskz_cvtph_ps(0xffff, (__m256i)x);
#elif defined(__F16C__)
    return (vfloat)_mm256_cvtph_ps((__m128i)x);
#else
    // Exponent and fraction move into place and the exponent's bias is put right by a product, which is exact for
    // subnormals too; infinities and NaN had the largest exponent and get the largest one again.
    const vint wide = __builtin_convertvector(x, vint), magnitude = (wide & 0x7fff) << 13;
    const vint scaled = bits(from_bits(magnitude) * splat(0x1p112f));
    return from_bits((magnitude >= splat_int(0x7c00 << 13) ? scaled | 0x7f800000 : scaled) | ((wide & 0x8000) << 16));
#endif
}

SATEEN_INLINE float bf16_float(bits16 x) {
    const unsigned wide = unsigned(x) << 16;
    float y;
    __builtin_memcpy(&y, &wide, sizeof y);
    return y;
}

// The nearest bfloat16, halves to even; NaN stays NaN.
SATEEN_INLINE bits16 to_bf16(float x) {
    unsigned wide;
    __builtin_memcpy(&wide, &x, sizeof wide);
    if (x != x) return bits16((wide >> 16) | 0x40);
    return bits16((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
}

// How one format reads weights and activations: STEP columns at a time, `add` puts their products into partial sums.
struct F32 {
    typedef float Weight;
    typedef float Activation;
    typedef vfloat Weights;
    typedef vfloat Activations;
    static constexpr long STEP = W;
    static SATEEN_INLINE vfloat weights(vfloat x) { return x; }
    static SATEEN_INLINE vfloat add(vfloat sum, vfloat w, vfloat x) { return sum + w * x; }
    static float activation(float x) { return x; }
};

struct F16 : F32 {
    typedef bits16 Weight;
    typedef vhalf Weights;
    static SATEEN_INLINE vfloat weights(vhalf x) { return widen_f16(x); }
};

#ifdef __AVX512BF16__
struct Bf16 {
    typedef bits16 Weight;
    typedef bits16 Activation;
    typedef __m512bh Weights;
    typedef __m512bh Activations;
    static constexpr long STEP = 32;
    static SATEEN_INLINE __m512bh weights(__m512bh x) { return x; }
    static SATEEN_INLINE vfloat add(vfloat sum, __m512bh w, __m512bh x) { return (vfloat)_mm512_dpbf16_ps((__m512)sum, w, x); }
    static bits16 activation(float x) { return to_bf16(x); }
};
#else
struct Bf16 : F32 {
    typedef bits16 Weight;
    typedef vhalf Weights;
    static SATEEN_INLINE vfloat weights(vhalf x) { return widen_bf16(x); }
    static float activation(float x) { return bf16_float(to_bf16(x)); }
};
#endif

constexpr long kFetchBytes = 2048;  // how far ahead of a single token's weights

template <typename F>
constexpr long float_stride(long columns) {
    return round_up(columns, 32) * sizeof(typename F::Activation);
}

template <typename F>
inline void prepare_float(const float* x, long x_stride, long columns, long first, long last, void* scratch) {
    for (long m = first; m < last; ++m) {
        auto* const out = reinterpret_cast<typename F::Activation*>(static_cast<char*>(scratch) + m * float_stride<F>(columns));
        for (long k = 0; k < columns; ++k) out[k] = F::activation(x[m * x_stride + k]);
        for (long k = columns; k < round_up(columns, 32); ++k) out[k] = 0;
    }
}

// The first `count` of a vector's numbers, zeros behind them.
template <typename V, typename N>
SATEEN_INLINE V load_first(const N* p, long count) {
    N some[sizeof(V) / sizeof(N)] = {};
    __builtin_memcpy(some, p, count * sizeof(N));
    V x;
    __builtin_memcpy(&x, some, sizeof x);
    return x;
}

template <typename V, typename N>
SATEEN_INLINE V load_all(const N* p) {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

// W / T rows by T tokens. Rows from `rows` on repeat the last one and are not written. Short rows end before the
// processor has seen the pattern, so the tile asks for FETCH rows, from its row `fetch` on, of those W rows further on.
// Loops over rows and tokens are unrolled, which keeps the sums in registers.
template <typename F, int T, int FETCH>
inline void float_tile(const Linear& linear, const char* x, long row, long rows, float* y, long y_stride, int fetch) {
    constexpr int R = W / T;
    const long columns = linear.columns, whole = columns / F::STEP * F::STEP;
    const typename F::Weight* w[R];
    const typename F::Activation* token[T];
    const long used = rows - row < R ? rows - row : R;
    w[0] = static_cast<const typename F::Weight*>(linear.weight) + row * columns;
#pragma GCC unroll 16
    for (int r = 1; r < R; ++r) w[r] = r < used ? w[r - 1] + columns : w[r - 1];
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t)
        token[t] = reinterpret_cast<const typename F::Activation*>(x + t * float_stride<F>(columns));
    const typename F::Weight* const ahead = w[0] + (W + fetch) * columns;
    vfloat sum[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) sum[i] = vfloat{};
    const auto step = [&](long k, auto load_weights, auto load_activations) __attribute__((always_inline)) {
        typename F::Activations now[T];
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) now[t] = load_activations(token[t] + k);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto weights = F::weights(load_weights(w[r] + k));
#pragma GCC unroll 16
            for (int t = 0; t < T; ++t) sum[t * R + r] = F::add(sum[t * R + r], weights, now[t]);
        }
    };
    if constexpr (T == 1) {
        // A single token waits for memory, which comes fastest in the order of its addresses: row after row.
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (long k = 0; k < whole; k += F::STEP) {
                if constexpr (FETCH) __builtin_prefetch(reinterpret_cast<const char*>(w[r] + k) + kFetchBytes, 0, 2);
                const auto weights = F::weights(load_all<typename F::Weights>(w[r] + k));
                sum[r] = F::add(sum[r], weights, load_all<typename F::Activations>(token[0] + k));
            }
    } else {
        for (long k = 0; k < whole; k += F::STEP) {
#pragma GCC unroll 16
            for (int r = 0; r < FETCH; ++r) __builtin_prefetch(ahead + r * columns + k, 0, 2);
            step(k, [](auto* p) { return load_all<typename F::Weights>(p); },
                 [](auto* p) { return load_all<typename F::Activations>(p); });
        }
    }
    if (whole < columns)
        step(whole, [&](auto* p) { return load_first<typename F::Weights>(p, columns - whole); },
             [](auto* p) { return load_all<typename F::Activations>(p); });
    float out[W];
    store(out, sum_each(sum));
    if (linear.bias)
        for (int t = 0; t < T; ++t)
            for (long r = 0; r < used; ++r) out[t * R + r] += linear.bias[row + r];
    for (int t = 0; t < T; ++t) {
        if (used == R) __builtin_memcpy(y + t * y_stride + row, out + t * R, R * sizeof(float));
        else __builtin_memcpy(y + t * y_stride + row, out + t * R, used * sizeof(float));
    }
}

// A block of at most W rows by T tokens, on pass `pass` of `passes` over these rows: each asks for another share of the
// next block, so that it arrives while this one computes.
template <typename F, int T>
inline void float_block(const Linear& linear, const char* x, long row, long end, float* y, long y_stride, long pass,
                        long passes) {
    constexpr int R = W / T;
    const int first = int(pass * R / passes), count = int((pass + 1) * R / passes) - first;
    for (long r = row; r < end; r += R) {
        if (count == 0) float_tile<F, T, 0>(linear, x, r, end, y, y_stride, 0);
        else if (count == 1) float_tile<F, T, 1>(linear, x, r, end, y, y_stride, first);
        else if (count == 2 && R > 2) float_tile<F, T, 2>(linear, x, r, end, y, y_stride, first);
        else float_tile<F, T, R>(linear, x, r, end, y, y_stride, 0);
    }
}

template <typename F>
void multiply_float(const Linear& linear, const void* scratch, long M, long first, long last, float* y, long y_stride) {
    const char* const x = static_cast<const char*>(scratch);
    const long stride = float_stride<F>(linear.columns);
    const long passes = M / 4 + (M & 2 ? 1 : 0) + (M & 1);
    for (long row = first; row < last; row += W) {
        const long end = row + W < last ? row + W : last;
        long m = 0, pass = 0;
        for (; m + 4 <= M; m += 4) float_block<F, 4>(linear, x + m * stride, row, end, y + m * y_stride, y_stride, pass++, passes);
        for (; m + 2 <= M; m += 2) float_block<F, 2>(linear, x + m * stride, row, end, y + m * y_stride, y_stride, pass++, passes);
        if (m < M) float_block<F, 1>(linear, x + m * stride, row, end, y + m * y_stride, y_stride, pass++, passes);
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
