// Attention of a few query rows, as in decoding: vectors run along the channels instead of the rows, whose lanes
// would be idle. Called by attention_forward.cpp, which merges and writes the result like any other.
#pragma once

#include "attention_rows.h"
#include "gemm.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kFewRows = 8;
constexpr long kFewRowsKeys = 256;  // keys per block: the maximum over lanes is taken once per block and row

inline bool fits_few_rows(const AttentionShape& p, long rows) {
    return rows <= kFewRows && p.H % W == 0 && p.V % W == 0;
}

// Scores of one row and keys [begin, end), -inf where not visible; returns the largest.
inline float few_scores(const AttentionShape& p, const Tile& tile, long row, const float* q, long k0, long head, long begin,
                        long end, float* scores) {
    vint lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    vfloat top = splat(-kInf);
    for (long s = begin; s < end; s += W) {
        vfloat dot[W] = {};
        const float* key[W];
        for (int i = 0; i < W; ++i) key[i] = p.k.at(k0 + (s + i < end ? s + i : end - 1), head);
        for (long h = 0; h < p.H; h += W) {
            const vfloat x = load(q + h);
#pragma GCC unroll 16
            for (int i = 0; i < W; ++i) dot[i] += x * load(key[i] + h);
        }
        const vint at = lane + splat_int(int(s));
        const vint seen = (at <= splat_int(tile.newest[row])) & (at >= splat_int(tile.oldest[row])) & (at < splat_int(int(end)));
        const vfloat x = seen ? sum_each(dot) : splat(-kInf);
        store(scores + s - begin, x);
        top = maximum(x, top);
    }
    return max_lanes(top);
}

// Folds keys [begin, end), at most kFewRowsKeys, into what the online softmax of some rows carries: `top` and `sum` [rows],
// `out` [rows, V]. `query(i)` is row i's channels times scale * log2(e); `scores` is scratch of [rows, kFewRowsKeys].
// `record(i, x)` sees row i's scores before they become weights.
template <typename RowAt, typename Record>
SATEEN_INLINE void fold_few_rows(const AttentionShape& p, const Tile& tile, RowAt query, long k0, long head, long begin, long end,
                                 float* scores, float* top, float* sum, float* out, Record record) {
    const long rows = tile.last - tile.first;
    for (long i = 0; i < rows; ++i) {
        float* const x = scores + i * kFewRowsKeys;
        const float before = top[i], largest = few_scores(p, tile, i, query(i), k0, head, begin, end, x);
        record(i, x);
        top[i] = largest > before ? largest : before;
        const float base = top[i] == -kInf ? 0.0f : top[i];
        const float shrink = exp2_fast(splat(before - base))[0];
        vfloat total{};
        for (long s = 0; s < end - begin; s += W) {
            const vfloat weight = exp2_fast(load(x + s) - base);
            total += weight;
            store(x + s, weight);
        }
        sum[i] = sum[i] * shrink + sum_lanes(total);
        if (shrink != 1.0f)
            for (long c = 0; c < p.V; c += W) store(out + i * p.V + c, load(out + i * p.V + c) * shrink);
    }
    multiply<false, Into::add>({scores, kFewRowsKeys, p.v.at(k0 + begin, head), p.v.token_stride, out, p.V}, rows, p.V,
                               end - begin);
}

template <typename RowAt>
SATEEN_INLINE void fold_few_rows(const AttentionShape& p, const Tile& tile, RowAt query, long k0, long head, long begin, long end,
                                 float* scores, float* top, float* sum, float* out) {
    fold_few_rows(p, tile, query, k0, head, begin, end, scores, top, sum, out, [](long, const float*) {});
}

// Attends to keys [from, to) of one tile of at most kFewRows rows; `top`, `sum` [rows] and `out` [rows, V] are set.
// `query(i)` is row i's channels, `rows_of(begin, end)` a shape whose first keys and values of head 0 are these; q and scores
// are scratch of [rows, H] and [rows, kFewRowsKeys].
template <typename RowAt, typename RowsOf>
void attend_few_rows(const AttentionShape& p, const Tile& tile, RowAt query, RowsOf rows_of, long from, long to, float* q,
                     float* scores, float* top, float* sum, float* out) {
    const long rows = tile.last - tile.first;
    for (long i = 0; i < rows; ++i) {
        top[i] = -kInf, sum[i] = 0.0f;
        for (long h = 0; h < p.H; h += W) store(q + i * p.H + h, load(query(i) + h) * (p.scale * kLog2e));
        for (long c = 0; c < p.V; c += W) store(out + i * p.V + c, vfloat{});
    }
    const auto scaled = [&](long i) { return q + i * p.H; };
    for (long begin = from; begin < to; begin += kFewRowsKeys) {
        const long end = begin + kFewRowsKeys < to ? begin + kFewRowsKeys : to;
        fold_few_rows(rows_of(begin, end), tile, scaled, -begin, 0, begin, end, scores, top, sum, out);
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
