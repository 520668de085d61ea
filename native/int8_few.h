// A block of cached int8 rows and a few query rows, read where it lies: with so few queries packing the rows would cost
// more than the products. Vectors hold 64 channels of a row; keys meet in fours. Needs VNNI and whole vectors of channels.
#pragma once

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
    for (long i = 0; i < kStripe; i += W, from += W * stride) {
        __m512 x = _mm512_setzero_ps();
        for (long j = 0; j < stride; ++j)
            x = _mm512_mask_permutexvar_ps(x, _mm512_cmpeq_epi32_mask(vector, _mm512_set1_epi32(int(j))), at, _mm512_loadu_ps(from + j * W));
        const __mmask16 used = _mm512_cmplt_epi32_mask(lane, _mm512_set1_epi32(int(count - i)));
        _mm512_storeu_ps(to + i, _mm512_maskz_mov_ps(used, x));
    }
}

// A row of codes of a query, each group of four spread as direct_scores() meets it: [H / 64][4] vectors.
inline void spread_codes(const code* q, long H, code* to) {
    for (long c = 0; c < H; c += kVector, to += 4 * kVector) {
        const __m512i x = load_codes(q + c);
        _mm512_storeu_si512(to, _mm512_shuffle_epi32(x, _MM_PERM_AAAA));
        _mm512_storeu_si512(to + kVector, _mm512_shuffle_epi32(x, _MM_PERM_BBBB));
        _mm512_storeu_si512(to + 2 * kVector, _mm512_shuffle_epi32(x, _MM_PERM_CCCC));
        _mm512_storeu_si512(to + 3 * kVector, _mm512_shuffle_epi32(x, _MM_PERM_DDDD));
    }
}

// Base-2 scores of 64 keys, `run.k_stride` apart; `most` keeps their maxima.
template <int ROWS, bool MASKED>
SATEEN_APART void direct_scores(const Tile& tile, const RowStates& s, const code* spread, const RowRun& run, const float* k_scale,
                                long H, long first, const char* ahead, float (*p)[kPitch], vfloat (&most)[ROWS]) {
    const __m512i turn = _mm512_set1_epi8(char(0x80));
    vint lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (long key = 0; key < kStripe; key += W) {
        __m512i sum[ROWS][4];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < 4; ++g) sum[r][g] = _mm512_setzero_si512();
        for (long c = 0; c < H; c += kVector) {
            const code* const q = spread + c * 4;
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) {
                if (ahead) fetch(ahead, 4 * kVector), ahead += 4 * kVector;
                const code* const at = run.k + (key + 4 * g) * run.k_stride + c;
                const __m512i w = _mm512_xor_si512(load_codes(at), turn), x = _mm512_xor_si512(load_codes(at + run.k_stride), turn);
                const __m512i y = _mm512_xor_si512(load_codes(at + 2 * run.k_stride), turn);
                const __m512i z = _mm512_xor_si512(load_codes(at + 3 * run.k_stride), turn);
                const __m512i a = _mm512_unpacklo_epi32(w, x), b = _mm512_unpackhi_epi32(w, x);
                const __m512i d = _mm512_unpacklo_epi32(y, z), e = _mm512_unpackhi_epi32(y, z);
                // Every lane of 128 bits has the same four channels of four keys.
                const __m512i four[4] = {_mm512_unpacklo_epi64(a, d), _mm512_unpackhi_epi64(a, d), _mm512_unpacklo_epi64(b, e),
                                         _mm512_unpackhi_epi64(b, e)};
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r)
                    for (int j = 0; j < 4; ++j)
                        sum[r][g] = _mm512_dpbusd_epi32(sum[r][g], four[j], load_codes(q + (r * H * 4) + j * kVector));
            }
        }
        const vfloat scale = load(k_scale + key);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto fold = [](__m512i x, __m512i y) SATEEN_LAMBDA {
                return _mm512_add_epi32(_mm512_shuffle_i32x4(x, y, 0x88), _mm512_shuffle_i32x4(x, y, 0xdd));
            };
            const vint all = (vint)fold(fold(sum[r][0], sum[r][1]), fold(sum[r][2], sum[r][3])) + splat_int(s.start[r]);
            vfloat x = __builtin_convertvector(all, vfloat) * s.step[r] * scale;
            if constexpr (MASKED) {
                const vint at = lane + splat_int(int(first + key));
                x = (at <= splat_int(tile.newest[r])) & (at >= splat_int(tile.oldest[r])) ? x : splat(-kInf);
            }
            store(p[r] + key, x);
            most[r] = maximum(x, most[r]);
        }
    }
}

// out [ROWS, columns] = out * shrink + (codes of P times the values of `quads` times four keys) * size.
template <int ROWS>
SATEEN_APART void direct_values(const RowRun& run, long quads, const char* ahead, const byte (*codes)[kPitch], float* out, long columns,
                                const float* shrink, const float* size) {
    for (long c = 0; c < columns; c += kVector) {
        __m512i sum[ROWS][4];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
            for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_si512();
        for (long d = 0; d < quads; ++d) {
            if (ahead) fetch(ahead, 4 * kVector), ahead += 4 * kVector;
            const code* const at = run.v + 4 * d * run.v_stride + c;
            const __m512i w = load_codes(at), x = load_codes(at + run.v_stride);
            const __m512i y = load_codes(at + 2 * run.v_stride), z = load_codes(at + 3 * run.v_stride);
            const __m512i a = _mm512_unpacklo_epi8(w, x), b = _mm512_unpackhi_epi8(w, x);
            const __m512i e = _mm512_unpacklo_epi8(y, z), f = _mm512_unpackhi_epi8(y, z);
            const __m512i four[4] = {_mm512_unpacklo_epi16(a, e), _mm512_unpackhi_epi16(a, e), _mm512_unpacklo_epi16(b, f),
                                     _mm512_unpackhi_epi16(b, f)};
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                int shares;
                __builtin_memcpy(&shares, codes[r] + 4 * d, 4);
                for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], _mm512_set1_epi32(shares), four[j]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            // Lane L of 128 bits of vector j has channels 16 L + 4 j and on.
            const __m512i a = _mm512_shuffle_i32x4(sum[r][0], sum[r][1], 0x44), b = _mm512_shuffle_i32x4(sum[r][0], sum[r][1], 0xee);
            const __m512i d = _mm512_shuffle_i32x4(sum[r][2], sum[r][3], 0x44), e = _mm512_shuffle_i32x4(sum[r][2], sum[r][3], 0xee);
            const __m512i in_order[4] = {_mm512_shuffle_i32x4(a, d, 0x88), _mm512_shuffle_i32x4(a, d, 0xdd),
                                         _mm512_shuffle_i32x4(b, e, 0x88), _mm512_shuffle_i32x4(b, e, 0xdd)};
            for (int j = 0; j < 4; ++j) {
                float* const to = out + r * columns + c + j * W;
                store(to, load(to) * shrink[r] + __builtin_convertvector((vint)in_order[j], vfloat) * size[r]);
            }
        }
    }
}

// As fold_rows for one block of at most 64 keys and all rows of a tile. The 64 rows from run's first on can be read, also
// those behind its last, whose scales are zeros.
template <int ROWS>
void fold_direct_rows(const Tile& tile, const RowStates& s, const code* spread, const RowRun& run, const float* k_scale,
                      const float* v_scale, long H, long first, const Ahead& ahead, BlockScratch& scratch) {
    vfloat most[ROWS];
    for (int r = 0; r < ROWS; ++r) most[r] = splat(-kInf);
    bool is_masked = run.count < kStripe;
    for (int r = 0; r < ROWS; ++r) is_masked |= tile.oldest[r] > first || tile.newest[r] < first + kStripe - 1;
    if (is_masked) direct_scores<ROWS, true>(tile, s, spread, run, k_scale, H, first, ahead.k, scratch.p, most);
    else direct_scores<ROWS, false>(tile, s, spread, run, k_scale, H, first, ahead.k, scratch.p, most);
    float shrink[ROWS], size[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const float before = s.top[r], found = max_lanes(most[r]);
        s.top[r] = found > before ? found : before;
        const float base = s.top[r] == -kInf ? 0.0f : s.top[r];
        shrink[r] = exp2_fast(splat(before - base))[0];
        vfloat total{}, largest{};
        vfloat share[kStripe / W];
        for (int i = 0; i < kStripe / W; ++i) {
            const vfloat x = exp2_fast(load(scratch.p[r] + i * W) - base);
            total += x;
            share[i] = x * load(v_scale + i * W);
            largest = maximum(share[i], largest);
        }
        s.sum[r] = s.sum[r] * shrink[r] + sum_lanes(total);
        size[r] = max_lanes(largest) / 255.0f;
        const vfloat per_size = splat(size[r] > 0.0f ? 1.0f / size[r] : 0.0f);
        vint rounded[kStripe / W];
        for (int i = 0; i < kStripe / W; ++i) rounded[i] = nearest(share[i] * per_size);
        store_codes(rounded, scratch.codes[r]);
    }
    direct_values<ROWS>(run, divide_up(run.count, 4), ahead.v, scratch.codes, s.out, s.columns, shrink, size);
}

inline void fold_direct(const Tile& tile, const RowStates& s, const code* spread, const RowRun& run, const float* k_scale,
                        const float* v_scale, long H, long first, const Ahead& ahead, BlockScratch& scratch) {
    switch (tile.last - tile.first) {
        case 1: return fold_direct_rows<1>(tile, s, spread, run, k_scale, v_scale, H, first, ahead, scratch);
        case 2: return fold_direct_rows<2>(tile, s, spread, run, k_scale, v_scale, H, first, ahead, scratch);
        case 3: return fold_direct_rows<3>(tile, s, spread, run, k_scale, v_scale, H, first, ahead, scratch);
        case 4: return fold_direct_rows<4>(tile, s, spread, run, k_scale, v_scale, H, first, ahead, scratch);
        case 5: return fold_direct_rows<5>(tile, s, spread, run, k_scale, v_scale, H, first, ahead, scratch);
        default: return fold_direct_rows<6>(tile, s, spread, run, k_scale, v_scale, H, first, ahead, scratch);
    }
}
#endif

}  // namespace
}  // namespace sateen::SATEEN_ISA
