// Cached rows of bfloat16 or float16 numbers to float32 and back.
#pragma once

#include "linear_float.h"

namespace sateen::SATEEN_ISA {
namespace {

inline long number_bytes(Format format) { return format == Format::f32 ? 4 : format == Format::int8 ? 1 : 2; }

template <typename Base>
inline Base* offset(Base* base, Format format, long numbers) {
    return (Base*)((char*)base + numbers * number_bytes(format));
}

template <bool IS_BF16>
SATEEN_INLINE void widen_half(const bits16* from, long count, float* to) {
    long i = 0;
    for (; i + W <= count; i += W) {
        vhalf x;
        __builtin_memcpy(&x, from + i, sizeof x);
        store(to + i, IS_BF16 ? widen_bf16(x) : widen_f16(x));
    }
    for (; i < count; ++i) {
        const vhalf x = vhalf{} + from[i];
        to[i] = (IS_BF16 ? widen_bf16(x) : widen_f16(x))[0];
    }
}

inline void widen(Format format, const void* from, long count, float* to) {
    const auto* const half = static_cast<const bits16*>(from);
    if (format == Format::bf16) widen_half<true>(half, count, to);
    else if (format == Format::f16) widen_half<false>(half, count, to);
    else __builtin_memcpy(to, from, count * sizeof(float));
}

template <bool IS_BF16>
inline void widen_half_rows(const bits16* from, long from_stride, long rows, long count, float* to, long to_stride) {
    for (long i = 0; i < rows; ++i) {
        widen_half<IS_BF16>(from + i * from_stride, count, to + i * to_stride);
        for (long c = count; c < to_stride; ++c) to[i * to_stride + c] = 0.0f;
    }
}

// Rows of `count` numbers, `from_stride` numbers apart, to floats [rows, to_stride] with zeros behind them.
inline void widen_rows(Format format, const void* from, long from_stride, long rows, long count, float* to, long to_stride) {
    const auto* const half = static_cast<const bits16*>(from);
    if (format == Format::bf16) return widen_half_rows<true>(half, from_stride, rows, count, to, to_stride);
    if (format == Format::f16) return widen_half_rows<false>(half, from_stride, rows, count, to, to_stride);
    for (long i = 0; i < rows; ++i)
        for (long c = 0; c < to_stride; ++c)
            to[i * to_stride + c] = c < count ? static_cast<const float*>(from)[i * from_stride + c] : 0.0f;
}

// The nearest float16, halves to even; NaN stays NaN.
inline bits16 to_f16(float x) {
    unsigned word;
    __builtin_memcpy(&word, &x, sizeof word);
    const unsigned sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    if (word > 0x7f800000) return bits16(sign | 0x7e00);
    if (word >= 0x477ff000) return bits16(sign | 0x7c00);  // 65520 and above are infinite
    if (word >= 0x38800000) return bits16(sign | ((word - 0x38000000 + 0xfff + (word >> 13 & 1)) >> 13));
    // Below the smallest normal number: next to 1/2 the last bit of a float32 is worth 2^-24, the step of subnormals.
    float y;
    __builtin_memcpy(&y, &word, sizeof y);
    y += 0.5f;
    __builtin_memcpy(&word, &y, sizeof word);
    return bits16(sign | (word - 0x3f000000));
}

inline void narrow(Format format, const float* from, long count, void* to) {
    auto* const half = static_cast<bits16*>(to);
    if (format == Format::f32) __builtin_memcpy(to, from, count * sizeof(float));
    else
        for (long i = 0; i < count; ++i) half[i] = format == Format::bf16 ? to_bf16(from[i]) : to_f16(from[i]);
}

// Leaves of the numbers what a row of this format keeps.
inline void round_as(Format format, float* x, long count) {
    if (format == Format::bf16)
        for (long i = 0; i < count; ++i) x[i] = bf16_float(to_bf16(x[i]));
    if (format == Format::f16)
        for (long i = 0; i < count; ++i) {
            const bits16 half = to_f16(x[i]);
            widen_half<false>(&half, 1, x + i);
        }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
