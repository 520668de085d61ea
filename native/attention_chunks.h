// How the backward pass of attention is divided: tasks of about equal work that own whole rows of every gradient.
#pragma once

#include "attention_rows.h"

#include <math.h>
#include <stdlib.h>

namespace sateen::SATEEN_ISA {
namespace {

// One key/value head and row groups [first, last) of one sequence, which see keys [low, high).
struct Task {
    long sequence, head, first, last, low, high;
    bool direct;   // writes the output itself; otherwise its d_k and d_v lie in the buffer at `offset`
    long offset;
};

struct Plan {
    long lanes;          // rows per tile: few where a window makes wide tiles look at keys that most rows cannot see
    long num_tasks, buffer_size;
    long* first_task;    // [num_sequences + 1] tasks of a sequence, by head and then by chunk
    Task* tasks;

    long rows_per_group() const { return lanes * kTiles; }
};

struct Span {
    long low, high;
};

// The keys that rows of these groups see.
Span keys_of(const AttentionShape& p, const Sequence& s, long first_row, long last_row) {
    const long group = p.N / p.K;
    if (last_row <= first_row) return {0, 0};
    const long bottom = s.position(first_row / group), top = s.position((last_row - 1) / group);
    const long low = p.window && bottom >= p.window ? bottom - p.window + 1 : 0;
    return {low, top + 1 > low ? top + 1 : low};
}

inline long least(long a, long b) { return a < b ? a : b; }

long groups_of(const AttentionShape& p, const Plan& plan, const Sequence& s) {
    return divide_up(s.num_queries * (p.N / p.K), plan.rows_per_group());
}

// Scores that row groups [first, last) compute, for one key/value head.
double work_of(const AttentionShape& p, const Plan& plan, const Sequence& s, long first, long last) {
    const long rows = s.num_queries * (p.N / p.K), step = plan.rows_per_group();
    double work = 0;
    for (long i = first; i < last; ++i) {
        const Span keys = keys_of(p, s, i * step, least(rows, (i + 1) * step));
        work += double(keys.high - keys.low) * double(step);
    }
    return work;
}

// The group at which chunk `chunk` of `chunks` equal ones begins.
long cut(const AttentionShape& p, const Plan& plan, const Sequence& s, long chunk, long chunks) {
    const long groups = groups_of(p, plan, s);
    if (chunk == chunks) return groups;
    const double before = work_of(p, plan, s, 0, groups) * double(chunk) / double(chunks);
    long at = 0;
    for (double work = 0; at < groups && work < before; ++at) work += work_of(p, plan, s, at, at + 1);
    return at;
}

// The caller frees `tasks` and `first_task`.
Plan make_plan(const AttentionShape& p) {
    Plan plan{};
    plan.lanes = p.window && p.window < 512 ? 32 : kMaxLanes;
    plan.first_task = static_cast<long*>(malloc((p.num_sequences + 1) * sizeof(long)));
    double total = 0;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Sequence s(p, i);
        total += work_of(p, plan, s, 0, groups_of(p, plan, s));
    }
    plan.first_task[0] = 0;
    for (long i = 0; i < p.num_sequences; ++i) {
        const Sequence s(p, i);
        const long groups = groups_of(p, plan, s);
        long chunks = 1;
        // Four tasks per thread over the whole batch are enough to even out.
        if (p.num_threads > 1 && total > 0)
            chunks = long(ceil(work_of(p, plan, s, 0, groups) / total * 4 * p.num_threads / p.K - 1e-6));
        chunks = least(chunks, groups);
        plan.first_task[i + 1] = plan.first_task[i] + (chunks > 1 ? chunks : 1) * p.K;
    }
    plan.num_tasks = plan.first_task[p.num_sequences];
    plan.tasks = static_cast<Task*>(malloc((plan.num_tasks + 1) * sizeof(Task)));
    for (long i = 0; i < p.num_sequences; ++i) {
        const Sequence s(p, i);
        const long chunks = (plan.first_task[i + 1] - plan.first_task[i]) / p.K, step = plan.rows_per_group();
        for (long j = 0; j < chunks; ++j) {
            const long first = cut(p, plan, s, j, chunks), last = cut(p, plan, s, j + 1, chunks);
            const Span keys = keys_of(p, s, first * step, least(s.num_queries * (p.N / p.K), last * step));
            const bool direct = chunks == 1 && p.H % W == 0 && p.V % W == 0;
            for (long head = 0; head < p.K; ++head) {
                plan.tasks[plan.first_task[i] + head * chunks + j] = {i, head, first, last, keys.low, keys.high, direct,
                                                                      plan.buffer_size};
                if (!direct) plan.buffer_size += (keys.high - keys.low) * (round_up(p.H, W) + round_up(p.V, W));
            }
        }
    }
    return plan;
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
