// Causal attention that also says which key blocks mattered: the largest score of every block, and from them the blocks
// each query keeps (HySparse, arXiv 2602.03560, eq. 3 and algorithm 1, with the exponential that its line 16 lacks).
//
// A task is one key/value head of one sequence and a few queries: it sees all their scores, so it makes their lists
// itself and the block maxima never leave its scratch memory. Where there are fewer tasks than threads (decoding), the
// keys are split too, at borders of blocks.

#include "select_blocks.h"
#include "sparse_tile.h"

#include <stdlib.h>

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kTaskRows = 256;
constexpr long kFewRows = 8;
constexpr long kMaxima = 1L << 21;  // block maxima of a task, unless one query has more

thread_local Scratch scratch, choice_scratch, shared_scratch;

struct Task {
    Place s;
    long head, first, last;  // queries

    long rows(const OracleForward& p) const { return (last - first) * (p.N / p.K); }
    long keys() const {
        const long seen = s.position(last - 1) + 1;
        return seen > 0 ? seen : 0;
    }
};

long blocks_of(const OracleForward& p, long keys) { return (keys + p.block_size - 1) / p.block_size; }

// The queries of a task of this sequence.
long task_queries(const OracleForward& p, const Place& s) {
    const long group = p.N / p.K, blocks = blocks_of(p, s.num_keys) + W;
    long rows = kTaskRows;
    while (rows > kTileQueries && rows * blocks > kMaxima) rows /= 2;
    return rows > group ? rows / group : 1;
}

// maxima[r][b] = the largest of scores[r] in block b, for the keys from `key` on.
void record(const float* scores, long rows, long key, long keys, long block_size, float* maxima, long stride) {
    for (long r = 0; r < rows; ++r) {
        const float* const x = scores + r * kTileKeys;
        float* const to = maxima + r * stride;
        if (block_size == 1) {
            for (long s = 0; s < keys; ++s) to[key + s] = x[s];
            continue;
        }
        for (long s = 0; s < keys;) {
            const long block = (key + s) / block_size, border = (block + 1) * block_size - key;
            const long end = border < keys ? border : keys;
            float best = to[block];
            for (; s < end; ++s) best = x[s] > best ? x[s] : best;
            to[block] = best;
        }
    }
}

// The same for blocks of whole vectors; `key` is a multiple of W. The keys up to the next multiple of W are -inf.
void record_vectors(const float* scores, long rows, long key, long keys, long block_size, float* maxima, long stride) {
    for (long s = 0; s < keys;) {
        const long block = (key + s) / block_size, border = (block + 1) * block_size - key;
        const long end = border < keys ? border : keys;
        for (long r = 0; r < rows; r += W) {
            vfloat best[W];
            const long used = rows - r < W ? rows - r : W;
            for (long i = 0; i < W; ++i) {
                best[i] = splat(-kInf);
                for (long c = s; i < used && c < end; c += W) best[i] = maximum(load(scores + (r + i) * kTileKeys + c), best[i]);
            }
            const vfloat each = largest_each(best);
            for (long i = 0; i < used; ++i) {
                float* const to = maxima + (r + i) * stride + block;
                *to = each[i] > *to ? each[i] : *to;
            }
        }
        s = end;
    }
}

// Keys [from, to) for the rows of one task.
void attend(const OracleForward& p, const Task& task, long from, long to, const RowStates& states, float* data, float* maxima,
            long stride) {
    const long group = p.N / p.K, rows = task.rows(p);
    PackedKeys keys(data, p.H, p.V);
    TileMemory tile(data + PackedKeys::size(p.H, p.V), p.H, p.V);
    for (long key = from; key < to; key += kTileKeys) {
        const long count = to - key < kTileKeys ? to - key : kTileKeys;
        const bool in_place = rows <= kFewRows && keys.point_at_values(p, task.head, task.s.k0 + key);
        keys.pack(p, task.head, [&](long i) { return task.s.k0 + key + i; }, count, false, in_place);
        const long next = key + kTileKeys, ahead = to - next < kTileKeys ? to - next : kTileKeys;
        prefetch_keys(p, task.head, [&](long i) { return task.s.k0 + next + i; }, ahead);
        for (long r = 0; r < rows; r += kTileQueries) {
            const long used = rows - r < kTileQueries ? rows - r : kTileQueries;
            if (task.s.position(task.first + (r + used - 1) / group) < key) continue;
            for (long i = 0; i < used; ++i) {
                const long seen = task.s.position(task.first + (r + i) / group) - key + 1;
                tile.row[i] = r + i;
                tile.limit[i] = int(seen < count ? seen : count);
            }
            tile.gather(states, used);
            tile_scores(keys, tile.q, states.wide_h, used, p.H, tile.scores);
            hide(tile.scores, tile.limit, used, count);
            if (maxima) {
                const auto keep = p.block_size % W == 0 ? record_vectors : record;
                keep(tile.scores, used, key, count, p.block_size, maxima + r * stride, stride);
            }
            tile.fold(keys, states, used);
        }
    }
}

void write_maxima(const OracleForward& p, const Task& task, const float* maxima, long stride, long blocks) {
    const long group = p.N / p.K;
    for (long r = 0; r < task.rows(p); ++r) {
        const long t = task.s.q0 + task.first + r / group, n = task.head * group + r % group;
        float* const to = p.maxima + (n * p.T + t) * p.num_blocks;
        for (long b = 0; b < p.num_blocks; ++b) to[b] = b < blocks ? maxima[r * stride + b] : -kInf;
    }
}

// The lists of a task's queries: block maxima less the row's log-sum-exp, together for the group's heads.
void choose(const OracleForward& p, const Task& task, const RowStates& states, const float* maxima, long stride) {
    const long group = p.N / p.K;
    float* const scores = choice_scratch.take(2 * (stride + W));
    int* const keys = reinterpret_cast<int*>(scores + stride + W);
    // The outputs are written: from here on `top` is the log-sum-exp.
    for (long r = 0; r < task.rows(p); ++r) states.top[r] = states.sum[r] == 0.0f ? 0.0f : states.top[r] + logf(states.sum[r]);
    for (long q = 0; q < task.last - task.first; ++q) {
        const long position = task.s.position(task.first + q);
        int* const list = p.lists + (task.head * p.T + task.s.q0 + task.first + q) * (p.listed + p.recent);
        const long visible = blocks_of(p, position < 0 ? 0 : position + 1);
        long ranked = visible;
        if (p.forced_window) ranked = position - p.forced_window + 1 > 0 ? (position - p.forced_window + 1) / p.block_size : 0;
        for (long b = 0; b < round_up(ranked, W); b += W) {
            vfloat best = splat(p.is_mean ? 0.0f : -kInf);
            for (long g = 0; g < group; ++g) {
                const long r = q * group + g;
                const vfloat log_probability = load(maxima + r * stride + b) - splat(states.top[r]);
                best = p.is_mean ? best + exp2_fast(log_probability * kLog2e) : maximum(log_probability, best);
            }
            store(scores + b, best);
        }
        choose_largest(scores, ranked, p.listed, keys, list);
        for (long i = 0; i < p.recent; ++i) list[p.listed + i] = ranked + i < visible ? int(ranked + i) : -1;
    }
}

void finish(const OracleForward& p, const Task& task, const RowStates& states, const float* maxima, long stride, long blocks) {
    states.finish(p, task.head, task.s.q0 + task.first, task.rows(p), p.out, p.lse);
    if (p.maxima) write_maxima(p, task, maxima, stride, blocks);
    if (p.lists) choose(p, task, states, maxima, stride);
}

}  // namespace

void oracle_forward(const OracleForward& p) {
    long* const offsets = static_cast<long*>(malloc((p.num_sequences + 1) * sizeof(long)));
    offsets[0] = 0;
    long longest = 0, most_rows = 0;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Place s(p, i);
        const long size = task_queries(p, s);
        offsets[i + 1] = offsets[i] + (s.num_queries + size - 1) / size * p.K;
        if (s.num_queries && s.num_keys > longest) longest = s.num_keys;
        const long rows = (size < s.num_queries ? size : s.num_queries) * (p.N / p.K);
        if (rows > most_rows) most_rows = rows;
    }
    // Tasks are numbered from the last queries of a sequence to its first, the longest causal rows first.
    const auto find = [&](long number) {
        long i = 0;
        while (offsets[i + 1] <= number) ++i;
        const Place s(p, i);
        const long size = task_queries(p, s), chunks = (offsets[i + 1] - offsets[i]) / p.K, local = number - offsets[i];
        const long first = (chunks - 1 - local / p.K) * size;
        return Task{s, local % p.K, first, first + size < s.num_queries ? first + size : s.num_queries};
    };
    const long tasks = offsets[p.num_sequences];
    // A part begins where a block and a tile do.
    long unit = p.block_size;
    while (unit % kTileKeys) unit += p.block_size;
    long parts = tasks && tasks < p.num_threads ? (2 * p.num_threads + tasks - 1) / tasks : 1;
    if (parts > longest / 256) parts = longest / 256 > 1 ? longest / 256 : 1;
    const bool wants_maxima = p.maxima || p.lists;
    const long stride = wants_maxima ? round_up(blocks_of(p, longest), W) : 0;
    const long work = PackedKeys::size(p.H, p.V) + TileMemory::size(p.H, p.V);
    const long state = RowStates::size(most_rows, p.H, p.V), all_maxima = most_rows * stride;
    float* const shared = parts > 1 ? shared_scratch.take(tasks * (parts * state + all_maxima)) : nullptr;
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < tasks * parts; ++i) {
        const long number = i / parts, part = i % parts;
        const Task task = find(number);
        const long rows = task.rows(p), keys = task.keys(), blocks = blocks_of(p, keys), steps = (keys + unit - 1) / unit;
        const long from = steps * part / parts * unit, border = steps * (part + 1) / parts * unit;
        const long to = border < keys ? border : keys;
        float* const data = scratch.take(work + (shared ? 0 : state + all_maxima));
        float* const at = shared ? shared + i * state : data + work;
        float* const maxima = !wants_maxima ? nullptr : shared ? shared + tasks * parts * state + number * all_maxima : at + state;
        RowStates states(at, rows, p.H, p.V);
        states.begin(p, task.head, task.s.q0 + task.first, rows);
        if (wants_maxima) {
            const long begin = from / p.block_size, end = part + 1 == parts ? stride : to > from ? blocks_of(p, to) : begin;
            for (long r = 0; r < rows; ++r)
                for (long b = begin; b < end; ++b) maxima[r * stride + b] = -kInf;
        }
        attend(p, task, from, to, states, data, maxima, stride);
        if (!shared) finish(p, task, states, maxima, stride, blocks);
    }
    if (shared) {
        for (long i = 0; i < tasks; ++i) {
            const Task task = find(i);
            const long rows = task.rows(p);
            RowStates states(shared + i * parts * state, rows, p.H, p.V);
            for (long part = 1; part < parts; ++part)
                states.merge(RowStates(shared + (i * parts + part) * state, rows, p.H, p.V), rows);
            finish(p, task, states, shared + tasks * parts * state + i * all_maxima, stride, blocks_of(p, task.keys()));
        }
    }
    free(offsets);
}

}  // namespace sateen::SATEEN_ISA
