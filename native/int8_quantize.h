// Float rows to symmetric int8: a code is the nearest of x / scale with scale = max|x| / 127, halves to even, as in
// src/sateen/ops/int8_attention/quantize.py; zeros have scale 0. A NaN makes the scale NaN, which is how it stays one.
#pragma once

#include "int8_tiles.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr float kCodes = 127.0f;

SATEEN_INLINE vfloat size_of(vfloat x) { return from_bits(bits(x) & 0x7fffffff); }

// The larger of two numbers without a sign; their bits are ordered like them, NaN above infinity.
SATEEN_INLINE vfloat larger_size(vfloat a, vfloat b) { return bits(a) > bits(b) ? a : b; }

SATEEN_INLINE float largest_lane(vfloat x) {
    const int top = join_lanes(bits(x), [](vint a, vint b) { return a > b ? a : b; });
    float value;
    __builtin_memcpy(&value, &top, sizeof value);
    return value;
}

SATEEN_INLINE vfloat load_up_to(const float* x, long count) { return count >= W ? load(x) : load_some(x, count); }

// W codes to memory; `divisor` has no zeros.
SATEEN_INLINE vint write_codes(vfloat x, vfloat divisor, code* to) {
    typedef code codes __attribute__((vector_size(W)));
    vint y = nearest(x / divisor);
    y = y > 127 ? splat_int(127) : y;
    y = y < -127 ? splat_int(-127) : y;
    const codes narrow = __builtin_convertvector(y, codes);
    __builtin_memcpy(to, &narrow, sizeof narrow);
    return y;
}

struct RowCodes {
    float scale;
    int sum;      // of the codes
};

// A row less `mean`, which may be null, to round_up(count, W) codes, zeros behind it; `sign` is 1 or -1.
inline RowCodes quantize_row(const float* x, const float* mean, long count, float sign, code* to) {
    vfloat most{};
    const auto at = [&](long c) {
        const vfloat y = load_up_to(x + c, count - c);
        return mean ? y - load_up_to(mean + c, count - c) : y;
    };
    for (long c = 0; c < count; c += W) most = larger_size(most, size_of(at(c)));
    const float scale = largest_lane(most) / kCodes;
    const vfloat divisor = splat(scale == 0.0f ? 1.0f : scale * sign);
    vint sum{};
    for (long c = 0; c < count; c += W) sum += write_codes(at(c), divisor, to + c);
    return {scale, join_lanes(sum, [](vint a, vint b) { return a + b; })};
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
