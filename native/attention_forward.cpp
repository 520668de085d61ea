// Attention, forward: blocks of keys with an online softmax (Dao 2023, arXiv 2307.08691, algorithm 1).
//
// A task is one key/value head of one sequence and up to kTiles tiles of query rows. Where there are fewer tasks
// than threads could use (decoding), the keys are split too and the parts are merged afterwards.

#include "attention_decode.h"
#include "attention_rows.h"
#include "gemm.h"
#include "numbers.h"

#include <math.h>
#include <string.h>

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kLanes = 32;
constexpr long kRows = kLanes * kTiles;

// What the online softmax carries from one block of keys to the next, for one tile.
struct State {
    float *top, *sum, *out;  // [kLanes] maximum score, [kLanes] sum of 2^(score - top), [V, kLanes] values

    static long size(long V) { return (V + 2) * kLanes; }

    State(float* at) : top(at), sum(at + kLanes), out(at + 2 * kLanes) {}

    void clear(long V) {
        for (long i = 0; i < kLanes; ++i) top[i] = -kInf, sum[i] = 0.0f;
        for (long i = 0; i < V * kLanes; ++i) out[i] = 0.0f;
    }
};

// Scores [keys, kLanes] become 2^(score - top) in place; `factor` is what earlier sums must be multiplied by.
template <bool MASKED>
inline void online_softmax(const Tile& tile, State& state, float* scores, long key, long keys, long lanes, float* factor) {
    for (long i = 0; i < lanes; i += W) {
        const vfloat before = load(state.top + i);
        vfloat top = before;
        for (long s = 0; s < keys; ++s) {
            vfloat x = load(scores + s * kLanes + i);
            if constexpr (MASKED) {
                x = visible(tile, i, key + s) ? x : splat(-kInf);
                store(scores + s * kLanes + i, x);
            }
            top = maximum(x, top);
        }
        // A row that has seen nothing yet subtracts zero: its scores are all -inf and stay 0 after the exponential.
        const vfloat base = top == splat(-kInf) ? vfloat{} : top;
        const vfloat shrink = exp2_fast(before - base);
        vfloat sum = load(state.sum + i) * shrink;
        for (long s = 0; s < keys; ++s) {
            const vfloat x = exp2_fast(load(scores + s * kLanes + i) - base);
            sum += x;
            store(scores + s * kLanes + i, x);
        }
        store(state.top + i, top);
        store(state.sum + i, sum);
        store(factor + i, shrink);
    }
}

// Keys and values [begin, end) of one head as floats: where they lie, or widened into `memory`, one after another. A
// cache in half precision is never widened as a whole, which would cost more than attention of a few queries.
struct FloatRows {
    Rows k, v;

    static long size(const AttentionForward& p, long keys) { return p.half.k ? keys * (p.H + p.V) : 0; }

    FloatRows(const AttentionForward& p, long head, long begin, long end, float* memory) {
        if (!p.half.k) {
            k = {p.k.at(begin, head), p.k.token_stride, 0}, v = {p.v.at(begin, head), p.v.token_stride, 0};
            return;
        }
        const Format format = p.half.is_bf16 ? Format::bf16 : Format::f16;
        k = {memory, p.H, 0}, v = {memory + (end - begin) * p.H, p.V, 0};
        widen_rows(format, p.half.k + head * p.k.head_stride + begin * p.k.token_stride, p.k.token_stride, end - begin, p.H,
                   memory, p.H);
        widen_rows(format, p.half.v + head * p.v.head_stride + begin * p.v.token_stride, p.v.token_stride, end - begin, p.V,
                   memory + (end - begin) * p.H, p.V);
    }
};

// Folds keys [begin, end) into a tile's state; `q` is [H, kLanes], already times scale * log2(e).
void attend(const AttentionForward& p, const Tile& tile, State& state, const float* q, const float* k, long k_stride,
            const float* v, long begin, long end, float* scores) {
    alignas(64) float factor[kLanes];
    const long keys = end - begin, lanes = round_up(tile.last - tile.first, W);
    multiply<false, Into::zero>({k, k_stride, q, kLanes, scores, kLanes}, keys, lanes, p.H);
    if (tile.masked(begin, end))
        online_softmax<true>(tile, state, scores, begin, keys, lanes, factor);
    else
        online_softmax<false>(tile, state, scores, begin, keys, lanes, factor);
    multiply<true, Into::rescale>({v, p.V, scores, kLanes, state.out, kLanes}, p.V, lanes, keys, factor);
}

// Adds another part of the keys to a state.
void merge(State& into, const State& part, long V) {
    for (long i = 0; i < kLanes; i += W) {
        const vfloat a = load(into.top + i), b = load(part.top + i), top = maximum(a, b);
        const vfloat base = top == splat(-kInf) ? vfloat{} : top;
        const vfloat keep = exp2_fast(a - base), take = exp2_fast(b - base);
        store(into.top + i, top);
        store(into.sum + i, load(into.sum + i) * keep + load(part.sum + i) * take);
        for (long c = 0; c < V; ++c) {
            float* const at = into.out + c * kLanes + i;
            store(at, load(at) * keep + load(part.out + c * kLanes + i) * take);
        }
    }
}

// Divides by the row sums, applies the sinks, and writes the rows of `out` and `lse`.
void finish(const AttentionForward& p, const Sequence& s, const Tile& tile, State& state, long head) {
    const long group = p.N / p.K, used = tile.last - tile.first;
    alignas(64) float factor[kLanes] = {};
    float* target[kLanes];
    for (long i = 0; i < used; ++i) {
        const long row = tile.first + i, n = head * group + row % group, t = s.q0 + row / group;
        const float sum = state.sum[i];
        const float lse = sum == 0.0f ? -kInf : state.top[i] * kLn2 + logf(sum);
        p.lse[n * p.T + t] = lse;
        target[i] = p.out + (t * p.N + n) * p.V;
        if (sum == 0.0f) continue;
        factor[i] = 1.0f / sum;
        if (p.sink) factor[i] /= 1.0f + expf(p.sink[n] - lse);
    }
    for (long i = 0; i < used; i += W)
        for (long c = 0; c < p.V; c += W) {
            const long count = p.V - c < W ? p.V - c : W;
            vfloat block[W];
            for (int j = 0; j < W; ++j) block[j] = j < count ? load(state.out + (c + j) * kLanes + i) * load(factor + i) : vfloat{};
            transpose(block);
            for (int j = 0; j < W && i + j < used; ++j) {
                if (count == W) store(target[i + j] + c, block[j]);
                else store_some(target[i + j] + c, block[j], count);
            }
        }
}

struct Task {
    long sequence, head, first_row;
};

// Tasks are numbered from the last rows of a sequence to its first, the longest causal rows first.
Task find_task(const AttentionForward& p, const long* offsets, long number) {
    long i = 0;
    while (offsets[i + 1] <= number) ++i;
    const long groups = (offsets[i + 1] - offsets[i]) / p.K, local = number - offsets[i];
    return {i, local % p.K, (groups - 1 - local / p.K) * kRows};
}

thread_local Scratch scratch;

// The keys [from, to) of part `part` of [low, high), cut at whole blocks.
struct Part {
    long from, to;

    Part(long low, long high, long part, long parts) {
        const long blocks = high > low ? divide_up(high - low, kKeys) : 0;
        from = low + blocks * part / parts * kKeys;
        to = low + blocks * (part + 1) / parts * kKeys;
        to = to < high ? to : high;
    }
};

void run_tiles(const AttentionForward& p, const Sequence& s, const Tile* tiles, long count, const Task& task, const Part& keys,
               float* states) {
    const long group = p.N / p.K;
    float* const q = scratch.take(kTiles * p.H * kLanes + kKeys * kLanes + kKeys * p.V + FloatRows::size(p, kKeys));
    float *const scores = q + kTiles * p.H * kLanes, *const v = scores + kKeys * kLanes, *const memory = v + kKeys * p.V;
    for (long i = 0; i < count; ++i) {
        const long row = tiles[i].first;
        const auto query = [&](long j) { return p.q.at(s.q0 + (row + j) / group, task.head * group + (row + j) % group); };
        pack_transposed(query, p.H, p.scale * kLog2e, q + i * p.H * kLanes, kLanes, tiles[i].last - row);
    }
    for (long key = keys.from; key < keys.to; key += kKeys) {
        const long stop = key + kKeys < keys.to ? key + kKeys : keys.to;
        const FloatRows rows(p, task.head, s.k0 + key, s.k0 + stop, memory);
        // Values are read down a column of kKeys rows; rows a power of two apart would evict each other from the cache.
        for (long j = key; j < stop; ++j) memcpy(v + (j - key) * p.V, rows.v.at(j - key, 0), p.V * sizeof(float));
        for (long i = 0; i < count; ++i) {
            const long begin = key > tiles[i].low ? key : tiles[i].low, end = stop < tiles[i].high ? stop : tiles[i].high;
            if (begin >= end) continue;
            State state(states + i * State::size(p.V));
            attend(p, tiles[i], state, q + i * p.H * kLanes, rows.k.at(begin - key, 0), rows.k.token_stride,
                   v + (begin - key) * p.V, begin, end, scores);
        }
    }
}

// A task whose rows are so few that they fit attention_decode.h.
void run_few_rows(const AttentionForward& p, const Sequence& s, const Tile& tile, const Task& task, const Part& keys,
                  State state) {
    const long group = p.N / p.K, rows = tile.last - tile.first;
    float* const q = scratch.take(kFewRows * (p.H + kFewRowsKeys + p.V + 2) + FloatRows::size(p, kFewRowsKeys));
    float *const scores = q + kFewRows * p.H, *const out = scores + kFewRows * kFewRowsKeys, *const top = out + kFewRows * p.V;
    float *const sum = top + kFewRows, *const memory = sum + kFewRows;
    const auto query = [&](long i) { return p.q.at(s.q0 + i / group, task.head * group + i % group); };
    const auto rows_of = [&](long begin, long end) {
        const FloatRows rows(p, task.head, s.k0 + begin, s.k0 + end, memory);
        AttentionShape shape = p;
        shape.k = rows.k, shape.v = rows.v;
        return shape;
    };
    attend_few_rows(p, tile, query, rows_of, keys.from, keys.to, q, scores, top, sum, out);
    for (long i = 0; i < rows; ++i) {
        state.top[i] = top[i], state.sum[i] = sum[i];
        for (long c = 0; c < p.V; ++c) state.out[c * kLanes + i] = out[i * p.V + c];
    }
}

// One part of the keys for one task. The states go to `states`.
void run_part(const AttentionForward& p, const Task& task, long part, long parts, float* states, bool is_last) {
    const Sequence s(p, task.sequence);
    const long group = p.N / p.K, end_row = s.num_queries * group;
    const bool few = fits_few_rows(p, end_row);
    Tile tiles[kTiles];
    long count = 0, low = s.num_keys, high = 0;
    for (long row = task.first_row; row < end_row && count < kTiles; row += kLanes, ++count) {
        tiles[count].place(p, s, row, row + kLanes < end_row ? row + kLanes : end_row, kLanes);
        State(states + count * State::size(p.V)).clear(p.V);
        if (tiles[count].low < low) low = tiles[count].low;
        if (tiles[count].high > high) high = tiles[count].high;
    }
    const Part keys(low, high, part, parts);
    if (few)
        run_few_rows(p, s, tiles[0], task, keys, State(states));
    else
        run_tiles(p, s, tiles, count, task, keys, states);
    if (!is_last) return;
    for (long i = 0; i < count; ++i) {
        State state(states + i * State::size(p.V));
        finish(p, s, tiles[i], state, task.head);
    }
}

void merge_parts(const AttentionForward& p, const Task& task, long parts, float* states) {
    const Sequence s(p, task.sequence);
    const long end_row = s.num_queries * (p.N / p.K);
    for (long i = 0, row = task.first_row; i < kTiles && row < end_row; ++i, row += kLanes) {
        State state(states + i * State::size(p.V));
        for (long part = 1; part < parts; ++part)
            merge(state, State(states + (part * kTiles + i) * State::size(p.V)), p.V);
        Tile tile;
        tile.place(p, s, row, row + kLanes < end_row ? row + kLanes : end_row, kLanes);
        finish(p, s, tile, state, task.head);
    }
}

thread_local Scratch state_scratch;

}  // namespace

void attention_forward(const AttentionForward& p) {
    long* const offsets = static_cast<long*>(malloc((p.num_sequences + 1) * sizeof(long)));
    offsets[0] = 0;
    long longest = 0;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Sequence s(p, i);
        offsets[i + 1] = offsets[i] + divide_up(s.num_queries * (p.N / p.K), kRows) * p.K;
        if (s.num_queries && s.num_keys > longest) longest = s.num_keys;
    }
    const long tasks = offsets[p.num_sequences], task_size = kTiles * State::size(p.V);
    // Two parts per thread even out; a part of fewer than 256 keys costs more to merge than it saves.
    long parts = p.num_threads > 1 && tasks ? divide_up(2 * p.num_threads, tasks) : 1;
    if (tasks >= p.num_threads) parts = 1;
    if (parts > divide_up(longest, 256)) parts = longest ? divide_up(longest, 256) : 1;
    float* const shared = parts > 1 ? state_scratch.take(tasks * parts * task_size) : nullptr;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < tasks * parts; ++i) {
        float* const states = shared ? shared + i * task_size : state_scratch.take(task_size);
        run_part(p, find_task(p, offsets, i / parts), i % parts, parts, states, parts == 1);
    }
    if (parts > 1) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
        for (long i = 0; i < tasks; ++i)
            merge_parts(p, find_task(p, offsets, i), parts, shared + i * parts * task_size);
    }
    free(offsets);
}

}  // namespace sateen::SATEEN_ISA
