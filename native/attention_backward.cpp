// Attention, backward: probabilities recomputed from the log-sum-exp (Dao 2023, arXiv 2307.08691, algorithm 2).
//
// A task is one key/value head of one sequence and a chunk of its query rows. It owns those rows' d_q; d_k and d_v
// go straight to the output when the chunk is the whole sequence, else to a buffer of the task that is added up at
// the end, in order. So nothing is atomic, and results depend on the number of threads only through the chunks.

#include "attention_chunks.h"
#include "attention_rows.h"
#include "gemm.h"

#include <math.h>
#include <string.h>

namespace sateen::SATEEN_ISA {
namespace {

// What a tile needs for every block of keys. Lanes run along rows: q_t and g_t are [channels, lanes], the rest by rows.
struct TileData {
    float *q_t, *g_t, *q, *g, *d_q, *lse, *delta;

    static long size(long H, long V, long lanes) {
        return lanes * (H + V + 2 * round_up(H, W) + round_up(V, W) + 2);
    }

    TileData(float* at, long H, long V, long lanes) {
        const long wide_h = round_up(H, W), wide_v = round_up(V, W);
        q = at, d_q = q + lanes * wide_h, g = d_q + lanes * wide_h, lse = g + lanes * wide_v;
        delta = lse + lanes, q_t = delta + lanes, g_t = q_t + lanes * H;
    }
};

// Rows of the gradient of the keys or values of one head: [num_keys, channels] from key `first` on.
struct KeyRows {
    float* data;
    long stride, first;

    float* at(long key) const { return data + (key - first) * stride; }
};

void fill_tile(const AttentionBackward& p, const Plan& plan, const Sequence& s, const Tile& tile, const TileData& data,
               long head, double* d_sink) {
    const long group = p.N / p.K, used = tile.last - tile.first, wide_h = round_up(p.H, W), wide_v = round_up(p.V, W);
    memset(data.q, 0, sizeof(float) * plan.lanes * (2 * wide_h + wide_v + 2));
    for (long i = 0; i < used; ++i) {
        const long row = tile.first + i, local = row % group, n = head * group + local, t = s.q0 + row / group;
        memcpy(data.q + i * wide_h, p.q.at(t, n), p.H * sizeof(float));
        memcpy(data.g + i * wide_v, p.d_out.at(t, n), p.V * sizeof(float));
        const float* out = p.out + (t * p.N + n) * p.V;
        vfloat dot{};
        for (long c = 0; c < p.V; c += W)
            dot += load(data.g + i * wide_v + c) * (p.V - c < W ? load_some(out + c, p.V - c) : load(out + c));
        data.delta[i] = sum_lanes(dot);
        float lse = p.lse[n * p.T + t];
        if (p.sink) {
            const float sink = p.sink[n], top = sink > lse ? sink : lse;
            if (top == -kInf) continue;  // nothing visible and no sink: the row has no gradient
            const float total = top == kInf ? top : top + logf(expf(lse - top) + expf(sink - top));
            const float taken = sink == kInf ? 1.0f : expf(sink - total);
            d_sink[local] -= double(taken) * data.delta[i];
            lse = total;
        }
        data.lse[i] = lse == -kInf ? 0.0f : lse * kLog2e;
    }
    const auto query = [&](long i) { return data.q + i * wide_h; };
    const auto gradient = [&](long i) { return data.g + i * wide_v; };
    pack_transposed(query, p.H, p.scale * kLog2e, data.q_t, plan.lanes, used);
    pack_transposed(gradient, p.V, 1.0f, data.g_t, plan.lanes, used);
}

// From scores and d_probs, both [keys, lanes], to probabilities and d_scores, in place.
template <bool MASKED>
inline void softmax_gradient(const Tile& tile, const TileData& data, float* probs, float* d_scores, float scale, long key,
                             long keys, long used, long lanes) {
    for (long i = 0; i < used; i += W) {
        const vfloat lse = load(data.lse + i), delta = load(data.delta + i);
        for (long s = 0; s < keys; ++s) {
            float* const at = probs + s * lanes + i;
            float* const d_at = d_scores + s * lanes + i;
            vfloat x = exp2_fast(load(at) - lse);
            vfloat d = x * (load(d_at) - delta) * scale;
            if constexpr (MASKED) {
                const vint seen = visible(tile, i, key + s);
                x = seen ? x : vfloat{};
                d = seen ? d : vfloat{};
            }
            store(at, x);
            store(d_at, d);
        }
    }
}

void step(const AttentionBackward& p, const Plan& plan, const Tile& tile, const TileData& data, const Rows& k, long k0,
          long head, long begin, long end, const KeyRows& d_k, const KeyRows& d_v, float* probs, float* d_scores) {
    const long keys = end - begin, used = tile.last - tile.first, wide = round_up(used, W), lanes = plan.lanes;
    const long wide_h = round_up(p.H, W), wide_v = round_up(p.V, W);
    const float* const key_rows = k.at(begin, 0);
    multiply<false, Into::zero>({key_rows, k.token_stride, data.q_t, lanes, probs, lanes}, keys, wide, p.H);
    multiply<false, Into::zero>({p.v.at(k0 + begin, head), p.v.token_stride, data.g_t, lanes, d_scores, lanes}, keys, wide,
                                p.V);
    if (tile.masked(begin, end))
        softmax_gradient<true>(tile, data, probs, d_scores, p.scale, begin, keys, used, lanes);
    else
        softmax_gradient<false>(tile, data, probs, d_scores, p.scale, begin, keys, used, lanes);
    multiply<false, Into::add>({probs, lanes, data.g, wide_v, d_v.at(begin), d_v.stride}, keys, wide_v, used);
    multiply<false, Into::add>({d_scores, lanes, data.q, wide_h, d_k.at(begin), d_k.stride}, keys, wide_h, used);
    multiply<true, Into::add>({d_scores, lanes, key_rows, k.token_stride, data.d_q, wide_h}, used, wide_h, keys);
}

thread_local Scratch scratch;

void zero_rows(const KeyRows& rows, long from, long to, long channels) {
    for (long key = from; key < to; ++key) memset(rows.at(key), 0, channels * sizeof(float));
}

void run_task(const AttentionBackward& p, const Plan& plan, const Task& task, KeyRows d_k, KeyRows d_v, double* d_sink) {
    const Sequence s(p, task.sequence);
    const long group = p.N / p.K, end_row = s.num_queries * group, lanes = plan.lanes;
    const long wide_h = round_up(p.H, W), tile_size = TileData::size(p.H, p.V, lanes);
    const bool padded = p.H % W != 0;  // then keys are copied into rows of whole vectors
    float* const probs = scratch.take(kTiles * tile_size + 2 * kKeys * lanes + kKeys * wide_h);
    float *const d_scores = probs + kKeys * lanes, *const copy = d_scores + kKeys * lanes, *const data_at = copy + kKeys * wide_h;
    Tile tiles[kTiles];
    for (long j = task.first; j < task.last; ++j) {
        long count = 0, low = s.num_keys, high = 0;
        for (long row = j * plan.rows_per_group(); row < end_row && count < kTiles; row += lanes, ++count) {
            Tile& tile = tiles[count];
            tile.place(p, s, row, least(row + lanes, end_row), lanes);
            fill_tile(p, plan, s, tile, TileData(data_at + count * tile_size, p.H, p.V, lanes), task.head, d_sink);
            low = least(low, tile.low);
            if (tile.high > high) high = tile.high;
        }
        for (long key = low; key < high; key += kKeys) {
            const long stop = least(key + kKeys, high);
            Rows k{p.k.at(s.k0, task.head), p.k.token_stride, 0};
            if (padded) {
                memset(copy, 0, kKeys * wide_h * sizeof(float));
                for (long i = key; i < stop; ++i) memcpy(copy + (i - key) * wide_h, k.at(i, 0), p.H * sizeof(float));
                k = {copy - key * wide_h, wide_h, 0};
            }
            for (long i = 0; i < count; ++i) {
                const long begin = key > tiles[i].low ? key : tiles[i].low, end = least(stop, tiles[i].high);
                const TileData data(data_at + i * tile_size, p.H, p.V, lanes);
                if (begin < end)
                    step(p, plan, tiles[i], data, k, s.k0, task.head, begin, end, d_k, d_v, probs, d_scores);
            }
        }
        for (long i = 0; i < count; ++i) {
            const TileData data(data_at + i * tile_size, p.H, p.V, lanes);
            for (long row = tiles[i].first; row < tiles[i].last; ++row) {
                const long n = task.head * group + row % group, t = s.q0 + row / group;
                memcpy(p.d_q + (t * p.N + n) * p.H, data.d_q + (row - tiles[i].first) * wide_h, p.H * sizeof(float));
            }
        }
    }
}

// Where a task adds up d_k and d_v: rows of the output, or its part of the buffer.
void key_targets(const AttentionBackward& p, const Task& task, float* buffer, KeyRows& d_k, KeyRows& d_v) {
    const long k0 = p.cu_k[task.sequence], wide_h = round_up(p.H, W), wide_v = round_up(p.V, W);
    if (task.direct) {
        d_k = {p.d_k + (k0 * p.K + task.head) * p.H, p.K * p.H, 0};
        d_v = {p.d_v + (k0 * p.K + task.head) * p.V, p.K * p.V, 0};
    } else {
        d_k = {buffer + task.offset, wide_h, task.low};
        d_v = {buffer + task.offset + (task.high - task.low) * wide_h, wide_v, task.low};
    }
}

void run_and_clear(const AttentionBackward& p, const Plan& plan, const Task& task, float* buffer, double* d_sink) {
    KeyRows d_k, d_v;
    key_targets(p, task, buffer, d_k, d_v);
    const long from = task.direct ? 0 : task.low, to = task.direct ? Sequence(p, task.sequence).num_keys : task.high;
    zero_rows(d_k, from, to, round_up(p.H, W));
    zero_rows(d_v, from, to, round_up(p.V, W));
    run_task(p, plan, task, d_k, d_v, d_sink);
}

// Adds the chunks of one sequence and head to the output.
void add_chunks(const AttentionBackward& p, const Plan& plan, long sequence, long head, float* buffer) {
    const long chunks = (plan.first_task[sequence + 1] - plan.first_task[sequence]) / p.K;
    const Task* const tasks = plan.tasks + plan.first_task[sequence] + head * chunks;
    if (tasks[0].direct) return;
    const Sequence s(p, sequence);
    const KeyRows to_k{p.d_k + (s.k0 * p.K + head) * p.H, p.K * p.H, 0};
    const KeyRows to_v{p.d_v + (s.k0 * p.K + head) * p.V, p.K * p.V, 0};
    zero_rows(to_k, 0, s.num_keys, p.H);
    zero_rows(to_v, 0, s.num_keys, p.V);
    for (long j = 0; j < chunks; ++j) {
        KeyRows d_k, d_v;
        key_targets(p, tasks[j], buffer, d_k, d_v);
        for (long key = tasks[j].low; key < tasks[j].high; ++key) {
            for (long c = 0; c < p.H; ++c) to_k.at(key)[c] += d_k.at(key)[c];
            for (long c = 0; c < p.V; ++c) to_v.at(key)[c] += d_v.at(key)[c];
        }
    }
}

}  // namespace

void attention_backward(const AttentionBackward& p) {
    const Plan plan = make_plan(p);
    const long group = p.N / p.K;
    float* const buffer = static_cast<float*>(malloc((plan.buffer_size + 1) * sizeof(float)));
    double* const d_sink = static_cast<double*>(calloc(plan.num_tasks * group + 1, sizeof(double)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < plan.num_tasks; ++i) run_and_clear(p, plan, plan.tasks[i], buffer, d_sink + i * group);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < p.num_sequences * p.K; ++i) add_chunks(p, plan, i / p.K, i % p.K, buffer);
    if (p.d_sink)
        for (long n = 0; n < p.N; ++n) {
            double sum = 0;
            for (long i = 0; i < plan.num_tasks; ++i)
                if (plan.tasks[i].head == n / group) sum += d_sink[i * group + n % group];
            p.d_sink[n] = float(sum);
        }
    free(d_sink);
    free(buffer);
    free(plan.tasks);
    free(plan.first_task);
}

}  // namespace sateen::SATEEN_ISA
