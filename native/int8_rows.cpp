// INT8 attention over the rows of a cache. A task is up to kRows query rows of one sequence and all its key/value heads:
// the heads of a row lie side by side, and a block of rows is read from memory as a whole.

#include "int8_attention.h"
#include "int8_rows.h"

#include <stdlib.h>

namespace sateen::SATEEN_ISA {
namespace {

constexpr Form kForm{255.0f, false, 0};

struct RowsTask {
    long sequence, first_row;
};

RowsTask find_task(const long* offsets, long number) {
    long i = 0;
    while (offsets[i + 1] <= number) ++i;
    return {i, (offsets[i + 1] - 1 - number) * kRows};
}

Tile tile_of(const Int8RowsAttention& p, const Sequence& s, const RowsTask& task) {
    const long end = s.num_queries * (p.N / p.K);
    Tile tile;
    tile.place(p, s, task.first_row, task.first_row + kRows < end ? task.first_row + kRows : end, kRows);
    return tile;
}

thread_local Scratch block_scratch, state_scratch;

// Folds one part of the task's keys, cut at whole blocks, into the states of all heads.
void run_part(const Int8RowsAttention& p, const RowsTask& task, long part, long parts, float* states) {
    const Sequence s(p, task.sequence);
    const Tile tile = tile_of(p, s, task);
    const long used = tile.last - tile.first, group = p.N / p.K, size = RowStates::size(p.H, p.V);
    for (long head = 0; head < p.K; ++head) {
        const auto query = [&](long i) {
            const long row = task.first_row + i;
            return p.q.at(s.q0 + row / group, head * group + row % group);
        };
        RowStates(states + head * size, p.H, p.V)
            .begin(query, used, p.H, p.scale, p.k_mean + (task.sequence * p.K + head) * p.H);
    }
    const long begin = tile.low / p.block, blocks = tile.high > tile.low ? divide_up(tile.high, p.block) - begin : 0;
    float* const memory = block_scratch.take(sizeof(BlockScratch) / sizeof(float) + PackedRows::size(p.H, p.V, p.block));
    Form form = kForm;
    form.quads = whole(p.H, 4) / 4;
    for (long i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i) {
        const long first = (begin + i) * p.block, count = tile.high - first < p.block ? tile.high - first : p.block;
        const long left = tile.high - first - count, next = left < p.block ? left : p.block, row = s.k0 + first;
        for (long head = 0; head < p.K; ++head) {
            // Each head asks for its part of the next block's rows, which lie one after another.
            const long skip = next * head / p.K, turn = left ? 16 : 0, later = (row + count) * p.K;
            const Ahead ahead{reinterpret_cast<const char*>(p.k_codes + (later + skip * p.K) * p.H),
                              reinterpret_cast<const char*>(p.v_codes + (later + skip * p.K) * p.V), turn * p.H, turn * p.V};
            const long at = row * p.K + head;
            PackedRows rows(memory + sizeof(BlockScratch) / sizeof(float), p.H, p.V, p.block);
            rows.add({p.k_codes + at * p.H, p.v_codes + at * p.V, p.k_scale + at, p.v_scale + at, p.K * p.H, p.K * p.V, p.K, count}, ahead);
            fold_block(form, tile, RowStates(states + head * size, p.H, p.V), rows.close(first),
                       *reinterpret_cast<BlockScratch*>(memory));
        }
    }
}

void finish_task(const Int8RowsAttention& p, const RowsTask& task, long parts, float* states) {
    const Sequence s(p, task.sequence);
    const Tile tile = tile_of(p, s, task);
    const long size = RowStates::size(p.H, p.V);
    for (long head = 0; head < p.K; ++head) {
        const RowStates into(states + head * size, p.H, p.V);
        for (long part = 1; part < parts; ++part)
            merge(into, RowStates(states + (part * p.K + head) * size, p.H, p.V), tile.last - tile.first);
        finish(p, s, tile, into, head, nullptr, 1.0f);
    }
}

}  // namespace

void int8_rows_attention(const Int8RowsAttention& p) {
    long* const offsets = static_cast<long*>(malloc((p.num_sequences + 1) * sizeof(long)));
    offsets[0] = 0;
    long longest = 0;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Sequence s(p, i);
        offsets[i + 1] = offsets[i] + divide_up(s.num_queries * (p.N / p.K), kRows);
        if (s.num_queries && s.num_keys > longest) longest = s.num_keys;
    }
    const long tasks = offsets[p.num_sequences], size = p.K * RowStates::size(p.H, p.V), blocks = divide_up(longest, p.block);
    // Two parts per thread even out where there are fewer tasks than threads.
    long parts = tasks && tasks < p.num_threads ? divide_up(2 * p.num_threads, tasks) : 1;
    if (parts > blocks) parts = blocks ? blocks : 1;
    float* const shared = parts > 1 ? state_scratch.take(tasks * parts * size) : nullptr;
#pragma omp parallel num_threads(p.num_threads) if (p.num_threads > 1 && tasks * parts > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < tasks * parts; ++i) {
            float* const states = shared ? shared + i * size : state_scratch.take(size);
            const RowsTask task = find_task(offsets, i / parts);
            run_part(p, task, i % parts, parts, states);
            if (parts == 1) finish_task(p, task, 1, states);
        }
        if (parts > 1) {
#pragma omp for schedule(dynamic, 1)
            for (long i = 0; i < tasks; ++i) finish_task(p, find_task(offsets, i), parts, shared + i * parts * size);
        }
    }
    free(offsets);
}

}  // namespace sateen::SATEEN_ISA
