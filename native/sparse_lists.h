// Which queries meet which keys. A chunk of queries is walked by blocks, so that a block's keys are packed once for all
// queries that list it; where few queries share a block, or blocks are small, each query's keys are gathered instead.
#pragma once

#include "sparse_tile.h"

#include <stdlib.h>

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kChunkRows = 1024;  // query rows of a chunk: their states stay in the second cache
constexpr long kSmallBlock = 8;    // blocks of fewer keys are always gathered

struct Ints {
    int* data = nullptr;
    long capacity = 0;

    ~Ints() { free(data); }

    int* take(long count) {
        if (count > capacity) {
            free(data);
            capacity = round_up(count, 1024);
            data = static_cast<int*>(malloc(capacity * sizeof(int)));
            if (!data) abort();
        }
        return data;
    }
};

// The queries of one sequence that are worked on together.
inline long chunk_queries(const SparseShape& p) {
    const long group = p.N / p.K;
    return kChunkRows > group ? kChunkRows / group : 1;
}

// Whether a chunk of so many queries goes by blocks.
inline bool by_blocks(const SparseShape& p, const Place& s, long queries) {
    const long blocks = divide_up(s.num_keys, p.block_size);
    return p.block_size >= kSmallBlock && queries * p.listed >= 2 * blocks;
}

inline const int* list_of(const SparseShape& p, long head, long token) { return p.lists + (head * p.T + token) * p.listed; }

// tile(keys, count, query, queries): `count` <= kTileKeys keys of the sequence in ascending runs, and the queries that list
// them, counted from the sequence's first. `key0` is the first key where they are consecutive, else -1: then every key
// is visible to the query.
template <typename Visit>
void visit_blocks(const SparseShape& p, const Place& s, long head, long first, long last, int* memory, Visit visit) {
    const long blocks = divide_up(s.num_keys, p.block_size);
    int *const from = memory, *const queries = from + blocks + 2;
    memset(from, 0, (blocks + 2) * sizeof(int));
    const auto listed = [&](long t, auto use) {
        const int* const list = list_of(p, head, s.q0 + t);
        const long position = s.position(t);
        for (long i = 0; i < p.listed; ++i)
            if (list[i] >= 0 && list[i] * p.block_size <= position) use(list[i]);
    };
    for (long t = first; t < last; ++t) listed(t, [&](int block) { ++from[block + 2]; });
    for (long b = 0; b < blocks; ++b) from[b + 2] += from[b + 1];
    for (long t = first; t < last; ++t) listed(t, [&](int block) { queries[from[block + 1]++] = int(t); });
    for (long b = 0; b < blocks; ++b) {
        if (from[b] == from[b + 1]) continue;
        const long end = (b + 1) * p.block_size < s.num_keys ? (b + 1) * p.block_size : s.num_keys;
        for (long key = b * p.block_size; key < end; key += kTileKeys)
            visit(key, end - key < kTileKeys ? end - key : kTileKeys, queries + from[b], from[b + 1] - from[b]);
    }
}

inline long visit_memory(const SparseShape& p, const Place& s, long queries) {
    return divide_up(s.num_keys, p.block_size) + 2 + queries * p.listed;
}

// The visible keys of one query's list; returns their number.
inline long keys_of_query(const SparseShape& p, const Place& s, long head, long t, int* keys) {
    const int* const list = list_of(p, head, s.q0 + t);
    const long position = s.position(t);
    long count = 0;
    for (long i = 0; i < p.listed; ++i) {
        if (list[i] < 0) continue;
        const long begin = list[i] * p.block_size, end = begin + p.block_size - 1 < position ? begin + p.block_size - 1 : position;
        for (long key = begin; key <= end; ++key) keys[count++] = int(key);
    }
    return count;
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
