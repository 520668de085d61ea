// A tile of attention: up to kTileQueries query rows, which may belong to different queries, against up to kTileKeys keys
// that they all may see. Keys are packed once, transposed for the scores, and serve every tile of rows.
#pragma once

#include "attention_rows.h"
#include "gemm.h"
#include "numbers.h"
#include "sparse_attention.h"

#include <math.h>
#include <string.h>

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kTileQueries = 64;  // rows of a tile: query heads of one or several queries
constexpr long kTileKeys = 64;

struct Place {
    long q0, k0, num_queries, num_keys;

    Place(const NumbersShape& p, long i)
        : q0(p.cu_q[i]), k0(p.cu_k[i]), num_queries(p.cu_q[i + 1] - q0), num_keys(p.cu_k[i + 1] - k0) {}

    // Position among the keys of query t: the last query stands at the last key. May be negative.
    long position(long t) const { return t + num_keys - num_queries; }
};

inline const void* at(const NumberRows& x, long token, long head) {
    return offset(x.data, x.format, token * x.token_stride + head * x.head_stride);
}

// One row as floats, padded with zeros to `wide` numbers.
inline void copy_row(const NumberRows& x, long token, long head, long channels, float* to, long wide) {
    const void* const from = at(x, token, head);
    if (x.format == Format::f32) {
        const float* const numbers = static_cast<const float*>(from);
        for (long c = 0; c < wide; c += W) store(to + c, c + W <= channels ? load(numbers + c) : load_some(numbers + c, channels - c));
        return;
    }
    widen(x.format, from, channels, to);
    for (long c = channels; c < wide; ++c) to[c] = 0.0f;
}

// Asks for the rows of keys that will be packed next: with few query rows the arithmetic alone would not hide memory.
template <typename TokenAt>
inline void prefetch_keys(const NumbersShape& p, long head, TokenAt token, long keys) {
    const long k_bytes = p.H * number_bytes(p.k.format), v_bytes = p.V * number_bytes(p.v.format);
    for (long i = 0; i < keys; ++i) {
        const char *const k = static_cast<const char*>(at(p.k, token(i), head)), *const v = static_cast<const char*>(at(p.v, token(i), head));
        for (long c = 0; c < k_bytes; c += 64) __builtin_prefetch(k + c);
        for (long c = 0; c < v_bytes; c += 64) __builtin_prefetch(v + c);
    }
}

// Lane i is the largest lane of vector i.
template <int D>
SATEEN_INLINE void halve_largest(vfloat (&rows)[W]) {
#pragma GCC unroll 8
    for (int i = 0; i < D; ++i) {
        exchange<D>(rows[i], rows[i + D], std::make_integer_sequence<int, W>{});
        rows[i] = maximum(rows[i], rows[i + D]);
    }
}

SATEEN_INLINE vfloat largest_each(vfloat (&rows)[W]) {
    if constexpr (W > 8) halve_largest<8>(rows);
    if constexpr (W > 4) halve_largest<4>(rows);
    halve_largest<2>(rows);
    halve_largest<1>(rows);
    return rows[0];
}

SATEEN_INLINE vint lanes_from(long first) {
    vint lane;
    for (int i = 0; i < W; ++i) lane[i] = i;
    return lane + splat_int(int(first));
}

// Keys of one head, packed: `k_t` [H, kTileKeys] and `v` [kTileKeys, wide V] for the forward pass; the backward pass
// also wants `k` [kTileKeys, wide H] and `v_t` [V, kTileKeys].
struct PackedKeys {
    float *k_t, *v, *k, *v_t;
    const float* values;  // `v`, or where the values lie in the tensor
    long count, value_stride;

    static long size(long H, long V) { return kTileKeys * (H + V + round_up(H, W) + round_up(V, W)); }

    PackedKeys(float* at, long H, long V)
        : k_t(at), v(k_t + kTileKeys * H), k(v + kTileKeys * round_up(V, W)), v_t(k + kTileKeys * round_up(H, W)), values(v), count(0),
          value_stride(round_up(V, W)) {}

    // Values of consecutive keys from `token` on are read where they lie: so few query rows that a copy costs more.
    bool point_at_values(const NumbersShape& p, long head, long token) {
        if (p.v.format != Format::f32 || p.V % W) return false;
        values = static_cast<const float*>(at(p.v, token, head)), value_stride = p.v.token_stride;
        return true;
    }

    // `token(i)` is the row of the i-th key in the packed tensors.
    template <typename TokenAt>
    void pack(const NumbersShape& p, long head, TokenAt token, long keys, bool both, bool has_values = false) {
        count = keys;
        const long wide_h = round_up(p.H, W), wide_v = round_up(p.V, W);
        for (long i = 0; i < keys && !has_values; ++i) copy_row(p.v, token(i), head, p.V, v + i * wide_v, wide_v);
        if (p.k.format == Format::f32 && !both) {
            const auto where = [&](long i) { return static_cast<const float*>(at(p.k, token(i), head)); };
            return pack_transposed(where, p.H, 1.0f, k_t, kTileKeys, keys);
        }
        for (long i = 0; i < keys; ++i) copy_row(p.k, token(i), head, p.H, k + i * wide_h, wide_h);
        pack_transposed([&](long i) -> const float* { return k + i * wide_h; }, p.H, 1.0f, k_t, kTileKeys, keys);
        if (both) pack_transposed([&](long i) -> const float* { return v + i * wide_v; }, p.V, 1.0f, v_t, kTileKeys, keys);
    }
};

// scores [rows, kTileKeys] of rows `q` [rows, wide H].
inline void tile_scores(const PackedKeys& keys, const float* q, long wide_h, long rows, long H, float* scores) {
    multiply<false, Into::zero>({q, wide_h, keys.k_t, kTileKeys, scores, kTileKeys}, rows, round_up(keys.count, W), H);
}

// -inf for the keys from limit[row] on.
inline void hide(float* scores, const int* limit, long rows, long count) {
    for (long r = 0; r < rows; ++r)
        for (long s = 0; s < count; s += W)
            if (limit[r] < s + W) {
                float* const to = scores + r * kTileKeys + s;
                store(to, lanes_from(s) < splat_int(limit[r]) ? load(to) : splat(-kInf));
            }
}

// Scores become e^(score - top) in place; `shrink` is what earlier sums of a row must be multiplied by. All arrays have
// room for whole vectors of rows.
inline void online_softmax(float* scores, long rows, long count, float* top, float* sum, float* shrink) {
    for (long r = 0; r < rows; r += W) {
        const int used = rows - r < W ? int(rows - r) : W;
        vfloat best[W], total[W];
        for (int i = 0; i < W; ++i) best[i] = splat(-kInf), total[i] = vfloat{};
        for (int i = 0; i < used; ++i)
            for (long s = 0; s < count; s += W) best[i] = maximum(load(scores + (r + i) * kTileKeys + s), best[i]);
        const vfloat before = load(top + r), now = maximum(largest_each(best), before);
        // A row that has seen nothing yet subtracts zero: its scores are all -inf and stay 0 after the exponential.
        const vfloat base = now == splat(-kInf) ? vfloat{} : now;
        const vfloat factor = exp2_fast((before - base) * kLog2e);
        for (int i = 0; i < used; ++i)
            for (long s = 0; s < count; s += W) {
                float* const x = scores + (r + i) * kTileKeys + s;
                const vfloat weight = exp2_fast((load(x) - splat(base[i])) * kLog2e);
                total[i] += weight;
                store(x, weight);
            }
        store(top + r, now);
        store(sum + r, load(sum + r) * factor + sum_each(total));
        store(shrink + r, factor);
    }
}

// What the rows of some queries carry from one tile to the next. A row is query row / group, head row % group.
struct RowStates {
    float *q, *top, *sum, *out;  // [rows, wide H] times scale, [rows], [rows], [rows, wide V]
    long wide_h, wide_v;

    static long size(long rows, long H, long V) {
        return round_up(rows, W) * (round_up(H, W) + round_up(V, W) + 2);
    }

    RowStates(float* data, long rows, long H, long V) : wide_h(round_up(H, W)), wide_v(round_up(V, W)) {
        const long all = round_up(rows, W);
        q = data, out = q + all * wide_h, top = out + all * wide_v, sum = top + all;
    }

    void begin(const NumbersShape& p, long head, long first_token, long rows) {
        const long group = p.N / p.K;
        for (long r = 0; r < rows; ++r) {
            float* const to = q + r * wide_h;
            copy_row(p.q, first_token + r / group, head * group + r % group, p.H, to, wide_h);
            for (long c = 0; c < wide_h; c += W) store(to + c, load(to + c) * p.scale);
        }
        for (long r = 0; r < round_up(rows, W); ++r) top[r] = -kInf, sum[r] = 0.0f;
        memset(out, 0, rows * wide_v * sizeof(float));
    }

    void merge(const RowStates& part, long rows) {
        for (long r = 0; r < rows; ++r) {
            const float now = part.top[r] > top[r] ? part.top[r] : top[r], base = now == -kInf ? 0.0f : now;
            const float keep = exp2_fast(splat((top[r] - base) * kLog2e))[0];
            const float take = exp2_fast(splat((part.top[r] - base) * kLog2e))[0];
            top[r] = now, sum[r] = sum[r] * keep + part.sum[r] * take;
            for (long c = 0; c < wide_v; c += W)
                store(out + r * wide_v + c, load(out + r * wide_v + c) * keep + load(part.out + r * wide_v + c) * take);
        }
    }

    // Divides by the row sums, applies the sinks and writes the rows of `to` [T, N, V] and `lse` [N, T].
    void finish(const NumbersShape& p, long head, long first_token, long rows, float* to, float* lse) const {
        const long group = p.N / p.K;
        for (long r = 0; r < rows; ++r) {
            const long t = first_token + r / group, n = head * group + r % group;
            const float log_sum = sum[r] == 0.0f ? -kInf : top[r] + logf(sum[r]);
            lse[n * p.T + t] = log_sum;
            float factor = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
            if (p.sink && factor != 0.0f) factor /= 1.0f + expf(p.sink[n] - log_sum);
            float* const target = to + (t * p.N + n) * p.V;
            for (long c = 0; c < p.V; ++c) target[c] = out[r * wide_v + c] * factor;
        }
    }
};

// Scratch of one tile.
struct TileMemory {
    float *q, *scores, *out, *top, *sum, *shrink;
    int limit[kTileQueries];
    long row[kTileQueries];  // of the states

    static long size(long H, long V) { return kTileQueries * (round_up(H, W) + kTileKeys + round_up(V, W) + 3); }

    TileMemory(float* at, long H, long V) {
        q = at, scores = q + kTileQueries * round_up(H, W), out = scores + kTileQueries * kTileKeys;
        top = out + kTileQueries * round_up(V, W), sum = top + kTileQueries, shrink = sum + kTileQueries;
    }

    // Copies the rows' queries and what they carry.
    void gather(const RowStates& states, long rows) {
        for (long i = 0; i < rows; ++i) {
            const float* const from = states.q + row[i] * states.wide_h;
            for (long c = 0; c < states.wide_h; c += W) store(q + i * states.wide_h + c, load(from + c));
            top[i] = states.top[row[i]], sum[i] = states.sum[row[i]];
        }
        for (long i = rows; i < round_up(rows, W); ++i) top[i] = -kInf, sum[i] = 0.0f;
    }

    // From scores to the rows' states.
    void fold(const PackedKeys& keys, const RowStates& states, long rows) {
        online_softmax(scores, rows, round_up(keys.count, W), top, sum, shrink);
        multiply<false, Into::zero>({scores, kTileKeys, keys.values, keys.value_stride, out, states.wide_v}, rows, states.wide_v,
                                    keys.count);
        for (long i = 0; i < rows; ++i) {
            float* const to = states.out + row[i] * states.wide_v;
            const float* const from = out + i * states.wide_v;
            for (long c = 0; c < states.wide_v; c += W) store(to + c, load(to + c) * shrink[i] + load(from + c));
            states.top[row[i]] = top[i], states.sum[row[i]] = sum[i];
        }
    }
};

}  // namespace
}  // namespace sateen::SATEEN_ISA
