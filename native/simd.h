// One vector type per ISA level, written in GCC/Clang vector extensions, with the few functions that arithmetic
// operators do not give: loads, 2^x, square transposes, sums over lanes, and scratch memory that a thread keeps between calls.
#pragma once

#include <cstdlib>
#include <utility>

namespace sateen::SATEEN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vfloat __attribute__((vector_size(W * 4)));
typedef int vint __attribute__((vector_size(W * 4)));

#define SATEEN_INLINE inline __attribute__((always_inline))
#define SATEEN_LAMBDA __attribute__((always_inline))  // behind the parameters
#define SATEEN_APART __attribute__((noinline))  // loops that need all registers, away from constants of their callers

constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kInf = __builtin_inff();

SATEEN_INLINE vfloat load(const float* p) {
    vfloat x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

SATEEN_INLINE void store(float* p, vfloat x) { __builtin_memcpy(p, &x, sizeof x); }

// The first `count` floats, zeros behind them.
SATEEN_INLINE vfloat load_some(const float* p, long count) {
    vfloat x{};
    __builtin_memcpy(&x, p, count * sizeof(float));
    return x;
}

SATEEN_INLINE void store_some(float* p, vfloat x, long count) { __builtin_memcpy(p, &x, count * sizeof(float)); }

SATEEN_INLINE vint load_int(const int* p) {
    vint x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

SATEEN_INLINE vfloat splat(float x) { return x - vfloat{}; }
SATEEN_INLINE vint splat_int(int x) { return x - vint{}; }

// The bits of an integer vector as floats and back; a cast between vectors of one size keeps the bits.
SATEEN_INLINE vint bits(vfloat x) { return (vint)x; }
SATEEN_INLINE vfloat from_bits(vint x) { return (vfloat)x; }

SATEEN_INLINE vfloat maximum(vfloat a, vfloat b) { return a > b ? a : b; }

// 2^x with a relative error of 1e-7 for x in [-125, 127]; 0 below that range, NaN stays NaN. The fraction in
// [-1/2, 1/2] goes through a minimax polynomial, the whole part is added to the exponent bits.
SATEEN_INLINE vfloat exp2_fast(vfloat x) {
    const vfloat low = splat(-125.0f), magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vfloat y = x < low ? low : x;
    const vfloat shifted = y + magic;
    const vfloat f = y - (shifted - magic);
    vfloat p = splat(1.33904360e-3f);
    p = p * f + splat(9.61817801e-3f);
    p = p * f + splat(5.55036940e-2f);
    p = p * f + splat(2.40226462e-1f);
    p = p * f + splat(6.93147182e-1f);
    p = p * f + splat(1.0f);
    const vfloat scaled = from_bits(bits(p) + (bits(shifted) << 23));
    return x < low ? vfloat{} : scaled;
}

template <int D, typename Vector, int... I>
SATEEN_INLINE Vector swap_lanes(Vector x, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(x, x, (I ^ D)...);
}

// What `join` makes of all lanes, in pairs.
template <int D = W / 2, typename Vector, typename Join>
SATEEN_INLINE auto join_lanes(Vector x, Join join) {
    x = join(x, swap_lanes<D>(x, std::make_integer_sequence<int, W>{}));
    if constexpr (D > 1) return join_lanes<D / 2>(x, join);
    else return x[0];
}

SATEEN_INLINE float sum_lanes(vfloat x) {
    return join_lanes(x, [](vfloat a, vfloat b) { return a + b; });
}

SATEEN_INLINE float max_lanes(vfloat x) {
    return join_lanes(x, [](vfloat a, vfloat b) { return maximum(a, b); });
}

template <int D, int... I>
SATEEN_INLINE void exchange(vfloat& a, vfloat& b, std::integer_sequence<int, I...>) {
    const vfloat low = __builtin_shufflevector(a, b, ((I & D) ? W + I - D : I)...);
    const vfloat high = __builtin_shufflevector(a, b, ((I & D) ? W + I : I + D)...);
    a = low;
    b = high;
}

template <int D>
SATEEN_INLINE void transpose_stage(vfloat (&rows)[W]) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
        if (!(i & D)) exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, W>{});
}

// W vectors of W lanes, in place.
SATEEN_INLINE void transpose(vfloat (&rows)[W]) {
    transpose_stage<1>(rows);
    transpose_stage<2>(rows);
    if constexpr (W > 4) transpose_stage<4>(rows);
    if constexpr (W > 8) transpose_stage<8>(rows);
}

template <int D, typename Join>
SATEEN_INLINE void halve(vfloat (&rows)[W], Join join) {
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) {
        exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, W>{});
        rows[i] = join(rows[i], rows[i + D]);
    }
}

// Lane i is what `join` makes of all lanes of vector i.
template <typename Join>
SATEEN_INLINE vfloat join_each(const vfloat* vectors, Join join) {
    vfloat rows[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = vectors[i];
    if constexpr (W > 8) halve<8>(rows, join);
    if constexpr (W > 4) halve<4>(rows, join);
    halve<2>(rows, join);
    halve<1>(rows, join);
    return rows[0];
}

SATEEN_INLINE vfloat sum_each(const vfloat* vectors) {
    return join_each(vectors, [](vfloat a, vfloat b) SATEEN_LAMBDA { return a + b; });
}

SATEEN_INLINE vfloat max_each(const vfloat* vectors) {
    return join_each(vectors, [](vfloat a, vfloat b) SATEEN_LAMBDA { return maximum(a, b); });
}

constexpr long round_up(long n, long to) { return (n + to - 1) / to * to; }

// Aligned memory that grows and is kept by its thread between calls.
struct Scratch {
    float* data = nullptr;
    long capacity = 0;

    ~Scratch() { std::free(data); }

    float* take(long count) {
        if (count > capacity) {
            std::free(data);
            capacity = round_up(count, 1024);
            data = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
            if (!data) std::abort();
        }
        return data;
    }
};

}  // namespace
}  // namespace sateen::SATEEN_ISA
