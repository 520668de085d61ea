// One block of keys for a few query rows: int8 scores, the online softmax in float32, P as codes, int8 values.
//
// The levels of the codes leave the sums at the end, against the row sum.
#pragma once

#include "gemm.h"
#include "int8_state.h"

namespace sateen::SATEEN_ISA {
namespace {

struct Form {
    float levels;      // of the codes of P
    bool sum_codes;    // the row sum is of the codes
    long quads;        // of channels
};

struct BlockScratch {
    alignas(64) float p[12][kPitch];   // scores, then P
    alignas(64) byte codes[kGroup][kPitch];
};

// Base-2 scores of ROWS rows from lane `lane` on and one stripe of a block; `most` keeps their maxima.
template <int ROWS, bool MASKED>
SATEEN_APART void score_stripe(const Tile& tile, long lane, const RowStates& s, const KeyBlock& b, long quads, long stripe,
                                float (*p)[kPitch], vfloat (&most)[ROWS]) {
    const float* const k_scale = b.k_scale + stripe * kStripe;
    vint index;
    for (int i = 0; i < W; ++i) index[i] = i;
    const auto take = [&](int r, long key, vint sum) SATEEN_LAMBDA {
        vfloat x = __builtin_convertvector(sum, vfloat) * s.step[lane + r] * load(k_scale + key);
        if constexpr (MASKED) {
            const vint at = index + splat_int(int(b.first + stripe * kStripe + key));
            const vint seen = (at <= splat_int(tile.newest[lane + r])) & (at >= splat_int(tile.oldest[lane + r]));
            x = seen ? x : splat(-kInf);
        }
        store(p[r] + stripe * kStripe + key, x);
        most[r] = maximum(x, most[r]);
    };
    multiply_keys<ROWS>(b.k + stripe * quads * kStripe * 4, quads, s.codes + lane * s.stride, s.stride, s.start + lane, take);
}

// Four vectors, or what 64 codes are in vectors of this level, of numbers 0..255 to bytes.
SATEEN_INLINE void store_codes(const vint (&x)[kStripe / W], byte* to) {
#if defined(__AVX512BW__)
    const __m512i low = _mm512_packus_epi32((__m512i)x[0], (__m512i)x[1]), high = _mm512_packus_epi32((__m512i)x[2], (__m512i)x[3]);
    const vint y = (vint)_mm512_packus_epi16(low, high);  // lanes of 128 bits, each with four keys of every vector
    const vint in_order = __builtin_shufflevector(y, y, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __builtin_memcpy(to, &in_order, sizeof in_order);
#else
    typedef byte bytes __attribute__((vector_size(W)));
    for (int i = 0; i < kStripe / W; ++i) {
        const vint y = x[i] > 255 ? splat_int(255) : x[i];
        const bytes narrow = __builtin_convertvector(y, bytes);
        __builtin_memcpy(to + i * W, &narrow, sizeof narrow);
    }
#endif
}

// Scores of one row and keys [from, to) become P in place and, where `codes` is not null, codes. Returns their sum.
template <bool SUM_CODES>
SATEEN_APART vfloat exponentials(float* p, byte* codes, long from, long to, float base, float levels) {
    vfloat total{};
    vint code_total{};
    for (long at = from; at < to; at += kStripe) {
        vint rounded[kStripe / W];
        for (int j = 0; j < kStripe / W; ++j) {
            const vfloat x = exp2_fast(load(p + at + j * W) - base);
            rounded[j] = nearest(x * levels);
            if constexpr (SUM_CODES) code_total += rounded[j];
            else total += x;
            if (!codes) store(p + at + j * W, x);
        }
        if (codes) store_codes(rounded, codes + at);
    }
    return SUM_CODES ? __builtin_convertvector(code_total, vfloat) / levels : total;
}

// Values with a scale per key: P times it becomes codes by the row's own maximum. Returns the size of a code.
SATEEN_APART inline float weighted_codes(float* p, const float* v_scale, byte* codes, long from, long to) {
    vfloat most{};
    for (long at = from; at < to; at += W) {
        const vfloat x = load(p + at) * load(v_scale + at);
        store(p + at, x);
        most = maximum(x, most);
    }
    const float size = max_lanes(most) / 255.0f;
    const vfloat per_size = splat(size > 0.0f ? 1.0f / size : 0.0f);
    for (long at = from; at < to; at += kStripe) {
        vint rounded[kStripe / W];
        for (int j = 0; j < kStripe / W; ++j) rounded[j] = nearest(load(p + at + j * W) * per_size);
        store_codes(rounded, codes + at);
    }
    return size;
}

// out [ROWS, columns] = out * shrink + (codes of P times values) * size.
template <int ROWS>
SATEEN_APART void add_values(const code* v, long quads, const byte* codes, float* out, long columns, const float* shrink,
                             const float* size) {
    const auto take = [&](int r, long column, vint sum) SATEEN_LAMBDA {
        float* const at = out + r * columns + column;
        store(at, load(at) * shrink[r] + __builtin_convertvector(sum, vfloat) * size[r]);
    };
    multiply_values<ROWS>(v, columns, quads, codes, kPitch, take);
}

SATEEN_APART inline void add_float_values(const float* v, long keys, const float* p, float* out, long columns) {
    multiply<false, Into::add>({p, kPitch, v, columns, out, columns}, 12, columns, keys);
}

// Folds a block into ROWS rows of a tile from `lane` on.
template <int ROWS>
void fold_rows(const Form& form, const Tile& tile, long lane, const RowStates& s, const KeyBlock& b, BlockScratch& scratch,
               float (*p)[kPitch], float* shrink) {
    const long used = tile.last - tile.first, last = (lane + ROWS < used ? lane + ROWS : used) - 1;
    for (int r = 0; r < ROWS; ++r) shrink[r] = 1.0f;
    if (last < lane) return;
    // Rows see later keys from one to the next.
    const long low = tile.oldest[lane] - b.first, high = tile.newest[last] + 1 - b.first;
    const long end = high < b.count ? high : b.count;
    const long from = low > 0 ? low / kStripe : 0, to = end > 0 ? (end + kStripe - 1) / kStripe : 0;
    const auto clear = [&](long begin, long stop) {
        for (int r = 0; r < ROWS; ++r)
            for (long i = begin * kStripe; i < stop * kStripe; i += W) store(p[r] + i, vfloat{});
    };
    if (from >= to) {
        if (!b.v) clear(0, (b.count + kStripe - 1) / kStripe);
        return;
    }
    vfloat most[ROWS];
    for (int r = 0; r < ROWS; ++r) most[r] = splat(-kInf);
    const long all_above = tile.oldest[last], all_below = tile.newest[lane] + 1;  // every row sees the keys between
    for (long stripe = from; stripe < to; ++stripe) {
        const long first = b.first + stripe * kStripe;
        if (first < all_above || first + kStripe > all_below || (stripe + 1) * kStripe > b.count)
            score_stripe<ROWS, true>(tile, lane, s, b, form.quads, stripe, p, most);
        else
            score_stripe<ROWS, false>(tile, lane, s, b, form.quads, stripe, p, most);
    }
    const bool per_key = b.v && b.v_scale;
    float size[ROWS];
    for (int r = 0; r < ROWS; ++r) {
        const long i = lane + r;
        const float before = s.top[i], found = max_lanes(most[r]);
        s.top[i] = found > before ? found : before;
        const float base = s.top[i] == -kInf ? 0.0f : s.top[i];
        shrink[r] = exp2_fast(splat(before - base))[0];
        const long begin = from * kStripe, stop = to * kStripe;
        byte* const codes = b.v && !per_key ? scratch.codes[r] : nullptr;
        const vfloat total = form.sum_codes ? exponentials<true>(p[r], codes, begin, stop, base, form.levels)
                                            : exponentials<false>(p[r], codes, begin, stop, base, form.levels);
        s.sum[i] = s.sum[i] * shrink[r] + sum_lanes(total);
        size[r] = per_key ? weighted_codes(p[r], b.v_scale, scratch.codes[r], begin, stop) : 1.0f;
    }
    if (!b.v) {
        clear(0, from);
        clear(to, (b.count + kStripe - 1) / kStripe);
        return;
    }
    const long first_quad = from * kStripe / 4, stop = to * kStripe < b.count ? to * kStripe : b.count;
    add_values<ROWS>(b.v + first_quad * s.columns * 4, (stop + 3) / 4 - first_quad, &scratch.codes[0][from * kStripe],
                     s.out + lane * s.columns, s.columns, shrink, size);
}

inline void fold_group(long rows, const Form& form, const Tile& tile, long lane, const RowStates& s, const KeyBlock& b,
                       BlockScratch& scratch, float (*p)[kPitch], float* shrink) {
    if (rows == 1) fold_rows<1>(form, tile, lane, s, b, scratch, p, shrink);
    else if (rows == 2) fold_rows<2>(form, tile, lane, s, b, scratch, p, shrink);
    else if (rows == 3) fold_rows<3>(form, tile, lane, s, b, scratch, p, shrink);
    else if (rows == 4) fold_rows<4>(form, tile, lane, s, b, scratch, p, shrink);
    else fold_rows<kGroup>(form, tile, lane, s, b, scratch, p, shrink);
}

// Folds a block into all rows of a tile.
inline void fold_block(const Form& form, const Tile& tile, const RowStates& s, const KeyBlock& b, BlockScratch& scratch) {
    const long used = tile.last - tile.first;
    float shrink[12];
    if (b.v) {
        const long groups = divide_up(used, kGroup), even = divide_up(used, groups), rows = even == 5 ? kGroup : even;
        for (long lane = 0; lane < used; lane += rows) fold_group(rows, form, tile, lane, s, b, scratch, scratch.p, shrink);
        return;
    }
    for (long lane = 0; lane < used; lane += 12) {
        for (long r = 0; r < 12; r += kGroup)
            fold_rows<kGroup>(form, tile, lane + r, s, b, scratch, scratch.p + r, shrink + r);
        for (long r = 0; r < 12; ++r)
            if (shrink[r] != 1.0f)
                for (long c = 0; c < s.columns; c += W) {
                    float* const at = s.out + (lane + r) * s.columns + c;
                    store(at, load(at) * shrink[r]);
                }
        add_float_values(b.v_float, b.count, scratch.p[0], s.out + lane * s.columns, s.columns);
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
