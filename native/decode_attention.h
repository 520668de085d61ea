// Attention of a decode step: queries against the rows of their sequence in a layer's cache, read where they lie, and
// against the step's own rows, which are written to the cache afterwards. That order serves rings too, where a new row
// may take the place of one that an earlier query of the step still sees.
#pragma once

#include <math.h>

#include "attention_decode.h"
#include "decode.h"
#include "decode_attention_bf16.h"
#include "decode_int8.h"
#include "decode_rows.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kBlock = 32;  // keys whose rows are looked at together, so few that the floats stay in the first cache

// Keys [begin, end) of one sequence whose rows lie one after another: in the cache, or new and padded.
struct Run {
    long end;
    bool is_new;
    const void *k, *v;
    long row = 0;  // in the cache, times K

    Run(const DecodeStep& p, const DecodeLayer& l, long b, long begin, long to, long most = kBlock) {
        const long start = p.start[b], size = l.cache.ring_rows ? l.cache.ring_rows : p.page;
        is_new = begin >= start;
        const long border = begin / size * size + size, limit = is_new ? to : to < start ? to : start;
        end = !is_new && border < limit ? border : limit;
        if (end > begin + most) end = begin + most;
        if (is_new) {
            const long t = p.first_token[b] + begin - start;
            k = p.kr + t * l.K * padded(l.H), v = p.vr + t * l.K * padded(l.V);
        } else {
            row = cache_row(p, l, b, begin) * l.K;
            k = offset(l.cache.k, l.cache.format, row * l.H), v = offset(l.cache.v, l.cache.format, row * l.V);
        }
    }

    // The rows as floats of whole vectors, [count, K, padded channels]: where they lie, or a copy in `scratch`.
    const float* floats(const void* rows, const DecodeLayer& l, long channels, long count, float* scratch) const {
        const long width = padded(channels);
        if (is_new || (l.cache.format == Format::f32 && width == channels)) return static_cast<const float*>(rows);
        widen_rows(l.cache.format, rows, channels, count * l.K, channels, scratch, width);
        return scratch;
    }
};

// Asks for part `part` of `parts` of `bytes` that will be read next: the hardware does not foresee where.
inline void prefetch(const void* from, long bytes, long part, long parts) {
    for (long i = bytes * part / parts; i < bytes * (part + 1) / parts; i += 64)
        __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

thread_local Scratch attention_scratch;

// The keys of a run and the rows of queries that meet them, in floats.
struct FloatRows {
    const DecodeStep& p;
    const DecodeLayer& l;
    const SpanTask& task;
    long H = padded(l.H), V = padded(l.V);
    float* keys = attention_scratch.take(kBlock * l.K * (H + V) + kSpanRows * kFewRowsKeys);
    float *values = keys + kBlock * l.K * H, *scores = values + kBlock * l.K * V;
    const float *k = nullptr, *v = nullptr;

    void take(const Run& run, long count) {
        const CacheScales& scales = l.cache.scales;
        if (scales.k && !run.is_new) {
            widen_codes(static_cast<const code*>(run.k), scales.k + run.row, mean_of(p, l, task.sequence), count, l.K, l.H, keys);
            widen_codes(static_cast<const code*>(run.v), scales.v + run.row, nullptr, count, l.K, l.V, values);
            k = keys, v = values;
            return;
        }
        k = run.floats(run.k, l, l.H, count, keys), v = run.floats(run.v, l, l.V, count, values);
    }

    void fold(long head, const Tile& tile, long begin, long end, const SpanState& state) {
        AttentionShape shape{};
        shape.H = H, shape.V = V, shape.k = {k + head * H, l.K * H, 0}, shape.v = {v + head * V, l.K * V, 0};
        const auto query = [&](long i) { return query_of(p, l, task, head, i); };
        fold_few_rows(shape, tile, query, -begin, 0, begin, end, scores, state.top, state.sum, state.out);
    }
};

template <typename Rows>
void attend_rows(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task, Rows& rows) {
    const long b = task.sequence, V = padded(l.V);
    const Tile tile = tile_of(p, l, task);
    for (long head = 0; head < l.K; ++head) {
        const SpanState state(p, l, task, head);
        for (long i = 0; i < task.rows; ++i) state.top[i] = -kInf, state.sum[i] = 0.0f;
        for (long i = 0; i < task.rows * V; ++i) state.out[i] = 0.0f;
    }
    Run run(p, l, b, task.from, task.to);
    for (long begin = task.from; begin < task.to;) {
        const Run next(p, l, b, run.end, task.to);
        const long count = next.is_new ? 0 : next.end - run.end, bytes = count * l.K * number_bytes(l.cache.format);
        rows.take(run, run.end - begin);
        for (long head = 0; head < l.K; ++head) {
            prefetch(next.k, bytes * l.H, head, l.K);
            prefetch(next.v, bytes * l.V, head, l.K);
            rows.fold(head, tile, begin, run.end, SpanState(p, l, task, head));
        }
        begin = run.end;
        run = next;
    }
}

#ifdef __AVX512BF16__
// The same in bfloat16, where the processor multiplies it.
template <int ROWS>
void attend_bf16(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    const long b = task.sequence, rows = task.rows, K = l.K, H = l.H, V = l.V;
    const Tile tile = tile_of(p, l, task);
    const long soft_stride = ROWS ? rows : round_up(rows, W), soft_size = SoftRows::size(K * soft_stride);
    const long numbers = K * (rows * (H + kBf16Block) + kBf16Block * (H + V));
    // Sums are kept apart from those of other threads until they are whole, and at cache lines.
    float* const memory = attention_scratch.take(soft_size + K * rows * (V + kBf16Block) + divide_up(numbers, 2));
    float *const out = memory + soft_size, *const scores = out + K * rows * V;
    bits16 *const weights = reinterpret_cast<bits16*>(scores + K * rows * kBf16Block), *const query = weights + K * rows * kBf16Block;
    bits16 *const new_k = query + K * rows * H, *const new_v = new_k + kBf16Block * K * H;
    const SoftRows soft(K * soft_stride, memory);
    const Bf16Fold fold{tile, H, V, rows, query, scores, weights, out, soft, soft_stride};
    for (long head = 0; head < K; ++head)
        for (long i = 0; i < rows; ++i) narrow(Format::bf16, query_of(p, l, task, head, i), H, query + (head * rows + i) * H);
    for (long i = 0; i < K * rows * V; i += W) store(out + i, vfloat{});
    Run run(p, l, b, task.from, task.to, kBf16Block);
    for (long begin = task.from; begin < task.to;) {
        const Run next(p, l, b, run.end, task.to, kBf16Block);
        const long count = run.end - begin, next_count = next.is_new ? 0 : next.end - run.end;
        Bf16Keys keys{static_cast<const bits16*>(run.k), static_cast<const bits16*>(run.v), K * H, K * V, count};
        if (run.is_new) {
            narrow(Format::bf16, static_cast<const float*>(run.k), count * K * H, new_k);
            narrow(Format::bf16, static_cast<const float*>(run.v), count * K * V, new_v);
            keys.k = new_k, keys.v = new_v;
        }
        const auto later_keys = later_rows(p, l, task, l.cache.k, H, begin, keys.k);
        const auto later_values = later_rows(p, l, task, l.cache.v, V, begin, keys.v);
        if (ROWS > 0) fold.template fold<ROWS>(keys, begin, 0, K, later_keys, later_values);
        else
            for (long head = 0; head < K; ++head) {
                prefetch(next.k, next_count * K * H * sizeof(bits16), head, K);
                prefetch(next.v, next_count * K * V * sizeof(bits16), head, K);
                fold.template fold<ROWS>(keys, begin, head, head + 1, later_keys, later_values);
            }
        begin = run.end;
        run = next;
    }
    for (long head = 0; head < K; ++head) {
        const SpanState state(p, l, task, head);
        for (long i = 0; i < rows; ++i) {
            const long at = head * soft_stride + i;
            state.top[i] = soft.top[at], state.sum[i] = soft.sum[at];
        }
        in_order(out + head * rows * V, rows * V, state.out);
    }
}
#endif

void attend_span(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    if (l.cache.scales.integers) return attend_codes(p, l, task);
#ifdef __AVX512BF16__
    if (fits_bf16(l)) switch (task.rows) {
        case 1: return attend_bf16<1>(p, l, task);
        case 2: return attend_bf16<2>(p, l, task);
        case 3: return attend_bf16<3>(p, l, task);
        case 4: return attend_bf16<4>(p, l, task);
        default: return attend_bf16<0>(p, l, task);
    }
#endif
    FloatRows rows{p, l, task};
    attend_rows(p, l, task, rows);
}

// Joins the parts of token t's rows, with the sinks, and writes its outputs [N, V].
void finish_attention(const DecodeStep& p, const DecodeLayer& l, long t) {
    const Span& span = p.spans[l.span];
    const long b = p.sequence[t], V = padded(l.V), q0 = p.first_token[b];
    for (long n = 0; n < l.N; ++n) {
        const long row = (t - q0) * span.group + n % span.group, i = row % kSpanRows;
        const SpanTile& tile = span.tiles[span.first_tile[b] + row / kSpanRows];
        float top = l.sink ? l.sink[n] * kLog2e : -kInf;
        for (long part = 0; part < tile.num_tasks; ++part) {
            const SpanState state(p, l, span.tasks[tile.first_task + part], n / span.group);
            top = state.top[i] > top ? state.top[i] : top;
        }
        float sum = l.sink ? exp2f(l.sink[n] * kLog2e - top) : 0.0f;
        float* const out = p.attended + t * l.N * l.V + n * l.V;
        for (long part = 0; part < tile.num_tasks; ++part) {
            const SpanState state(p, l, span.tasks[tile.first_task + part], n / span.group);
            const float share = exp2f(state.top[i] - top);
            sum += share * state.sum[i];
            for (long c = 0; c < l.V; ++c) out[c] = (part ? out[c] : 0.0f) + share * state.out[i * V + c];
        }
        for (long c = 0; c < l.V; ++c) out[c] /= sum;
    }
}

// Writes token t's row to the cache, unless a later token of the step takes its place in the ring.
void keep_row(const DecodeStep& p, const DecodeLayer& l, long t) {
    const long b = p.sequence[t], ring = l.cache.ring_rows;
    if (ring && t + ring < p.first_token[b + 1]) return;
    const long row = cache_row(p, l, b, p.start[b] + t - p.first_token[b]);
    if (l.cache.scales.k) return ring ? write_codes_row(p, l, t, row) : void();  // those of pages are there already
    for (long head = 0; head < l.K; ++head) {
        const long at = row * l.K + head, from = t * l.K + head;
        narrow(l.cache.format, p.kr + from * padded(l.H), l.H, offset(l.cache.k, l.cache.format, at * l.H));
        narrow(l.cache.format, p.vr + from * padded(l.V), l.V, offset(l.cache.v, l.cache.format, at * l.V));
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
