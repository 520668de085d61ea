// HySparse in a decode step (arXiv 2602.03560): full attention that keeps each block's largest score and lists blocks by
// them, attention over the listed rows of another layer's cache, and the gates that join branches.
#pragma once

#include <math.h>

#include <type_traits>

#include "decode_sparse_rows.h"
#include "select_blocks.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kUnitHeads = 8;  // query heads of a group that one unit of listed attention takes
constexpr long kOracleKeys = 64;

thread_local Scratch sparse_scratch;

inline bool has_own_rows(const DecodeLayer& l) { return l.k.rows > 0; }

inline void ask_for_rows(const DecodeLayer& l, long row, long head, long count) {
    const Format format = l.cache.format;
    const long k_bytes = l.H * number_bytes(format), v_bytes = l.V * number_bytes(format);
    for (long i = 0; i < count; ++i) {
        const long at = (row + i) * l.K + head;
        const char* const k = static_cast<const char*>(offset(l.cache.k, format, at * l.H));
        const char* const v = static_cast<const char*>(offset(l.cache.v, format, at * l.V));
        for (long byte = 0; byte < k_bytes; byte += 64) __builtin_prefetch(k + byte, 0, 2);
        for (long byte = 0; byte < v_bytes; byte += 64) __builtin_prefetch(v + byte, 0, 2);
    }
}

// Lets what meets `rows` ask for the rows from `next` on, where it can; otherwise the caller does.
template <typename Number>
inline bool foresees(const DecodeLayer& l, HeadRows<Number>& rows, const Number* copies, long next, long head) {
    if (std::is_same_v<Number, float> || rows.k == copies) return false;
    rows.next_k = static_cast<const Number*>(l.cache.k) + (next * l.K + head) * l.H;
    rows.next_v = static_cast<const Number*>(l.cache.v) + (next * l.K + head) * l.V;
    return true;
}

// Floats of the block maxima of one query row.
inline long maxima_stride(const DecodeStep& p, const DecodeLayer& l) {
    return round_up(divide_up(p.longest, l.sparse.block_size), kPad);
}

inline float* maxima_of(const DecodeStep& p, const DecodeLayer& l, long t, long n) {
    return p.maxima + (t * l.N + n) * maxima_stride(p, l);
}

// to[b] = the largest of the scores of block b, of keys [begin, end); blocks that begin before have a value.
inline void record_blocks(const float* scores, long begin, long end, long block_size, float* to) {
    if (block_size == 1) {
        __builtin_memcpy(to + begin, scores, (end - begin) * sizeof(float));
        return;
    }
    for (long s = begin; s < end;) {
        const long block = s / block_size, border = (block + 1) * block_size, stop = border < end ? border : end;
        float best = to[block];
        vfloat wide = splat(-kInf);
        for (; s + W <= stop; s += W) wide = maximum(load(scores + s - begin), wide);
        for (; s < stop; ++s) best = scores[s - begin] > best ? scores[s - begin] : best;
        const float widest = max_lanes(wide);
        to[block] = widest > best ? widest : best;
    }
}

// Keys [task.from, task.to) for a tile of an oracle's query rows, all heads, with the largest score of every block.
template <typename Number>
void attend_oracle_in(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    const long b = task.sequence, group = l.N / l.K, H = row_width<Number>(l.H), V = row_width<Number>(l.V), size = l.sparse.block_size;
    const Tile tile = tile_of(p, l, task);
    float* const scores = sparse_scratch.take(kSpanRows * kMostKeys + kOracleKeys * (H + V) + l.K * task.rows * H);
    Number *const keys = reinterpret_cast<Number*>(scores + kSpanRows * kMostKeys), *const values = keys + kOracleKeys * H;
    Number* const queries = values + kOracleKeys * V;
    const auto maxima = [&](long head, long i) {
        const long row = task.first + i;
        return maxima_of(p, l, p.first_token[b] + row / group, head * group + row % group);
    };
    for (long head = 0; head < l.K; ++head) {
        const SpanState state(p, l, task, head);
        for (long i = 0; i < task.rows; ++i) {
            state.top[i] = -kInf, state.sum[i] = 0.0f;
            float* const to = maxima(head, i);
            for (long block = task.from / size; block * size < task.to; ++block) to[block] = -kInf;
        }
        for (long i = 0; i < task.rows * padded(l.V); ++i) state.out[i] = 0.0f;
        for (long i = 0; i < task.rows; ++i) query_as(query_of(p, l, task, head, i), l.H, queries + (head * task.rows + i) * H);
    }
    const auto stop_of = [&](long begin) {
        const long page = begin / p.page * p.page + p.page, limit = begin < p.start[b] && p.start[b] < task.to ? p.start[b] : task.to;
        const long end = begin < p.start[b] && page < limit ? page : limit;
        return end < begin + kOracleKeys ? end : begin + kOracleKeys;
    };
    for (long begin = task.from; begin < task.to;) {
        const long end = stop_of(begin), next = end < task.to && end < p.start[b] ? stop_of(end) - end : 0;
        const bool is_new = begin >= p.start[b];
        const long row = is_new ? 0 : cache_row(p, l, b, begin), next_row = next ? cache_row(p, l, b, end) : 0;
        for (long head = 0; head < l.K; ++head) {
            HeadRows<Number> rows = is_new ? new_rows(p, l, p.first_token[b] + begin - p.start[b], head, end - begin, keys, values)
                                                 : rows_of_head(l, row, head, end - begin, keys, values);
            const bool asks = next && foresees(l, rows, keys, next_row, head);
            const SpanState state(p, l, task, head);
            const auto query = [&](long i) -> const Number* {
                if constexpr (std::is_same_v<Number, float>) return query_of(p, l, task, head, i);
                else return queries + (head * task.rows + i) * H;
            };
            const auto record = [&](long i, const float* x) {
                const long from = next * i / task.rows, to = next * (i + 1) / task.rows;
                if (!asks) ask_for_rows(l, next_row + from, head, to - from);
                record_blocks(x, begin, end, size, maxima(head, i));
            };
            fold_rows(rows, l, tile, query, begin, scores, state.top, state.sum, state.out, record);
        }
        begin = end;
    }
}

void attend_oracle(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    in_numbers_of(l, [&](auto number) { attend_oracle_in<decltype(number)>(p, l, task); });
}

// The lists of token t's queries: block maxima less the row's log-sum-exp, without sinks, the largest over the group's
// heads; then the blocks of the newest keys, where these are listed besides.
void list_blocks(const DecodeStep& p, const DecodeLayer& l, long t) {
    const SparseParts& s = l.sparse;
    const Span& span = p.spans[l.span];
    const long b = p.sequence[t], position = p.start[b] + t - p.first_token[b], stride = maxima_stride(p, l);
    const long columns = s.listed + s.recent, visible = position / s.block_size + 1, oldest = position - s.forced_window + 1;
    const long ranked = !s.forced_window ? visible : oldest > 0 ? oldest / s.block_size : 0;
    float *const scores = sparse_scratch.take(2 * (stride + kPad) + span.group), *const lse = scores + 2 * (stride + kPad);
    int* const keys = reinterpret_cast<int*>(scores + stride + kPad);
    for (long head = 0; head < l.K; ++head) {
        for (long g = 0; g < span.group; ++g) {
            const long row = (t - p.first_token[b]) * span.group + g, i = row % kSpanRows;
            const SpanTile& tile = span.tiles[span.first_tile[b] + row / kSpanRows];
            float top = -kInf, sum = 0.0f;
            for (long part = 0; part < tile.num_tasks; ++part) {
                const SpanState state(p, l, span.tasks[tile.first_task + part], head);
                top = state.top[i] > top ? state.top[i] : top;
            }
            for (long part = 0; part < tile.num_tasks; ++part) {
                const SpanState state(p, l, span.tasks[tile.first_task + part], head);
                sum += exp2f(state.top[i] - top) * state.sum[i];
            }
            lse[g] = top + log2f(sum);
        }
        for (long block = 0; block < ranked; block += W) {
            vfloat best = splat(-kInf);
            for (long g = 0; g < span.group; ++g)
                best = maximum(load(maxima_of(p, l, t, head * span.group + g) + block) - splat(lse[g]), best);
            store(scores + block, best);
        }
        int* const list = p.lists + s.lists * p.T + (head * p.T + t) * columns;
        choose_largest(scores, ranked, s.listed, keys, list);
        for (long i = 0; i < s.recent; ++i) list[s.listed + i] = ranked + i < visible ? int(ranked + i) : -1;
    }
}

// Units of attention over listed blocks: a token, a key/value head and some query heads of its group.
inline long listed_units(const DecodeStep& p, const DecodeLayer& l) {
    if (!l.sparse.source) return 0;
    const long K = p.layers[l.sparse.source - 1].K;
    return p.T * K * divide_up(l.N / K, kUnitHeads);
}

// Queries of the listed branch, [T, N, padded H]: the other branch's, where both are rotated alike.
inline float* listed_queries(const DecodeStep& p, const DecodeLayer& l) {
    return has_own_rows(l) && l.angles == l.sparse.angles ? p.qr : p.listed_q;
}

template <typename Number>
void attend_listed_in(const DecodeStep& p, const DecodeLayer& l, long unit) {
    const DecodeLayer& oracle = p.layers[l.sparse.source - 1];
    const SparseParts& s = oracle.sparse;
    const long K = oracle.K, group = l.N / K, chunks = divide_up(group, kUnitHeads), H = row_width<Number>(l.H), V = row_width<Number>(l.V);
    const long t = unit / (K * chunks), head = unit / chunks % K, first = head * group + unit % chunks * kUnitHeads;
    const long left = (head + 1) * group - first, count = left < kUnitHeads ? left : kUnitHeads;
    const long b = p.sequence[t], position = p.start[b] + t - p.first_token[b], columns = s.listed + s.recent;
    const int* const list = p.lists + s.lists * p.T + (head * p.T + t) * columns;
    float* const scores = sparse_scratch.take(kUnitHeads * (kMostKeys + V + H + 2) + kMostKeys * (H + V));
    float *const out = scores + kUnitHeads * kMostKeys, *const top = out + kUnitHeads * V, *const sum = top + kUnitHeads;
    Number *const keys = reinterpret_cast<Number*>(sum + kUnitHeads), *const values = keys + kMostKeys * H;
    Number* const rounded = values + kMostKeys * V;
    const float* const queries = listed_queries(p, l) + (t * l.N + first) * padded(l.H);
    const Number* rows_of_queries[kUnitHeads];
    Tile tile;
    tile.first = 0, tile.last = count;
    for (long i = 0; i < count; ++i) {
        tile.newest[i] = int(kMostKeys), tile.oldest[i] = 0, top[i] = -kInf, sum[i] = 0.0f;
        rows_of_queries[i] = query_as(queries + i * padded(l.H), l.H, rounded + i * H);
        for (long c = 0; c < V; ++c) out[i * V + c] = 0.0f;
    }
    const auto query = [&](long i) { return rows_of_queries[i]; };
    const auto fold = [&](const HeadRows<Number>& rows) { fold_rows(rows, oracle, tile, query, 0, scores, top, sum, out, [](long, const float*) {}); };
    // Rows that lie one after another, block after block; use(row, count) until there are none.
    const auto runs = [&](auto use) {
        for (long i = 0; i < columns; ++i) {
            const long begin = list[i] * s.block_size;
            if (list[i] < 0 || begin > position) continue;
            const long end = begin + s.block_size <= position ? begin + s.block_size : position + 1;
            for (long at = begin; at < end;) {
                const long border = at / p.page * p.page + p.page, stop = border < end ? border : end;
                use(cache_row(p, oracle, b, at), stop - at);
                at = stop;
            }
        }
    };
    long filled = 0, row = -1, ready = 0;
    const auto flush = [&] {
        if (filled) fold({keys, values, H, V, filled});
        filled = 0;
    };
    const auto take = [&](long from, long rows, long next, long ahead) {
        bool asks = ahead == 0;
        while (rows) {
            const long n = rows < kMostKeys - filled ? rows : kMostKeys - filled;
            HeadRows<Number> some = rows_of_head(oracle, from, head, n, keys + filled * H, values + filled * V);
            if (!asks && !foresees(oracle, some, keys + filled * H, next, head)) ask_for_rows(oracle, next, head, ahead);
            asks = true;
            if (some.k == keys + filled * H) filled += n;
            else fold(some);
            if (filled == kMostKeys) flush();
            from += n, rows -= n;
        }
    };
    runs([&](long from, long rows) {  // one behind: the next rows are on their way while these are used
        if (row >= 0) take(row, ready, from, rows);
        row = from, ready = rows;
    });
    if (row >= 0) take(row, ready, 0, 0);
    flush();
    for (long i = 0; i < count; ++i) {
        const long n = first + i;
        const float sink = l.sparse.sink ? l.sparse.sink[n] * kLog2e : -kInf, most = top[i] > sink ? top[i] : sink;
        float* const to = p.listed_out + (t * l.N + n) * l.V;
        const float share = most == -kInf ? 0.0f : exp2f(top[i] - most);
        const float total = sum[i] * share + (l.sparse.sink ? exp2f(sink - most) : 0.0f);
        for (long c = 0; c < l.V; ++c) to[c] = total > 0.0f ? out[i * V + c] * share / total : 0.0f;
    }
}

void attend_listed(const DecodeStep& p, const DecodeLayer& l, long unit) {
    in_numbers_of(p.layers[l.sparse.source - 1], [&](auto number) { attend_listed_in<decltype(number)>(p, l, unit); });
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp2f(-x * kLog2e)); }

// Token t's outputs [N, V]: the listed branch and the other one, each times its sigmoid, added up (eq. 8-9).
void join_branches(const DecodeStep& p, const DecodeLayer& l, long t) {
    const bool is_sparse = l.sparse.source, has_own = has_own_rows(l);
    const long branches = is_sparse + has_own, width = l.sparse.gate.rows / (branches * l.N);
    const float* const gates = p.gates + t * l.sparse.gate.rows;
    const auto gate = [&](long branch, long n, long c) { return sigmoid(gates[(branch * l.N + n) * width + (width > 1 ? c : 0)]); };
    for (long n = 0; n < l.N; ++n) {
        float* const out = p.attended + (t * l.N + n) * l.V;
        const float* const listed = p.listed_out + (t * l.N + n) * l.V;
        float ours = 0.0f, theirs = 0.0f;
        for (long c = 0; c < l.V; ++c) {
            if (c == 0 || width > 1) ours = has_own ? gate(is_sparse, n, c) : 0.0f, theirs = is_sparse ? gate(0, n, c) : 0.0f;
            out[c] = (is_sparse ? theirs * listed[c] : 0.0f) + (has_own ? ours * out[c] : 0.0f);
        }
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
