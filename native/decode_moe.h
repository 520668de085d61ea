// The mixture of experts of a decode step: tokens are grouped by expert, so that each expert's weights are read once.
//
// A slot is one token at one of its experts; slots are numbered expert by expert, tokens in order within each.
#pragma once

#include "decode_linear.h"

namespace sateen::SATEEN_ISA {
namespace {

// The active experts of a step, in DecodeScratch::groups.
struct Groups {
    int *count, *expert, *first;  // [1], [min(E, T A)], and one more: the slots of group i are first[i] .. first[i + 1]

    Groups(const DecodeStep& p, const Experts& e) : count(p.groups), expert(count + 1), first(expert + e.E) {}
};

// The best experts of token t, best first, equal ones by their number, and the weights of their outputs.
void choose_experts(const DecodeStep& p, const Experts& e, long t) {
    float *const scores = p.scores + t * e.E, *const shares = p.shares + t * e.A;
    int* const chosen = p.routes + e.routes * p.T + t * e.A;
    for (long i = 0; i < e.E; ++i) scores[i] = 1.0f / (1.0f + expf(-scores[i]));
    float sum = 0.0f;
    for (long a = 0; a < e.A; ++a) {
        long best = -1;
        for (long i = 0; i < e.E; ++i) {
            bool taken = false;
            for (long before = 0; before < a; ++before) taken |= chosen[before] == i;
            if (!taken && (best < 0 || scores[i] + e.bias[i] > scores[best] + e.bias[best])) best = i;
        }
        chosen[a] = int(best);
        shares[a] = scores[best];
        sum += shares[a];
    }
    for (long a = 0; a < e.A; ++a) shares[a] *= e.scaling / (e.normalised ? sum + 1e-20f : 1.0f);
}

// Numbers the slots: `slots[t A + a]` is the slot, `slots[T A + slot]` its token.
void group_slots(const DecodeStep& p, const Experts& e) {
    const int* const chosen = p.routes + e.routes * p.T;
    Groups groups(p, e);
    long count = 0, slot = 0;
    for (long expert = 0; expert < e.E; ++expert) {
        const long before = slot;
        for (long i = 0; i < p.T * e.A; ++i)
            if (chosen[i] == expert) {
                p.slots[p.T * e.A + slot] = int(i / e.A);
                p.slots[i] = int(slot++);
            }
        if (slot == before) continue;
        groups.expert[count] = int(expert);
        groups.first[count++] = int(before);
    }
    groups.first[count] = int(slot);
    *groups.count = int(count);
}

Linear of_expert(const Linear& first, long expert) {
    const LinearBytes bytes = linear_bytes(first.format, first.rows, first.columns);
    Linear linear = first;
    linear.weight = static_cast<const char*>(first.weight) + expert * bytes.weight;
    if (first.scales) linear.scales = static_cast<const char*>(first.scales) + expert * bytes.scales;
    return linear;
}

const void* prepared_slot(const DecodeStep& p, const Linear& linear, long slot) {
    return static_cast<const char*>(p.prepared) + slot * linear_scratch_bytes(linear.format, linear.columns, 1);
}

// work(expert, first slot, slots, first row, last row) for the rows of every active expert, shared out.
template <typename Work>
void share_experts(const DecodeStep& p, const DecodeLayer& l, Team& team, const Linear& linear, Work work) {
    const Groups groups(p, l.experts);
    const Shares shares(linear, num_panels(linear), team.size);
    const long units = shares.count();
    team.share(*groups.count * units, [&](long unit) {
        const long group = unit / units, slot = groups.first[group];
        const auto [first, last] = rows_of(linear, shares.panels(unit % units));
        work(groups.expert[group], slot, groups.first[group + 1] - slot, first, last);
    });
}

// From the normed tokens to y [T, D].
void mixture(const DecodeStep& p, const DecodeLayer& l, Team& team) {
    const Experts& e = l.experts;
    const long slots = p.T * e.A;
    multiply_all<1>(team, p.prepared, p.T, {{&e.router, p.scores}});
    team.share(p.T, [&](long t) { choose_experts(p, e, t); });
    team.share(1, [&](long) { group_slots(p, e); });
    team.share(slots, [&](long slot) {
        linear_prepare(l.gate.format, p.normed + p.slots[slots + slot] * p.D, 0, p.D, slot, slot + 1, p.prepared);
    });
    share_experts(p, l, team, l.gate, [&](long expert, long slot, long count, long first, long last) {
        const void* const prepared = prepared_slot(p, l.gate, slot);
        linear_multiply(of_expert(l.gate, expert), prepared, count, first, last, p.gate + slot * l.F, l.F);
        linear_multiply(of_expert(l.up, expert), prepared, count, first, last, p.up + slot * l.F, l.F);
        for (long i = slot; i < slot + count; ++i) swiglu(p.gate + i * l.F + first, p.up + i * l.F + first, last - first);
    });
    team.share(slots, [&](long slot) { prepare(l.down, p.gate, slot, p.prepared); });
    share_experts(p, l, team, l.down, [&](long expert, long slot, long count, long first, long last) {
        const void* const prepared = prepared_slot(p, l.down, slot);
        linear_multiply(of_expert(l.down, expert), prepared, count, first, last, p.expert_y + slot * p.D, p.D);
    });
    team.share(p.T, [&](long t) {
        float* const y = p.y + t * p.D;
        for (long a = 0; a < e.A; ++a) {
            const float* const from = p.expert_y + p.slots[t * e.A + a] * p.D;
            const float share = p.shares[t * e.A + a];
            for (long i = 0; i < p.D; ++i) y[i] = (a ? y[i] : 0.0f) + share * from[i];
        }
    });
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
