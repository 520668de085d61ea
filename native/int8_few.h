// A block of cached int8 rows and a few query rows, read where it lies: with so few queries packing the rows would cost
// more than the products. Vectors hold 64 channels of a row; keys meet in fours. Needs VNNI and whole vectors of channels.
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

// out of 64 channels = out * shrink + sum * size, where lane L of 128 bits of vector j has channels 16 L + 4 j and on.
SATEEN_INLINE void add_in_order(const __m512i (&sum)[4], float shrink, float size, float* out) {
    const __m512i a = _mm512_shuffle_i32x4(sum[0], sum[1], 0x44), b = _mm512_shuffle_i32x4(sum[0], sum[1], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(sum[2], sum[3], 0x44), e = _mm512_shuffle_i32x4(sum[2], sum[3], 0xee);
    const __m512i in_order[4] = {_mm512_shuffle_i32x4(a, d, 0x88), _mm512_shuffle_i32x4(a, d, 0xdd),
                                 _mm512_shuffle_i32x4(b, e, 0x88), _mm512_shuffle_i32x4(b, e, 0xdd)};
    for (int j = 0; j < 4; ++j) store(out + j * W, load(out + j * W) * shrink + __builtin_convertvector((vint)in_order[j], vfloat) * size);
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
            add_in_order(sum[r], shrink[r], size[r], out + r * columns + c);
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
    // Stage by stage: what one row waits for, the others have to do.
    float shrink[ROWS], size[ROWS], base[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const float before = s.top[r], found = max_lanes(most[r]);
        s.top[r] = found > before ? found : before;
        base[r] = s.top[r] == -kInf ? 0.0f : s.top[r];
        shrink[r] = found > before ? exp2_fast(splat(before - base[r]))[0] : before == -kInf ? 0.0f : 1.0f;
    }
    vfloat largest[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        vfloat total{};
        largest[r] = vfloat{};
#pragma GCC unroll 4
        for (int i = 0; i < kStripe / W; ++i) {
            const vfloat x = exp2_fast(load(scratch.p[r] + i * W) - base[r]);
            total += x;
            const vfloat share = x * load(v_scale + i * W);
            store(scratch.p[r] + i * W, share);
            largest[r] = maximum(share, largest[r]);
        }
        s.sum[r] = s.sum[r] * shrink[r] + sum_lanes(total);
    }
    for (int r = 0; r < ROWS; ++r) size[r] = max_lanes(largest[r]) / 255.0f;
    for (int r = 0; r < ROWS; ++r) {
        const vfloat per_size = splat(size[r] > 0.0f ? 1.0f / size[r] : 0.0f);
        vint rounded[kStripe / W];
#pragma GCC unroll 4
        for (int i = 0; i < kStripe / W; ++i) rounded[i] = nearest(load(scratch.p[r] + i * W) * per_size);
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

// Products of a query's spread codes and four keys, `stride` apart.
SATEEN_INLINE void multiply_quad(const code* k, long stride, long H, const code* spread, int* to) {
    const __m512i turn = _mm512_set1_epi8(char(0x80));
    __m512i sum = _mm512_setzero_si512();
    for (long c = 0; c < H; c += kVector) {
        const __m512i w = _mm512_xor_si512(load_codes(k + c), turn), x = _mm512_xor_si512(load_codes(k + c + stride), turn);
        const __m512i y = _mm512_xor_si512(load_codes(k + c + 2 * stride), turn), z = _mm512_xor_si512(load_codes(k + c + 3 * stride), turn);
        const __m512i a = _mm512_unpacklo_epi32(w, x), b = _mm512_unpackhi_epi32(w, x);
        const __m512i d = _mm512_unpacklo_epi32(y, z), e = _mm512_unpackhi_epi32(y, z);
        const __m512i four[4] = {_mm512_unpacklo_epi64(a, d), _mm512_unpackhi_epi64(a, d), _mm512_unpacklo_epi64(b, e),
                                 _mm512_unpackhi_epi64(b, e)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum = _mm512_dpbusd_epi32(sum, four[j], load_codes(spread + c * 4 + j * kVector));
    }
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1)));
}

// Adds P's codes times the values of eight keys, `stride` apart, to the sums of 64 channels, in direct_values()'s order. The
// first eight begin the sums.
SATEEN_INLINE void add_eight(const code* v, long stride, bool begins, const byte* codes, int* sums) {
    __m512i sum[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = begins ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + j * W);
#pragma GCC unroll 2
    for (int d = 0; d < 2; ++d, v += 4 * stride) {
        const __m512i w = load_codes(v), x = load_codes(v + stride), y = load_codes(v + 2 * stride), z = load_codes(v + 3 * stride);
        const __m512i a = _mm512_unpacklo_epi8(w, x), b = _mm512_unpackhi_epi8(w, x);
        const __m512i e = _mm512_unpacklo_epi8(y, z), f = _mm512_unpackhi_epi8(y, z);
        const __m512i four[4] = {_mm512_unpacklo_epi16(a, e), _mm512_unpackhi_epi16(a, e), _mm512_unpacklo_epi16(b, f),
                                 _mm512_unpackhi_epi16(b, f)};
        int shares;
        __builtin_memcpy(&shares, codes + 4 * d, 4);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], _mm512_set1_epi32(shares), four[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(sums + j * W, sum[j]);
}

// out = out * shrink + sums * size.
inline void take_sums(const int* sums, long V, float shrink, float size, float* out) {
    for (long c = 0; c < V; c += kVector) {
        __m512i sum[4];
        for (int j = 0; j < 4; ++j) sum[j] = _mm512_loadu_si512(sums + c + j * W);
        add_in_order(sum, shrink, size, out + c);
    }
}

// A block of at most 64 keys and one query row per head, all heads in the order of the cache's memory: with so few products
// the time is that of reading. Numbers are those of fold_direct().
struct OneRowFold {
    static constexpr long kStep = 8;  // tokens whose heads are read one after another

    const Tile& tile;
    long K, H, V;
    float* scales;  // [2, K, 64] of keys and values
    code* spread;   // [K, 4 H]
    float *x, *factors;  // [K, 64] scores, then shares; [3, K]
    int *products, *sums;  // [K, 64], [K, V]
    byte* codes;           // [K, 64]

    static long size(long K, long H, long V) { return K * (2 * kStripe + H + 2 * kStripe + 16 + V + kStripe / 4); }

    OneRowFold(const Tile& tile, long K, long H, long V, float* memory) : tile(tile), K(K), H(H), V(V), scales(memory) {
        x = scales + 2 * K * kStripe;
        products = reinterpret_cast<int*>(x + K * kStripe), sums = products + K * kStripe;
        spread = reinterpret_cast<code*>(sums + K * V), codes = reinterpret_cast<byte*>(spread + K * 4 * H);
        factors = reinterpret_cast<float*>(codes + K * kStripe);
    }

    SATEEN_APART void keys(const RowRun& run, long begin, const RowsAhead& ahead) const {
        const code* k = run.k + begin * run.k_stride;
        for (long head = 0; head < K; ++head, k += H) {
            ahead.ask(head, kStep * H);
#pragma GCC unroll 2
            for (long s = 0; s < kStep; s += 4)
                multiply_quad(k + s * run.k_stride, run.k_stride, H, spread + head * 4 * H, products + head * kStripe + begin + s);
        }
    }

    SATEEN_APART void values(const RowRun& run, long begin, const RowsAhead& ahead) const {
        const code* v = run.v + begin * run.v_stride;
        for (long head = 0; head < K; ++head, v += V) {
            ahead.ask(head, kStep * V);
            for (long c = 0; c < V; c += kVector)
                add_eight(v + c, run.v_stride, begin == 0, codes + head * kStripe + begin, sums + head * V + c);
        }
    }

    // Products to P's codes, stage by stage as in fold_direct_rows(); what the online softmax carries goes along.
    template <bool MASKED, typename StatesOf>
    SATEEN_APART void soften(long first, StatesOf states_of) const {
        vint lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        float *const shrink = factors, *const size = factors + K, *const base = factors + 2 * K;
        for (long head = 0; head < K; ++head) {
            const RowStates s = states_of(head);
            vfloat most = splat(-kInf);
#pragma GCC unroll 4
            for (long i = 0; i < kStripe; i += W) {
                const vint all = load_int(products + head * kStripe + i) + splat_int(s.start[0]);
                vfloat y = __builtin_convertvector(all, vfloat) * s.step[0] * load(scales + head * kStripe + i);
                if constexpr (MASKED) {
                    const vint at = lane + splat_int(int(first + i));
                    y = (at <= splat_int(tile.newest[0])) & (at >= splat_int(tile.oldest[0])) ? y : splat(-kInf);
                }
                store(x + head * kStripe + i, y);
                most = maximum(y, most);
            }
            base[head] = max_lanes(most);
        }
        for (long head = 0; head < K; ++head) {
            const RowStates s = states_of(head);
            const float before = s.top[0], found = base[head];
            s.top[0] = found > before ? found : before;
            base[head] = s.top[0] == -kInf ? 0.0f : s.top[0];
            shrink[head] = found > before ? exp2_fast(splat(before - base[head]))[0] : before == -kInf ? 0.0f : 1.0f;
        }
        for (long head = 0; head < K; ++head) {
            const RowStates s = states_of(head);
            vfloat total{}, largest{};
#pragma GCC unroll 4
            for (long i = 0; i < kStripe; i += W) {
                const vfloat y = exp2_fast(load(x + head * kStripe + i) - base[head]);
                total += y;
                const vfloat share = y * load(scales + (K + head) * kStripe + i);
                store(x + head * kStripe + i, share);
                largest = maximum(share, largest);
            }
            s.sum[0] = s.sum[0] * shrink[head] + sum_lanes(total);
            size[head] = max_lanes(largest) / 255.0f;
        }
        for (long head = 0; head < K; ++head) {
            const vfloat per_size = splat(size[head] > 0.0f ? 1.0f / size[head] : 0.0f);
            vint rounded[kStripe / W];
#pragma GCC unroll 4
            for (int i = 0; i < kStripe / W; ++i) rounded[i] = nearest(load(x + head * kStripe + i * W) * per_size);
            store_codes(rounded, codes + head * kStripe);
        }
    }

    // `states_of(head)`, and what `ahead(i)` is read on the way of the i-th step; steps over values follow those over keys.
    // The 64 rows from run's first on can be read, also those behind its last, whose scales are zeros.
    template <typename StatesOf, typename AheadOf>
    void fold(const RowRun& run, long first, StatesOf states_of, AheadOf ahead) const {
        for (long head = 0; head < K; ++head) {
            take_scales(run.k_scale, head, run.scale_stride, run.count, scales + head * kStripe);
            take_scales(run.v_scale, head, run.scale_stride, run.count, scales + (K + head) * kStripe);
        }
        long number = 0;
        for (long s = 0; s < kStripe; s += kStep) keys(run, s, ahead(number++));
        if (run.count < kStripe || tile.oldest[0] > first || tile.newest[0] < first + kStripe - 1) soften<true>(first, states_of);
        else soften<false>(first, states_of);
        for (long s = 0; s < run.count; s += kStep) values(run, s, ahead(number++));
        for (long head = 0; head < K; ++head) take_sums(sums + head * V, V, factors[head], factors[K + head], states_of(head).out);
    }
};
#endif

}  // namespace
}  // namespace sateen::SATEEN_ISA
