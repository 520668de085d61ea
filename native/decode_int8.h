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

// attend_span over codes with integer products.
inline void attend_codes(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    const Tile tile = tile_of(p, l, task);
    const long state_size = RowStates::size(l.H, l.V), block_size = sizeof(BlockScratch) / sizeof(float);
    // Packed rows, or two lines of scales and the queries of all heads four times, or what a single row needs.
    long packed_size = PackedRows::size(l.H, l.V, kCodeBlock) + l.K * kGroup * l.H;
    bool is_direct = false;
#ifdef __AVX512VNNI__
    is_direct = fits_direct(l.H, l.V, task.rows);
    if (is_direct && task.rows == 1) packed_size = OneRowFold::size(l.K, l.H, l.V);
#endif
    float* const memory = code_scratch.take(block_size + packed_size + l.K * state_size + CodeBlocks::size(l));
    float *const packed = memory + block_size, *const states = packed + packed_size;
    const CodeBlocks blocks(p, l, task.sequence, states + l.K * state_size);
    const auto states_of = [&](long head) { return RowStates(states + head * state_size, l.H, l.V); };
    // Queries come times scale * log2(e).
    for (long head = 0; head < l.K; ++head)
        states_of(head).begin([&](long i) { return query_of(p, l, task, head, i); }, task.rows, l.H, kLn2,
                   mean_of(p, l, task.sequence) + head * l.H, is_direct ? task.rows : kRows);
#ifdef __AVX512VNNI__
    const OneRowFold one(tile, l.K, l.H, l.V, packed);
    float* const scales = packed;
    code* const spread = task.rows == 1 ? one.spread : reinterpret_cast<code*>(packed + 2 * kCodeBlock);
    if (is_direct)
        for (long head = 0; head < l.K; ++head)
            for (long i = 0; i < task.rows; ++i)
                spread_codes(states_of(head).codes + i * states_of(head).stride, l.H, spread + (head * task.rows + i) * l.H * 4);
#endif
    BlockScratch& scratch = *reinterpret_cast<BlockScratch*>(memory);
    Form form = kCodeForm;
    form.quads = whole(l.H, 4) / 4;
    for (long begin = blocks.begin(task.from), end; begin < task.to; begin = end) {
        end = begin + kCodeBlock < task.to ? begin + kCodeBlock : task.to;
        RowRun run = blocks.run(begin, end);
        Ahead ahead{};
        const float *next_scales[2]{};
        if (end < task.to && !l.cache.ring_rows) {
            const long next = cache_row(p, l, task.sequence, end) * l.K;
            ahead = {static_cast<const char*>(l.cache.k) + next * l.H, static_cast<const char*>(l.cache.v) + next * l.V, 16 * l.H, 16 * l.V};
            next_scales[0] = l.cache.scales.k + next, next_scales[1] = l.cache.scales.v + next;
        }
#ifdef __AVX512VNNI__
        if (is_direct && task.rows == 1) {
            for (const float* from : next_scales)
                if (from) fetch(reinterpret_cast<const char*>(from), l.K * kCodeBlock * sizeof(float));
            // Steps over the keys, over the values, and over those of the next block follow one another.
            constexpr long kSteps = kCodeBlock / OneRowFold::kStep;
            const long k_bytes = OneRowFold::kStep * l.K * l.H, v_bytes = OneRowFold::kStep * l.K * l.V;
            const auto at = [&](long step) -> const char* {
                const char* const k = step < 2 * kSteps ? reinterpret_cast<const char*>(run.k) : ahead.k;
                const char* const v = step < 2 * kSteps ? reinterpret_cast<const char*>(run.v) : ahead.v;
                if (!k || step >= 4 * kSteps) return nullptr;
                step %= 2 * kSteps;
                return step < kSteps ? k + step * k_bytes : v + (step - kSteps) * v_bytes;
            };
            const long later = divide_up(kLaterBytes, k_bytes);
            one.fold(run, begin, states_of, [&](long step) { return RowsAhead{at(step + 1), at(step + later)}; });
            continue;
        }
#endif
        for (long head = 0; head < l.K; ++head) {
            for (const float* from : next_scales)
                if (from) fetch(reinterpret_cast<const char*>(from + head * kCodeBlock), kCodeBlock * sizeof(float));
#ifdef __AVX512VNNI__
            if (is_direct) {
                take_scales(run.k_scale - head, head, l.K, end - begin, scales);
                take_scales(run.v_scale - head, head, l.K, end - begin, scales + kCodeBlock);
                fold_direct(tile, states_of(head), spread + head * task.rows * l.H * 4, run, scales, scales + kCodeBlock, l.H,
                            begin, ahead, scratch);
            } else
#endif
            {
                PackedRows rows(packed, l.H, l.V, kCodeBlock);
                rows.add(run, ahead);
                fold_block(form, tile, states_of(head), rows.close(begin), scratch);
            }
            run.k += l.H, run.v += l.V, ++run.k_scale, ++run.v_scale;
            // Each head asks for its part of the next block, which lies in one piece.
            ahead.k += kCodeBlock / 16 * ahead.k_bytes, ahead.v += kCodeBlock / 16 * ahead.v_bytes;
        }
    }
    for (long head = 0; head < l.K; ++head) {
        const RowStates from = states_of(head);
        const SpanState to(p, l, task, head);
        for (long i = 0; i < task.rows; ++i) {
            to.top[i] = from.top[i] + from.shift[i] * kLog2e, to.sum[i] = from.sum[i];
            __builtin_memcpy(to.out + i * from.columns, from.out + i * from.columns, from.columns * sizeof(float));
        }
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
