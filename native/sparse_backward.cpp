// Attention over listed key blocks, backward: probabilities recomputed from the log-sum-exp.
//
// A task is one key/value head of one sequence and a range of its queries. It owns those queries' d_q; d_k and d_v go
// straight to the output when the range is the whole sequence, else to a buffer of the task that is added up at the end,
// in order. So nothing is atomic, and results depend on the number of threads only through the ranges.

#include "sparse_lists.h"

namespace sateen::SATEEN_ISA {
namespace {

thread_local Scratch scratch;
thread_local Ints ints;

// Gradients of the keys and values of one head of one sequence, rows of whole vectors or of the output.
struct KeyGradients {
    float *k, *v;
    long k_stride, v_stride;
};

struct Task {
    long sequence, head, first, last;
    long offset;  // of its gradients in the buffer; -1: it writes the output
};

// What the rows of some queries need for every block, and their d_q.
struct GradientRows {
    float *q, *g, *d_q, *lse, *delta;  // [rows, wide H] times scale * log2(e), [rows, wide V], [rows, wide H], [rows], [rows]

    static long size(long rows, long H, long V) { return round_up(rows, W) * (2 * round_up(H, W) + round_up(V, W) + 2); }

    GradientRows(float* data, long rows, long H, long V) {
        const long all = round_up(rows, W);
        q = data, d_q = q + all * round_up(H, W), g = d_q + all * round_up(H, W), lse = g + all * round_up(V, W);
        delta = lse + all;
    }

    void begin(const SparseBackward& p, long head, long first_token, long rows, double* d_sink) {
        const long group = p.N / p.K, wide_h = round_up(p.H, W), wide_v = round_up(p.V, W);
        memset(d_q, 0, rows * wide_h * sizeof(float));
        for (long r = 0; r < rows; ++r) {
            const long t = first_token + r / group, local = r % group, n = head * group + local;
            copy_row(p.q, t, n, p.H, q + r * wide_h, wide_h);
            for (long c = 0; c < wide_h; c += W) store(q + r * wide_h + c, load(q + r * wide_h + c) * (p.scale * kLog2e));
            copy_row(p.d_out, t, n, p.V, g + r * wide_v, wide_v);
            const float* const out = p.out + (t * p.N + n) * p.V;
            vfloat dot{};
            for (long c = 0; c < p.V; c += W)
                dot += load(g + r * wide_v + c) * (p.V - c < W ? load_some(out + c, p.V - c) : load(out + c));
            delta[r] = sum_lanes(dot);
            float total = p.lse[n * p.T + t];
            if (p.sink) {
                const float sink = p.sink[n], top = sink > total ? sink : total;
                if (top != -kInf) {  // else nothing is visible and the row has no gradient
                    const float both = top == kInf ? top : top + logf(expf(total - top) + expf(sink - top));
                    d_sink[local] -= double(sink == kInf ? 1.0f : expf(sink - both)) * delta[r];
                    total = both;
                }
            }
            lse[r] = total == -kInf ? 0.0f : total * kLog2e;
        }
    }
};

struct Memory {
    PackedKeys keys;
    float *q, *g, *scores, *d_scores, *d_q, *d_k, *d_v;
    int limit[kTileQueries];
    long row[kTileQueries];

    static long size(long H, long V) {
        const long wide_h = round_up(H, W), wide_v = round_up(V, W);
        return PackedKeys::size(H, V) + kTileQueries * (2 * wide_h + wide_v + 2 * kTileKeys) + kTileKeys * (wide_h + wide_v);
    }

    Memory(float* at, long H, long V) : keys(at, H, V) {
        const long wide_h = round_up(H, W), wide_v = round_up(V, W);
        q = at + PackedKeys::size(H, V), g = q + kTileQueries * wide_h, scores = g + kTileQueries * wide_v;
        d_scores = scores + kTileQueries * kTileKeys, d_q = d_scores + kTileQueries * kTileKeys;
        d_k = d_q + kTileQueries * wide_h, d_v = d_k + kTileKeys * wide_h;
    }

    void clear(long H, long V) {
        memset(d_k, 0, keys.count * round_up(H, W) * sizeof(float));
        memset(d_v, 0, keys.count * round_up(V, W) * sizeof(float));
    }

    // One tile of rows against the packed keys.
    void step(const SparseBackward& p, const GradientRows& rows, long used) {
        const long wide_h = round_up(p.H, W), wide_v = round_up(p.V, W), count = keys.count, wide = round_up(count, W);
        for (long i = 0; i < used; ++i) {
            memcpy(q + i * wide_h, rows.q + row[i] * wide_h, wide_h * sizeof(float));
            memcpy(g + i * wide_v, rows.g + row[i] * wide_v, wide_v * sizeof(float));
        }
        tile_scores(keys, q, wide_h, used, p.H, scores);
        hide(scores, limit, used, count);
        multiply<false, Into::zero>({g, wide_v, keys.v_t, kTileKeys, d_scores, kTileKeys}, used, wide, p.V);
        for (long i = 0; i < used; ++i) {
            const vfloat lse = splat(rows.lse[row[i]]), delta = splat(rows.delta[row[i]]);
            for (long s = 0; s < wide; s += W) {
                float *const x = scores + i * kTileKeys + s, *const d = d_scores + i * kTileKeys + s;
                const vfloat prob = exp2_fast(load(x) - lse);
                store(x, prob);
                store(d, prob * (load(d) - delta) * kLn2);
            }
        }
        multiply<true, Into::add>({scores, kTileKeys, g, wide_v, d_v, wide_v}, count, wide_v, used);
        multiply<true, Into::add>({d_scores, kTileKeys, q, wide_h, d_k, wide_h}, count, wide_h, used);
        multiply<false, Into::zero>({d_scores, kTileKeys, keys.k, wide_h, d_q, wide_h}, used, wide_h, count);
        for (long i = 0; i < used; ++i) {
            float* const to = rows.d_q + row[i] * wide_h;
            for (long c = 0; c < wide_h; c += W) store(to + c, load(to + c) + load(d_q + i * wide_h + c));
        }
    }

    template <typename KeyAt>
    void add_keys(const SparseBackward& p, KeyAt key, const KeyGradients& to) const {
        const long wide_h = round_up(p.H, W), wide_v = round_up(p.V, W);
        for (long i = 0; i < keys.count; ++i) {
            for (long c = 0; c < p.H; ++c) to.k[key(i) * to.k_stride + c] += d_k[i * wide_h + c];
            for (long c = 0; c < p.V; ++c) to.v[key(i) * to.v_stride + c] += d_v[i * wide_v + c];
        }
    }
};

void run_chunk(const SparseBackward& p, const Place& s, long head, long first, long last, const KeyGradients& to,
               double* d_sink) {
    const long group = p.N / p.K, num_rows = (last - first) * group, wide_h = round_up(p.H, W);
    float* const data = scratch.take(Memory::size(p.H, p.V) + GradientRows::size(num_rows, p.H, p.V));
    Memory memory(data, p.H, p.V);
    GradientRows rows(data + Memory::size(p.H, p.V), num_rows, p.H, p.V);
    rows.begin(p, head, s.q0 + first, num_rows, d_sink);
    if (by_blocks(p, s, last - first)) {
        visit_blocks(p, s, head, first, last, ints.take(visit_memory(p, s, last - first)),
                     [&](long key, long count, const int* queries, long num_queries) {
            memory.keys.pack(p, head, [&](long i) { return s.k0 + key + i; }, count, true);
            memory.clear(p.H, p.V);
            const long all = num_queries * group;
            for (long r = 0; r < all; r += kTileQueries) {
                const long used = all - r < kTileQueries ? all - r : kTileQueries;
                for (long i = 0; i < used; ++i) {
                    const long t = queries[(r + i) / group], seen = s.position(t) - key + 1;
                    memory.row[i] = (t - first) * group + (r + i) % group;
                    memory.limit[i] = int(seen < count ? seen : count);
                }
                memory.step(p, rows, used);
            }
            memory.add_keys(p, [&](long i) { return key + i; }, to);
        });
    } else {
        int* const keys = ints.take(p.listed * p.block_size);
        for (long t = first; t < last; ++t) {
            const long all = keys_of_query(p, s, head, t, keys);
            for (long at = 0; at < all; at += kTileKeys) {
                const long count = all - at < kTileKeys ? all - at : kTileKeys;
                memory.keys.pack(p, head, [&](long i) { return s.k0 + keys[at + i]; }, count, true);
                memory.clear(p.H, p.V);
                for (long r = 0; r < group; r += kTileQueries) {
                    const long used = group - r < kTileQueries ? group - r : kTileQueries;
                    for (long i = 0; i < used; ++i)
                        memory.row[i] = (t - first) * group + r + i, memory.limit[i] = int(count);
                    memory.step(p, rows, used);
                }
                memory.add_keys(p, [&](long i) { return long(keys[at + i]); }, to);
            }
        }
    }
    for (long r = 0; r < num_rows; ++r) {
        float* const target = p.d_q + ((s.q0 + first + r / group) * p.N + head * group + r % group) * p.H;
        for (long c = 0; c < p.H; ++c) target[c] = rows.d_q[r * wide_h + c] * (p.scale * kLog2e);
    }
}

void run_task(const SparseBackward& p, const Task& task, float* buffer, double* d_sink) {
    const Place s(p, task.sequence);
    KeyGradients to{p.d_k + (s.k0 * p.K + task.head) * p.H, p.d_v + (s.k0 * p.K + task.head) * p.V, p.K * p.H, p.K * p.V};
    if (task.offset >= 0) to = {buffer + task.offset, buffer + task.offset + s.num_keys * p.H, p.H, p.V};
    for (long key = 0; key < s.num_keys; ++key) {
        memset(to.k + key * to.k_stride, 0, p.H * sizeof(float));
        memset(to.v + key * to.v_stride, 0, p.V * sizeof(float));
    }
    const long size = chunk_queries(p);
    for (long t = task.first; t < task.last; t += size)
        run_chunk(p, s, task.head, t, t + size < task.last ? t + size : task.last, to, d_sink);
}

// Adds the parts of one sequence and head to the output, in order.
void add_parts(const SparseBackward& p, const Task* tasks, long parts, const float* buffer) {
    if (tasks[0].offset < 0) return;
    const Place s(p, tasks[0].sequence);
    for (long key = 0; key < s.num_keys; ++key) {
        float* const d_k = p.d_k + ((s.k0 + key) * p.K + tasks[0].head) * p.H;
        float* const d_v = p.d_v + ((s.k0 + key) * p.K + tasks[0].head) * p.V;
        for (long c = 0; c < p.H; ++c) d_k[c] = 0.0f;
        for (long c = 0; c < p.V; ++c) d_v[c] = 0.0f;
        for (long i = 0; i < parts; ++i) {
            const float* const k = buffer + tasks[i].offset + key * p.H;
            const float* const v = buffer + tasks[i].offset + s.num_keys * p.H + key * p.V;
            for (long c = 0; c < p.H; ++c) d_k[c] += k[c];
            for (long c = 0; c < p.V; ++c) d_v[c] += v[c];
        }
    }
}

}  // namespace

void sparse_backward(const SparseBackward& p) {
    const long group = p.N / p.K, pairs = p.num_sequences * p.K;
    // Two parts per thread over the whole batch even out; a sequence gets its share of them.
    Task* const tasks = static_cast<Task*>(malloc((pairs * (2 * p.num_threads + 1) + 1) * sizeof(Task)));
    long* const starts = static_cast<long*>(malloc((pairs + 1) * sizeof(long)));
    long num_tasks = 0, buffer_size = 0;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Place s(p, i);
        long parts = p.num_threads > 1 && p.T ? divide_up(2 * p.num_threads * s.num_queries, p.T * p.K) : 1;
        if (parts > divide_up(s.num_queries, 64)) parts = divide_up(s.num_queries, 64);
        if (parts < 1) parts = 1;
        for (long head = 0; head < p.K; ++head) {
            starts[i * p.K + head] = num_tasks;
            for (long j = 0; j < parts; ++j) {
                tasks[num_tasks++] = {i, head, s.num_queries * j / parts, s.num_queries * (j + 1) / parts,
                                      parts == 1 ? -1 : buffer_size};
                if (parts > 1) buffer_size += s.num_keys * (p.H + p.V);
            }
        }
    }
    starts[pairs] = num_tasks;
    float* const buffer = static_cast<float*>(malloc((buffer_size + 1) * sizeof(float)));
    double* const d_sink = static_cast<double*>(calloc(num_tasks * group + 1, sizeof(double)));
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < num_tasks; ++i) run_task(p, tasks[i], buffer, d_sink + i * group);
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < pairs; ++i) add_parts(p, tasks + starts[i], starts[i + 1] - starts[i], buffer);
    if (p.d_sink)
        for (long n = 0; n < p.N; ++n) {
            double sum = 0;
            for (long i = 0; i < num_tasks; ++i)
                if (tasks[i].head == n / group) sum += d_sink[i * group + n % group];
            p.d_sink[n] = float(sum);
        }
    free(d_sink);
    free(buffer);
    free(starts);
    free(tasks);
}

}  // namespace sateen::SATEEN_ISA
