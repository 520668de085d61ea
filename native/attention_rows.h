// How queries become vector lanes, for both directions of attention.
//
// All query heads that share a key/value head are rows of one matrix: row r of a sequence is query r / G of head
// r % G, so decoding with grouped queries fills lanes and a causal block spans few positions. Scores are kept
// transposed, keys by rows: the softmax then works down the lanes and needs no sums across them.
#pragma once

#include "attention.h"
#include "simd.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kMaxLanes = 64;  // rows of the widest tile
constexpr long kKeys = 64;      // keys per block
constexpr long kTiles = 4;      // tiles of one task; they share each block of keys while it is in the cache

struct Sequence {
    long q0, k0, num_queries, num_keys;

    Sequence(const AttentionShape& p, long i)
        : q0(p.cu_q[i]), k0(p.cu_k[i]), num_queries(p.cu_q[i + 1] - q0), num_keys(p.cu_k[i + 1] - k0) {}

    // Position among the keys of query t: the last query stands at the last key. May be negative.
    long position(long t) const { return t + num_keys - num_queries; }
};

// Rows [first, last) of one sequence and key/value head, and the keys [low, high) that some of them see.
struct Tile {
    long first, last, low, high;
    int newest[kMaxLanes], oldest[kMaxLanes];  // per lane, the visible keys are oldest..newest; idle lanes see none
    long all_above, all_below;                 // keys in [all_above, all_below) are seen by every row

    void place(const AttentionShape& p, const Sequence& s, long begin, long end, long lanes) {
        const long group = p.N / p.K;
        first = begin;
        last = end;
        for (long i = 0; i < lanes; ++i) {
            const bool used = first + i < last;
            const long position = used ? s.position((first + i) / group) : -1;
            newest[i] = int(position);
            oldest[i] = p.window && position >= p.window ? int(position - p.window + 1) : 0;
        }
        const long top = s.position((last - 1) / group), bottom = s.position(first / group);
        high = top + 1 > 0 ? top + 1 : 0;
        low = p.window && bottom >= p.window ? bottom - p.window + 1 : 0;
        all_above = p.window && top >= p.window ? top - p.window + 1 : 0;
        all_below = bottom + 1;
    }

    // Whether some row does not see some key of [begin, end).
    bool masked(long begin, long end) const { return begin < all_above || end > all_below; }
};

// target[h * lanes + i] = factor * row i's channel h; idle lanes become zero. `row(i)` is null past the last row.
template <typename RowAt>
inline void pack_transposed(RowAt row, long channels, float factor, float* target, long lanes, long used) {
    for (long i = 0; i < round_up(used, W); i += W)
        for (long h = 0; h < channels; h += W) {
            const long count = channels - h < W ? channels - h : W;
            vfloat block[W];
            for (int j = 0; j < W; ++j) {
                const float* from = i + j < used ? row(i + j) : nullptr;
                block[j] = !from ? vfloat{} : count == W ? load(from + h) : load_some(from + h, count);
            }
            transpose(block);
            for (int j = 0; j < count; ++j) store(target + (h + j) * lanes + i, block[j] * factor);
        }
}

SATEEN_INLINE vint visible(const Tile& t, long lane, long key) {
    const vint s = splat_int(int(key));
    return (s <= load_int(t.newest + lane)) & (s >= load_int(t.oldest + lane));
}

inline long divide_up(long a, long b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace sateen::SATEEN_ISA
