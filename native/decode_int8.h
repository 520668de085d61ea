// A decode step over int8 rows: the step's own rows become codes before anything is attended to, as in
// src/sateen/engine/cache/forward_cache.py. Pages get them at once, so that attention finds all rows there; in rings they
// may take the place of rows that are still seen, so that they are written afterwards.
#pragma once

#include "decode_rows.h"
#include "int8_few.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kCodeBlock = 64;  // keys, as ops.int8_rows_attention takes them by itself
constexpr Form kCodeForm{255.0f, false, 0};

// Codes [T, K, padded channels] and scales [T, K] of the step's own rows.
struct OwnRows {
    float *k_scale, *v_scale;
    code *k, *v;

    OwnRows(const DecodeStep& p, const DecodeLayer& l) {
        const long rows = p.T * l.K;
        k_scale = p.own_rows, v_scale = k_scale + rows;
        k = reinterpret_cast<code*>(v_scale + rows), v = k + rows * padded(l.H);
    }
};

inline float* mean_of(const DecodeStep& p, const DecodeLayer& l, long b) {
    return l.cache.scales.k_mean + p.slot[b] * l.K * l.H;
}

// What a sequence that begins takes off its keys: the mean of its first rows.
inline void take_mean(const DecodeStep& p, const DecodeLayer& l, long b) {
    if (p.start[b]) return;
    const long first = p.first_token[b], all = p.first_token[b + 1] - first, rows = all < p.mean_rows[b] ? all : p.mean_rows[b];
    float* const mean = mean_of(p, l, b);
    for (long head = 0; head < l.K; ++head)
        for (long h = 0; h < l.H; ++h) {
            float sum = 0.0f;
            for (long t = first; t < first + rows; ++t) sum += p.kr[(t * l.K + head) * padded(l.H) + h];
            mean[head * l.H + h] = sum / float(rows);
        }
}

// `rows` rows of K heads as the floats that their codes stand for, [rows, K, padded channels]; `mean` [K, channels] or null.
inline void widen_codes(const code* from, const float* scale, const float* mean, long rows, long K, long channels, float* to) {
    typedef code codes __attribute__((vector_size(W)));
    const long width = padded(channels);
    for (long i = 0; i < rows * K; ++i, from += channels, to += width) {
        const float* const centre = mean ? mean + i % K * channels : nullptr;
        long c = 0;
        for (; c + W <= channels; c += W) {
            codes x;
            __builtin_memcpy(&x, from + c, sizeof x);
            const vfloat y = __builtin_convertvector(x, vfloat) * scale[i];
            store(to + c, centre ? y + load(centre + c) : y);
        }
        for (; c < channels; ++c) to[c] = float(from[c]) * scale[i] + (centre ? centre[c] : 0.0f);
        for (; c < width; ++c) to[c] = 0.0f;
    }
}

// Token t's codes and scales into row `row` of the cache.
inline void write_codes_row(const DecodeStep& p, const DecodeLayer& l, long t, long row) {
    const OwnRows own(p, l);
    for (long head = 0; head < l.K; ++head) {
        const long at = row * l.K + head, from = t * l.K + head;
        __builtin_memcpy(static_cast<code*>(l.cache.k) + at * l.H, own.k + from * padded(l.H), l.H);
        __builtin_memcpy(static_cast<code*>(l.cache.v) + at * l.V, own.v + from * padded(l.V), l.V);
        l.cache.scales.k[at] = own.k_scale[from], l.cache.scales.v[at] = own.v_scale[from];
    }
}

// Token t's rotated keys and its values to codes; where attention is over floats, what the codes stand for remains.
inline void quantise_row(const DecodeStep& p, const DecodeLayer& l, long t) {
    const OwnRows own(p, l);
    const long b = p.sequence[t], from = t * l.K;
    const float* const mean = mean_of(p, l, b);
    for (long head = 0; head < l.K; ++head) {
        const long at = from + head;
        code *const k = own.k + at * padded(l.H), *const v = own.v + at * padded(l.V);
        own.k_scale[at] = quantize_row(p.kr + at * padded(l.H), mean + head * l.H, l.H, 1.0f, k).scale;
        own.v_scale[at] = quantize_row(p.vr + at * padded(l.V), nullptr, l.V, 1.0f, v).scale;
        if (l.cache.scales.integers) continue;
        widen_codes(k, own.k_scale + at, mean + head * l.H, 1, 1, l.H, p.kr + at * padded(l.H));
        widen_codes(v, own.v_scale + at, nullptr, 1, 1, l.V, p.vr + at * padded(l.V));
    }
    if (!l.cache.ring_rows) write_codes_row(p, l, t, cache_row(p, l, b, p.start[b] + t - p.first_token[b]));
}

// Blocks of keys of one sequence: where the pages have them, or out of a ring and the step's own rows.
struct CodeBlocks {
    const DecodeStep& p;
    const DecodeLayer& l;
    long b, base;
    float* memory;  // of a block that is put together

    static long size(const DecodeLayer& l) { return l.cache.ring_rows ? kCodeBlock * l.K * ((l.H + l.V) / 4 + 3) : 0; }

    CodeBlocks(const DecodeStep& p, const DecodeLayer& l, long b, float* memory) : p(p), l(l), b(b), memory(memory) {
        // A ring hands out `window - 1` old rows, and blocks are counted from the first of them.
        const long window = p.spans[l.span].window, start = p.start[b];
        base = l.cache.ring_rows && start >= window ? start - window + 1 : 0;
    }

    // Where the block of key `key` begins. All of them do at a whole block, so that only a sequence's last has fewer keys.
    long begin(long key) const { return base + (key - base) / kCodeBlock * kCodeBlock; }

    // Keys [begin, end) of head 0; head h begins h times H, V or one number later.
    RowRun run(long begin, long end) const {
        const CacheRows& cache = l.cache;
        if (!cache.ring_rows) {
            const long row = cache_row(p, l, b, begin) * l.K;
            return {static_cast<const code*>(cache.k) + row * l.H, static_cast<const code*>(cache.v) + row * l.V,
                    cache.scales.k + row, cache.scales.v + row, l.K * l.H, l.K * l.V, l.K, end - begin};
        }
        const OwnRows own(p, l);
        float *const k_scale = memory, *const v_scale = k_scale + kCodeBlock * l.K;
        code *const k = reinterpret_cast<code*>(v_scale + kCodeBlock * l.K), *const v = k + kCodeBlock * l.K * l.H;
        for (long key = begin; key < end; ++key)
            for (long head = 0; head < l.K; ++head) {
                const bool is_new = key >= p.start[b];
                const long at = (is_new ? p.first_token[b] + key - p.start[b] : cache_row(p, l, b, key)) * l.K + head;
                const long to = (key - begin) * l.K + head;
                const code* const from_k = is_new ? own.k + at * padded(l.H) : static_cast<const code*>(cache.k) + at * l.H;
                const code* const from_v = is_new ? own.v + at * padded(l.V) : static_cast<const code*>(cache.v) + at * l.V;
                __builtin_memcpy(k + to * l.H, from_k, l.H);
                __builtin_memcpy(v + to * l.V, from_v, l.V);
                k_scale[to] = (is_new ? own.k_scale : cache.scales.k)[at];
                v_scale[to] = (is_new ? own.v_scale : cache.scales.v)[at];
            }
        return {k, v, k_scale, v_scale, l.K * l.H, l.K * l.V, l.K, end - begin};
    }
};

thread_local Scratch code_scratch;

// A task over codes: its queries as codes, what its softmax carries, and its keys in blocks.
struct CodeSpan {
    const DecodeStep& p;
    const DecodeLayer& l;
    const SpanTask& task;
    Tile tile = tile_of(p, l, task);
    float* states;  // of every head
    CodeBlocks blocks;

    static long size(const DecodeLayer& l) { return l.K * RowStates::size(l.H, l.V) + CodeBlocks::size(l); }

    // States of `rows` rows per head begin, of which the task has some; `memory` has size() numbers.
    CodeSpan(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task, long rows, float* memory)
        : p(p), l(l), task(task), states(memory), blocks(p, l, task.sequence, memory + l.K * RowStates::size(l.H, l.V)) {
        // Queries come times scale * log2(e).
        for (long head = 0; head < l.K; ++head)
            states_of(head).begin([&](long i) { return query_of(p, l, task, head, i); }, task.rows, l.H, kLn2,
                                  mean_of(p, l, task.sequence) + head * l.H, rows);
    }

    RowStates states_of(long head) const { return RowStates(states + head * RowStates::size(l.H, l.V), l.H, l.V); }

    // work(keys, number of the first) for every block.
    template <typename Work>
    void each(Work work) const {
        for (long begin = blocks.begin(task.from), end; begin < task.to; begin = end) {
            end = begin + kCodeBlock < task.to ? begin + kCodeBlock : task.to;
            work(blocks.run(begin, end), begin);
        }
    }

    void finish() const {
        for (long head = 0; head < l.K; ++head) {
            const RowStates from = states_of(head);
            const SpanState to(p, l, task, head);
            for (long i = 0; i < task.rows; ++i) {
                to.top[i] = from.top[i] + from.shift[i] * kLog2e, to.sum[i] = from.sum[i];
                __builtin_memcpy(to.out + i * from.columns, from.out + i * from.columns, from.columns * sizeof(float));
            }
        }
    }
};

#ifdef __AVX512VNNI__
template <int ROWS>
void attend_few_codes(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    using Fold = CodeFold<ROWS>;
    float* const memory = code_scratch.take(Fold::memory(l.K, l.H, l.V) + CodeSpan::size(l));
    const CodeSpan span(p, l, task, ROWS, memory + Fold::memory(l.K, l.H, l.V));
    const Fold fold(span.tile, l.K, l.H, l.V, memory);
    const auto states_of = [&](long head) { return span.states_of(head); };
    fold.begin(states_of);
    span.each([&](const RowRun& run, long begin) {
        // Scales are asked for twice too, a block at a time.
        for (long block = begin + 2 * kCodeBlock; block > begin; block -= kCodeBlock) {
            if (block >= task.to) continue;
            const long at = cache_row(p, l, task.sequence, block) * l.K, bytes = kCodeBlock * l.K * sizeof(float);
            fetch(reinterpret_cast<const char*>(l.cache.scales.k + at), bytes);
            fetch(reinterpret_cast<const char*>(l.cache.scales.v + at), bytes);
        }
        fold.fold(run, begin, states_of, later_rows(p, l, task, l.cache.k, l.H, begin, run.k),
                  later_rows(p, l, task, l.cache.v, l.V, begin, run.v));
    });
    fold.end(states_of);
    span.finish();
}
#endif

// attend_span over codes with integer products.
inline void attend_codes(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
#ifdef __AVX512VNNI__
    if (fits_direct(l.H, l.V, task.rows)) switch (task.rows) {
        case 1: return attend_few_codes<1>(p, l, task);
        case 2: return attend_few_codes<2>(p, l, task);
        case 3: return attend_few_codes<3>(p, l, task);
        case 4: return attend_few_codes<4>(p, l, task);
        case 5: return attend_few_codes<5>(p, l, task);
        default: return attend_few_codes<6>(p, l, task);
    }
#endif
    const long block_size = sizeof(BlockScratch) / sizeof(float), packed_size = PackedRows::size(l.H, l.V, kCodeBlock);
    float* const memory = code_scratch.take(block_size + packed_size + CodeSpan::size(l));
    const CodeSpan span(p, l, task, kRows, memory + block_size + packed_size);
    BlockScratch& scratch = *reinterpret_cast<BlockScratch*>(memory);
    Form form = kCodeForm;
    form.quads = whole(l.H, 4) / 4;
    span.each([&](RowRun run, long begin) {
        Ahead ahead{};
        if (begin + kCodeBlock < task.to && !l.cache.ring_rows) {
            const RowRun next = span.blocks.run(begin + kCodeBlock, begin + 2 * kCodeBlock);
            ahead = {reinterpret_cast<const char*>(next.k), reinterpret_cast<const char*>(next.v), 16 * l.H, 16 * l.V};
        }
        for (long head = 0; head < l.K; ++head) {
            PackedRows rows(memory + block_size, l.H, l.V, kCodeBlock);
            rows.add(run, ahead);
            fold_block(form, span.tile, span.states_of(head), rows.close(begin), scratch);
            run.k += l.H, run.v += l.V, ++run.k_scale, ++run.v_scale;
            // Each head asks for its part of the next block, which lies in one piece.
            ahead.k += kCodeBlock / 16 * ahead.k_bytes, ahead.v += kCodeBlock / 16 * ahead.v_bytes;
        }
    });
    span.finish();
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
