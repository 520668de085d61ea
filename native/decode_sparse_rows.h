// Rows of one key/value head for HySparse's layers in a decode step, and how a few query rows meet them: in float32, or in
// bfloat16 where the cache has it and the processor multiplies it; queries and weights are then rounded, sums are float32.
#pragma once

#include "attention_decode.h"
#include "decode_rows.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kInPlace = 16;   // keys that are worth a look where they lie
constexpr long kMostKeys = kFewRowsKeys;  // that are met together

template <typename Number>
struct HeadRows {
    const Number *k, *v;
    long k_stride, v_stride, count;
    const Number *next_k = nullptr, *next_v = nullptr;  // rows that will be met next, as far apart; to be asked for meanwhile
};

// Numbers of a row: whole vectors of floats, or the channels themselves.
template <typename Number>
SATEEN_INLINE long row_width(long channels) {
    return sizeof(Number) == sizeof(float) ? padded(channels) : channels;
}

// `count` rows of the cache that lie one after another, of one head: where they are, or a copy.
inline HeadRows<float> rows_of_head(const DecodeLayer& l, long row, long head, long count, float* keys, float* values) {
    const long H = padded(l.H), V = padded(l.V), at = row * l.K + head;
    const void *const k = offset(l.cache.k, l.cache.format, at * l.H), *const v = offset(l.cache.v, l.cache.format, at * l.V);
    if (l.cache.format == Format::f32 && H == l.H && V == l.V && count >= kInPlace)
        return {static_cast<const float*>(k), static_cast<const float*>(v), l.K * H, l.K * V, count};
    widen_rows(l.cache.format, k, l.K * l.H, count, l.H, keys, H);
    widen_rows(l.cache.format, v, l.K * l.V, count, l.V, values, V);
    return {keys, values, H, V, count};
}

// New rows of one head, from token t on.
inline HeadRows<float> new_rows(const DecodeStep& p, const DecodeLayer& l, long t, long head, long count, float*, float*) {
    const long H = padded(l.H), V = padded(l.V);
    return {p.kr + (t * l.K + head) * H, p.vr + (t * l.K + head) * V, l.K * H, l.K * V, count};
}

template <typename RowAt, typename Record>
inline void fold_rows(const HeadRows<float>& rows, const DecodeLayer& l, const Tile& tile, RowAt query, long begin, float* scores,
                      float* top, float* sum, float* out, Record record) {
    AttentionShape shape{};
    shape.H = padded(l.H), shape.V = padded(l.V), shape.k = {rows.k, rows.k_stride, 0}, shape.v = {rows.v, rows.v_stride, 0};
    fold_few_rows(shape, tile, query, -begin, 0, begin, begin + rows.count, scores, top, sum, out, record);
}

// Row i's query as these numbers; `to` has room for it.
inline const float* query_as(const float* query, long, float*) { return query; }

#ifdef __AVX512BF16__
constexpr int kTwinRows = 4, kTwinKeys = W / kTwinRows;  // query rows and keys whose products fill one vector
constexpr long kTwin = 2 * W;                // bfloat16 numbers of one vector

inline const bits16* query_as(const float* query, long channels, bits16* to) {
    narrow(Format::bf16, query, channels, to);
    return to;
}

inline HeadRows<bits16> rows_of_head(const DecodeLayer& l, long row, long head, long count, bits16* keys, bits16* values) {
    const long at = row * l.K + head;
    const auto *const k = static_cast<const bits16*>(l.cache.k) + at * l.H, *const v = static_cast<const bits16*>(l.cache.v) + at * l.V;
    if (count >= kInPlace) return {k, v, l.K * l.H, l.K * l.V, count};
    for (long s = 0; s < count; ++s) {
        __builtin_memcpy(keys + s * l.H, k + s * l.K * l.H, l.H * sizeof(bits16));
        __builtin_memcpy(values + s * l.V, v + s * l.K * l.V, l.V * sizeof(bits16));
    }
    return {keys, values, l.H, l.V, count};
}

inline HeadRows<bits16> new_rows(const DecodeStep& p, const DecodeLayer& l, long t, long head, long count, bits16* keys, bits16* values) {
    for (long s = 0; s < count; ++s) {
        const long at = (t + s) * l.K + head;
        narrow(Format::bf16, p.kr + at * padded(l.H), l.H, keys + s * l.H);
        narrow(Format::bf16, p.vr + at * padded(l.V), l.V, values + s * l.V);
    }
    return {keys, values, l.H, l.V, count};
}

SATEEN_INLINE __m512bh twin(const bits16* p) { return load_all<__m512bh>(p); }

// scores[i][s] of ROWS <= kTwinRows rows; `width` numbers apart.
template <int ROWS>
inline void score_rows(const HeadRows<bits16>& rows, long H, const bits16* const (&query)[kTwinRows], float* scores, long width) {
    for (long s = 0; s < rows.count; s += kTwinKeys) {
        const bits16* key[kTwinKeys];
#pragma GCC unroll 4
        for (int j = 0; j < kTwinKeys; ++j) key[j] = rows.k + (s + j < rows.count ? s + j : rows.count - 1) * rows.k_stride;
        for (int j = 0; rows.next_k && j < kTwinKeys; ++j)
            for (long h = 0; h < H; h += kTwin) __builtin_prefetch(rows.next_k + (s + j) * rows.k_stride + h, 0, 2);
        vfloat dot[W] = {};
        for (long h = 0; h < H; h += kTwin) {
            __m512bh x[kTwinKeys];
#pragma GCC unroll 4
            for (int j = 0; j < kTwinKeys; ++j) x[j] = twin(key[j] + h);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
                const __m512bh y = twin(query[i] + h);
#pragma GCC unroll 4
                for (int j = 0; j < kTwinKeys; ++j) dot[i * kTwinKeys + j] = Bf16::add(dot[i * kTwinKeys + j], x[j], y);
            }
        }
        const vfloat each = sum_each(dot);
        float all[W];
        store(all, each);
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) __builtin_memcpy(scores + i * width + s, all + i * kTwinKeys, kTwinKeys * sizeof(float));
    }
}

// out[i] += weights[i] times the values; `weights` is bfloat16 [ROWS, width], zeros behind the last key.
template <int ROWS>
inline void add_rows(const HeadRows<bits16>& rows, long V, const bits16* weights, long width, float* out) {
    for (long c = 0; c < V; c += kTwin) {
        vfloat low[ROWS], high[ROWS];
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) low[i] = high[i] = vfloat{};
        for (long s = 0; s < rows.count; s += 2) {
            const bits16* const one = rows.v + s * rows.v_stride + c;
            if (rows.next_v) {
                __builtin_prefetch(rows.next_v + s * rows.v_stride + c, 0, 2);
                __builtin_prefetch(rows.next_v + (s + 1) * rows.v_stride + c, 0, 2);
            }
            const __m512i a = load_all<__m512i>(one), b = s + 1 < rows.count ? load_all<__m512i>(one + rows.v_stride) : __m512i{};
            // Even lanes one key, odd lanes the next; channels in the order that the shuffle below undoes.
            const auto first = (__m512bh)_mm512_maskz_unpacklo_epi16(0xffffffff, a, b);
            const auto second = (__m512bh)_mm512_maskz_unpackhi_epi16(0xffffffff, a, b);
#pragma GCC unroll 4
            for (int i = 0; i < ROWS; ++i) {
                int both;
                __builtin_memcpy(&both, weights + i * width + s, sizeof both);
                const auto share = (__m512bh)splat_int(both);
                low[i] = Bf16::add(low[i], first, share), high[i] = Bf16::add(high[i], second, share);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < ROWS; ++i) {
            const vfloat x = __builtin_shufflevector(low[i], high[i], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const vfloat y = __builtin_shufflevector(low[i], high[i], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            float* const to = out + i * V + c;
            store(to, load(to) + x), store(to + W, load(to + W) + y);
        }
    }
}

// Scratch of fold_rows in bfloat16, in floats: scores and weights of kTwinRows rows.
constexpr long kTwinWeights = kTwinRows * kMostKeys;

template <int ROWS, typename RowAt, typename Record>
inline void fold_some(const HeadRows<bits16>& rows, const DecodeLayer& l, const Tile& tile, long from, RowAt query, long begin,
                      float* scores, float* top, float* sum, float* out, Record record) {
    bits16* const weights = reinterpret_cast<bits16*>(scores + kTwinWeights);
    const bits16* queries[kTwinRows] = {};
    for (int i = 0; i < ROWS; ++i) queries[i] = query(from + i);
    score_rows<ROWS>(rows, l.H, queries, scores, kMostKeys);
    vint lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    for (int i = 0; i < ROWS; ++i) {
        float* const x = scores + i * kMostKeys;
        const long row = from + i, seen = tile.newest[row] - begin + 1, count = seen < rows.count ? seen : rows.count;
        vfloat largest = splat(-kInf);
        for (long s = 0; s < rows.count; s += W) {
            const vfloat some = lane + splat_int(int(s)) < splat_int(int(count)) ? load(x + s) : splat(-kInf);
            store(x + s, some);
            largest = maximum(some, largest);
        }
        record(row, x);
        const float before = top[row], found = max_lanes(largest);
        top[row] = found > before ? found : before;
        const float base = top[row] == -kInf ? 0.0f : top[row];
        vfloat total{};
        for (long s = 0; s < rows.count; s += W) {
            const vfloat weight = exp2_fast(load(x + s) - base);
            total += weight;
            const auto rounded = _mm512_maskz_cvtneps_pbh(0xffff, (__m512)weight);
            __builtin_memcpy(weights + i * kMostKeys + s, &rounded, sizeof rounded);
        }
        const float shrink = found > before ? exp2_fast(splat(before - base))[0] : 1.0f;
        sum[row] = sum[row] * shrink + sum_lanes(total);
        if (shrink != 1.0f)
            for (long c = 0; c < l.V; c += W) store(out + row * l.V + c, load(out + row * l.V + c) * shrink);
    }
    add_rows<ROWS>(rows, l.V, weights, kMostKeys, out + from * l.V);
}

template <typename RowAt, typename Record>
inline void fold_rows(const HeadRows<bits16>& rows, const DecodeLayer& l, const Tile& tile, RowAt query, long begin, float* scores,
                      float* top, float* sum, float* out, Record record) {
    long i = 0;
    for (; i + kTwinRows <= tile.last; i += kTwinRows) fold_some<kTwinRows>(rows, l, tile, i, query, begin, scores, top, sum, out, record);
    switch (tile.last - i) {
        case 3: return fold_some<3>(rows, l, tile, i, query, begin, scores, top, sum, out, record);
        case 2: return fold_some<2>(rows, l, tile, i, query, begin, scores, top, sum, out, record);
        case 1: return fold_some<1>(rows, l, tile, i, query, begin, scores, top, sum, out, record);
    }
}
#endif

// Runs work(Number{}) for the numbers in which a layer's rows are met.
template <typename Work>
SATEEN_INLINE void in_numbers_of([[maybe_unused]] const DecodeLayer& l, Work work) {
#ifdef __AVX512BF16__
    if (l.cache.format == Format::bf16 && l.H % kTwin == 0 && l.V % kTwin == 0) return work(bits16{});
#endif
    work(float{});
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
