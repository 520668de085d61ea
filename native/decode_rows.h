// Where the rows of a decode step's caches lie, and what its attention carries from block to block.
#pragma once

#include "attention_rows.h"
#include "decode.h"
#include "numbers.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kPad = 16;

inline long padded(long channels) { return round_up(channels, kPad); }

// What the online softmax of one task and key/value head carries.
struct SpanState {
    float *top, *sum, *out;  // [rows], [rows], [rows, padded V]

    SpanState(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task, long head) {
        const Span& span = p.spans[l.span];
        top = p.states + (head * span.state_rows + task.state) * (padded(l.V) + 2);
        sum = top + task.rows;
        out = sum + task.rows;
    }
};

// What the online softmax of some rows carries, the numbers of W rows in a vector, and of their present block what they
// need to be raised.
struct SoftRows {
    vfloat *most, *total;              // by lanes: maxima of the block's scores, sums of its weights
    float *top, *sum, *base, *shrink;  // base: top, or 0 without a key; shrink: what the blocks before count now

    static long size(long rows) { return round_up(rows, W) * (2 * W + 4); }

    SoftRows(long rows, float* at) {
        const long all = round_up(rows, W);
        most = reinterpret_cast<vfloat*>(at), total = most + all;
        top = at + 2 * W * all, sum = top + all, base = sum + all, shrink = base + all;
        for (long i = 0; i < all; ++i) top[i] = -kInf, sum[i] = 0.0f, most[i] = total[i] = vfloat{};
    }

    // Rows [first, last) once `most` is there, and once `total` is.
    void raise(long first, long last) const {
        for (long i = first; i < last; i += W) {
            const vfloat before = load(top + i), now = maximum(max_each(most + i), before);
            const vfloat from = now == splat(-kInf) ? vfloat{} : now;
            store(top + i, now), store(base + i, from), store(shrink + i, exp2_fast(before - from));
        }
    }

    void add(long first, long last) const {
        for (long i = first; i < last; i += W) store(sum + i, load(sum + i) * load(shrink + i) + sum_each(total + i));
    }
};

inline long cache_row(const DecodeStep& p, const DecodeLayer& l, long b, long position) {
    const long ring = l.cache.ring_rows;
    if (ring) return p.slot[b] * ring + position % ring;
    return p.page_rows[p.first_page[b] + position / p.page] + position % p.page;
}

// What is asked for while rows are read: those at the same place of a later step, and once more those of a step between,
// since a processor leaves out what it is asked for beyond what it can keep. Its own prefetching does not foresee rows of
// which some heads at a time are read.
struct LaterRows {
    static constexpr long kBytes = 8192;  // from one to the other
    const char *first, *again;

    // `bytes` are those of a token's row in `rows`, whose token `position` stands at `here`.
    LaterRows(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task, const void* rows, long bytes, long position,
              const void* here) {
        const long tokens = round_up((kBytes + bytes - 1) / bytes, 16);
        const auto at = [&](long later) {
            return later < task.to ? static_cast<const char*>(rows) + cache_row(p, l, task.sequence, later) * bytes
                                   : static_cast<const char*>(here);
        };
        first = at(position + 2 * tokens), again = at(position + tokens);
    }

    // The next 256 bytes.
    SATEEN_INLINE void ask() {
#pragma GCC unroll 4
        for (int i = 0; i < 256; i += 64) __builtin_prefetch(first + i, 0, 2), __builtin_prefetch(again + i, 0, 2);
        first += 256, again += 256;
    }
};

// What is asked for while a block's keys from number s on are read, for any s: the block's first key is at place `begin`
// of the sequence and at `here`.
template <typename T>
SATEEN_INLINE auto later_rows(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task, const void* rows, long channels,
                              long begin, const T* here) {
    return [=, &p, &l, &task](long s) {
        const long row = l.K * channels;
        return LaterRows(p, l, task, rows, row * sizeof(T), begin + s, here + s * row);
    };
}

// Reads what will be used at once, in the order of memory.
inline void touch(const void* from, long bytes) {
    const volatile char* at = static_cast<const volatile char*>(from);
#pragma GCC unroll 8
    for (long i = 0; i < bytes; i += 64) (void)at[i];
}

// The keys that a task's rows see, counted from the sequence's first.
inline Tile tile_of(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task) {
    const Span& span = p.spans[l.span];
    Tile tile;
    tile.first = 0, tile.last = task.rows;
    for (long i = 0; i < task.rows; ++i) {
        const long position = p.start[task.sequence] + (task.first + i) / span.group;
        tile.newest[i] = int(position);
        tile.oldest[i] = span.window && position >= span.window ? int(position - span.window + 1) : 0;
    }
    return tile;
}

// A row of a task's queries for one key/value head.
inline const float* query_of(const DecodeStep& p, const DecodeLayer& l, const SpanTask& task, long head, long i) {
    const long group = l.N / l.K, row = task.first + i, t = p.first_token[task.sequence] + row / group;
    return p.qr + (t * l.N + head * group + row % group) * padded(l.H);
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
