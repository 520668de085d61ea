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

constexpr long kLaterBytes = 12288;  // how far ahead of what is read in the order of memory

// Bytes that will be read soon, and others later; null for none. What is read soon is touched, which a processor does not
// leave out as it does prefetches beyond those it can keep, and which its own prefetching follows.
struct RowsAhead {
    const char *soon, *later;

    // Number `part` of parts of `bytes`.
    SATEEN_INLINE void ask(long part, long bytes) const {
#pragma GCC unroll 1
        for (long i = part * bytes; i < (part + 1) * bytes; i += 64) {
            if (later) __builtin_prefetch(later + i, 0, 2);
            if (soon) (void)*static_cast<const volatile char*>(soon + i);
        }
    }
};

inline long cache_row(const DecodeStep& p, const DecodeLayer& l, long b, long position) {
    const long ring = l.cache.ring_rows;
    if (ring) return p.slot[b] * ring + position % ring;
    return p.page_rows[p.first_page[b] + position / p.page] + position % p.page;
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
