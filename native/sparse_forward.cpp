// Attention over listed key blocks, forward (HySparse, arXiv 2602.03560, eq. 6-7), with an online softmax.
//
// A task is one key/value head of one sequence and a chunk of its queries, or one query where few queries share blocks;
// in decoding a query's keys are split over the threads and the parts merged. Results do not depend on the threads
// otherwise.

#include "sparse_lists.h"

namespace sateen::SATEEN_ISA {
namespace {

thread_local Scratch scratch, shared_scratch;
thread_local Ints ints;

struct Memory {
    PackedKeys keys;
    TileMemory tile;

    static long size(long H, long V) { return PackedKeys::size(H, V) + TileMemory::size(H, V); }

    Memory(float* at, long H, long V) : keys(at, H, V), tile(at + PackedKeys::size(H, V), H, V) {}
};

// Queries [first, last) by blocks.
void run_chunk(const SparseForward& p, const Place& s, long head, long first, long last) {
    const long group = p.N / p.K, rows = (last - first) * group;
    float* const data = scratch.take(Memory::size(p.H, p.V) + RowStates::size(rows, p.H, p.V));
    Memory memory(data, p.H, p.V);
    RowStates states(data + Memory::size(p.H, p.V), rows, p.H, p.V);
    states.begin(p, head, s.q0 + first, rows);
    visit_blocks(p, s, head, first, last, ints.take(visit_memory(p, s, last - first)),
                 [&](long key, long count, const int* queries, long num_queries) {
        memory.keys.pack(p, head, [&](long i) { return s.k0 + key + i; }, count, false);
        const long all = num_queries * group;
        for (long r = 0; r < all; r += kTileQueries) {
            const long used = all - r < kTileQueries ? all - r : kTileQueries;
            for (long i = 0; i < used; ++i) {
                const long t = queries[(r + i) / group], seen = s.position(t) - key + 1;
                memory.tile.row[i] = (t - first) * group + (r + i) % group;
                memory.tile.limit[i] = int(seen < count ? seen : count);
            }
            memory.tile.gather(states, used);
            tile_scores(memory.keys, memory.tile.q, states.wide_h, used, p.H, memory.tile.scores);
            hide(memory.tile.scores, memory.tile.limit, used, count);
            memory.tile.fold(memory.keys, states, used);
        }
    });
    states.finish(p, head, s.q0 + first, rows, p.out, p.lse);
}

// Keys [begin, end) of `keys` for the rows of one query.
void run_keys(const SparseForward& p, const Place& s, long head, const int* keys, long begin, long end, Memory& memory,
              const RowStates& states) {
    const long group = p.N / p.K;
    for (long at = begin; at < end; at += kTileKeys) {
        const long count = end - at < kTileKeys ? end - at : kTileKeys;
        memory.keys.pack(p, head, [&](long i) { return s.k0 + keys[at + i]; }, count, false);
        const long next = at + kTileKeys, ahead = end - next < kTileKeys ? end - next : kTileKeys;
        prefetch_keys(p, head, [&](long i) { return s.k0 + keys[next + i]; }, ahead);
        for (long r = 0; r < group; r += kTileQueries) {
            const long used = group - r < kTileQueries ? group - r : kTileQueries;
            for (long i = 0; i < used; ++i) memory.tile.row[i] = r + i, memory.tile.limit[i] = int(count);
            memory.tile.gather(states, used);
            tile_scores(memory.keys, memory.tile.q, states.wide_h, used, p.H, memory.tile.scores);
            hide(memory.tile.scores, memory.tile.limit, used, count);
            memory.tile.fold(memory.keys, states, used);
        }
    }
}

// Part `part` of the keys of one query; its states go to `to`, or to the output where there is one part.
void run_query(const SparseForward& p, const Place& s, long head, long t, long part, long parts, float* to) {
    const long group = p.N / p.K;
    float* const data = scratch.take(Memory::size(p.H, p.V) + RowStates::size(group, p.H, p.V));
    Memory memory(data, p.H, p.V);
    RowStates states(to ? to : data + Memory::size(p.H, p.V), group, p.H, p.V);
    states.begin(p, head, s.q0 + t, group);
    int* const keys = ints.take(p.listed * p.block_size);
    const long count = keys_of_query(p, s, head, t, keys), steps = divide_up(count, kTileKeys);
    const long begin = steps * part / parts * kTileKeys, end = steps * (part + 1) / parts * kTileKeys;
    run_keys(p, s, head, keys, begin, end < count ? end : count, memory, states);
    if (!to) states.finish(p, head, s.q0 + t, group, p.out, p.lse);
}

}  // namespace

void sparse_forward(const SparseForward& p) {
    const long group = p.N / p.K, size = chunk_queries(p);
    // Tasks of a sequence: chunks where they go by blocks, else single queries.
    long* const offsets = static_cast<long*>(malloc((p.num_sequences + 1) * sizeof(long)));
    offsets[0] = 0;
    bool has_chunks = false;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Place s(p, i);
        const bool blocks = by_blocks(p, s, s.num_queries < size ? s.num_queries : size);
        has_chunks |= blocks;
        offsets[i + 1] = offsets[i] + (blocks ? divide_up(s.num_queries, size) : s.num_queries) * p.K;
    }
    const long tasks = offsets[p.num_sequences];
    const long state = RowStates::size(group, p.H, p.V), most = divide_up(p.listed * p.block_size, 2 * kTileKeys);
    long parts = !has_chunks && tasks && tasks < p.num_threads ? divide_up(p.num_threads, tasks) : 1;
    if (parts > most) parts = most;
    float* const shared = parts > 1 ? shared_scratch.take(tasks * parts * state) : nullptr;
    const auto find = [&](long number, auto use) {
        long i = 0;
        while (offsets[i + 1] <= number) ++i;
        const Place s(p, i);
        const long local = number - offsets[i], head = local % p.K, at = local / p.K;
        use(s, head, at, by_blocks(p, s, s.num_queries < size ? s.num_queries : size));
    };
#pragma omp parallel for schedule(dynamic, 1) num_threads(p.num_threads) if (p.num_threads > 1)
    for (long i = 0; i < tasks * parts; ++i)
        find(i / parts, [&](const Place& s, long head, long at, bool blocks) {
            if (blocks)
                run_chunk(p, s, head, at * size, (at + 1) * size < s.num_queries ? (at + 1) * size : s.num_queries);
            else
                run_query(p, s, head, at, i % parts, parts, shared ? shared + i * state : nullptr);
        });
    if (shared)
        for (long i = 0; i < tasks; ++i)
            find(i, [&](const Place& s, long head, long t, bool) {
                RowStates states(shared + i * parts * state, group, p.H, p.V);
                for (long part = 1; part < parts; ++part)
                    states.merge(RowStates(shared + (i * parts + part) * state, group, p.H, p.V), group);
                states.finish(p, head, s.q0 + t, group, p.out, p.lse);
            });
    free(offsets);
}

}  // namespace sateen::SATEEN_ISA
