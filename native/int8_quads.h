// Four cached int8 rows at a time, as dot products out of registers need them: read where they lie, since with few queries
// packing whole blocks would cost more than the products. Needs VNNI and whole vectors of channels.
#pragma once

#include "decode_rows.h"
#include "int8_rows.h"

namespace sateen::SATEEN_ISA {
namespace {

#ifdef __AVX512VNNI__
constexpr long kVector = 64;  // codes

inline bool fits_direct(long H, long V, long rows) { return H % kVector == 0 && V % kVector == 0 && rows <= kGroup; }

SATEEN_INLINE __m512i load_codes(const code* from) { return _mm512_loadu_si512(from); }

// The scales of 64 rows, `stride` apart, into a line of their own; zeros behind `count`. Reads 64 * stride numbers.
inline void take_scales(const float* from, long head, long stride, long count, float* to) {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(int(stride))), _mm512_set1_epi32(int(head)));
    const __m512i vector = _mm512_srli_epi32(at, 4);
    __m512 x[kStripe / W];
    for (__m512& y : x) y = _mm512_setzero_ps();
    for (long j = 0; j < stride; ++j) {
        const __mmask16 here = _mm512_cmpeq_epi32_mask(vector, _mm512_set1_epi32(int(j)));
#pragma GCC unroll 4
        for (int i = 0; i < kStripe / W; ++i)
            x[i] = _mm512_mask_permutexvar_ps(x[i], here, at, _mm512_loadu_ps(from + (i * stride + j) * W));
    }
    for (int i = 0; i < kStripe / W; ++i) {
        const __mmask16 used = _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(int(count - i * W)));
        _mm512_storeu_ps(to + i * W, _mm512_maskz_mov_ps(used, x[i]));
    }
}

// A row of codes of a query, each group of four spread as KeyQuad has them: [H / 64][4] vectors.
inline void spread_codes(const code* q, long H, code* to) {
    for (long c = 0; c < H; c += kVector, to += 4 * kVector) {
        const __m512i x = load_codes(q + c);
        _mm512_storeu_si512(to, _mm512_shuffle_epi32(x, _MM_PERM_AAAA));
        _mm512_storeu_si512(to + kVector, _mm512_shuffle_epi32(x, _MM_PERM_BBBB));
        _mm512_storeu_si512(to + 2 * kVector, _mm512_shuffle_epi32(x, _MM_PERM_CCCC));
        _mm512_storeu_si512(to + 3 * kVector, _mm512_shuffle_epi32(x, _MM_PERM_DDDD));
    }
}

// 64 channels of four keys: every lane of 128 bits has the same four channels of each, plus 128.
struct KeyQuad {
    __m512i four[4];

    SATEEN_INLINE KeyQuad(const code* k, long stride) {
        const __m512i turn = _mm512_set1_epi8(char(0x80));
        const __m512i w = _mm512_xor_si512(load_codes(k), turn), x = _mm512_xor_si512(load_codes(k + stride), turn);
        const __m512i y = _mm512_xor_si512(load_codes(k + 2 * stride), turn), z = _mm512_xor_si512(load_codes(k + 3 * stride), turn);
        const __m512i a = _mm512_unpacklo_epi32(w, x), b = _mm512_unpackhi_epi32(w, x);
        const __m512i d = _mm512_unpacklo_epi32(y, z), e = _mm512_unpackhi_epi32(y, z);
        four[0] = _mm512_unpacklo_epi64(a, d), four[1] = _mm512_unpackhi_epi64(a, d);
        four[2] = _mm512_unpacklo_epi64(b, e), four[3] = _mm512_unpackhi_epi64(b, e);
    }
};

// 64 channels of four values, those of a channel side by side; lane L of 128 bits of vector j has channels 16 L + 4 j and on.
struct ValueQuad {
    __m512i four[4];

    SATEEN_INLINE ValueQuad(const code* v, long stride) {
        const __m512i w = load_codes(v), x = load_codes(v + stride), y = load_codes(v + 2 * stride), z = load_codes(v + 3 * stride);
        const __m512i a = _mm512_unpacklo_epi8(w, x), b = _mm512_unpackhi_epi8(w, x);
        const __m512i e = _mm512_unpacklo_epi8(y, z), f = _mm512_unpackhi_epi8(y, z);
        four[0] = _mm512_unpacklo_epi16(a, e), four[1] = _mm512_unpackhi_epi16(a, e);
        four[2] = _mm512_unpacklo_epi16(b, f), four[3] = _mm512_unpackhi_epi16(b, f);
    }
};

// The sums over lanes of 128 bits of x, then of y, in pairs of lanes.
SATEEN_INLINE __m512i fold_lanes(__m512i x, __m512i y) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
}

// out of 64 channels = out * shrink + sum * size, where `sum` is in the order of ValueQuad.
SATEEN_INLINE void add_in_order(const __m512i (&sum)[4], float shrink, float size, float* out) {
    const __m512i a = _mm512_shuffle_i32x4(sum[0], sum[1], 0x44), b = _mm512_shuffle_i32x4(sum[0], sum[1], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(sum[2], sum[3], 0x44), e = _mm512_shuffle_i32x4(sum[2], sum[3], 0xee);
    const __m512i in_order[4] = {_mm512_shuffle_i32x4(a, d, 0x88), _mm512_shuffle_i32x4(a, d, 0xdd),
                                 _mm512_shuffle_i32x4(b, e, 0x88), _mm512_shuffle_i32x4(b, e, 0xdd)};
    for (int j = 0; j < 4; ++j) store(out + j * W, load(out + j * W) * shrink + __builtin_convertvector((vint)in_order[j], vfloat) * size);
}
#endif

}  // namespace
}  // namespace sateen::SATEEN_ISA
