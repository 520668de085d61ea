// INT8 attention over float tensors: keys and values are quantised and packed once per key/value head, queries by tile.
//
// One parallel region: statistics of each sequence and head (key means, value scales), then packing by stripes of 64 keys,
// then tiles of query rows.

#include "int8_attention.h"
#include "int8_block.h"

#include <stdlib.h>

namespace sateen::SATEEN_ISA {
namespace {

// Where each sequence's packed keys and values lie. All heads of a sequence have its stripes one after another.
struct Packed {
    long *first_stripe, *first_task;  // [num_sequences + 1], of one head; of all heads
    long H4, V16;                     // channels in whole quads, and in whole vectors of any level
    byte* k;
    float *k_scale, *k_mean, *v_scale, *v_float;
    code* v;

    long stripe(const Int8Attention& p, long sequence, long head) const {
        return first_stripe[sequence] * p.K + head * (first_stripe[sequence + 1] - first_stripe[sequence]);
    }
};

thread_local Scratch packed_scratch, state_scratch, row_scratch;

Packed allocate(const Int8Attention& p) {
    Packed w{};
    const long B = p.num_sequences;
    w.first_stripe = static_cast<long*>(malloc(2 * (B + 1) * sizeof(long)));
    w.first_task = w.first_stripe + B + 1;
    w.first_stripe[0] = w.first_task[0] = 0;
    for (long i = 0; i < B; ++i) {
        const Sequence s(p, i);
        w.first_stripe[i + 1] = w.first_stripe[i] + (s.num_queries ? divide_up(s.num_keys, kStripe) : 0);
        w.first_task[i + 1] = w.first_task[i] + divide_up(s.num_queries * (p.N / p.K), kRows) * p.K;
    }
    w.H4 = whole(p.H, 4), w.V16 = whole(p.V, 16);
    const long keys = w.first_stripe[B] * p.K * kStripe, H = whole(p.H, 16);
    const long value_bytes = keys * w.V16 * (p.float_values ? 4 : 1);
    float* at = packed_scratch.take(keys * w.H4 / 4 + keys + value_bytes / 4 + B * p.K * (H + w.V16));
    w.k = reinterpret_cast<byte*>(at), at += keys * w.H4 / 4;
    w.v_float = at, w.v = reinterpret_cast<code*>(at), at += value_bytes / 4;
    w.k_scale = at, at += keys;
    w.k_mean = at, w.v_scale = at + B * p.K * H;
    return w;
}

// The mean of a head's keys and the scales of its values.
void statistics(const Int8Attention& p, const Packed& w, long sequence, long head) {
    const Sequence s(p, sequence);
    const long unit = sequence * p.K + head, H = whole(p.H, 16);
    float *const mean = w.k_mean + unit * H, *const scale = w.v_scale + unit * w.V16;
    const auto add_up = [&](const Rows& rows, long channels, float* to, auto join) {
        for (long c = 0; c < channels; c += W) {
            vfloat total{};
            for (long begin = 0; begin < s.num_keys; begin += 256) {  // partial sums keep a long sum exact enough
                vfloat part{};
                const long end = begin + 256 < s.num_keys ? begin + 256 : s.num_keys;
                for (long t = begin; t < end; ++t) part = join(part, load_up_to(rows.at(s.k0 + t, head) + c, channels - c));
                total = join(total, part);
            }
            store(to + c, total);
        }
    };
    if (p.smooth_k) {
        add_up(p.k, p.H, mean, [](vfloat a, vfloat b) { return a + b; });
        for (long c = 0; c < p.H; ++c) mean[c] /= float(s.num_keys);
    }
    if (p.float_values) return;
    for (long c = 0; c < w.V16; ++c) scale[c] = 0.0f;
    add_up(p.v, p.V, scale, [](vfloat a, vfloat b) { return larger_size(a, size_of(b)); });
    if (!p.scale_per_channel) {
        vfloat most{};
        for (long c = 0; c < w.V16; c += W) most = larger_size(most, load(scale + c));
        for (long c = 0; c < w.V16; c += W) store(scale + c, splat(largest_lane(most)));
    }
    for (long c = 0; c < w.V16; ++c) scale[c] /= kCodes;
}

void pack_stripe(const Int8Attention& p, const Packed& w, long sequence, long head, long number) {
    const Sequence s(p, sequence);
    const long unit = sequence * p.K + head, H = whole(p.H, 16), stripe = w.stripe(p, sequence, head) + number;
    const long first = number * kStripe, count = s.num_keys - first < kStripe ? s.num_keys - first : kStripe;
    code* const rows = reinterpret_cast<code*>(row_scratch.take(kStripe * (H > w.V16 ? H : w.V16) / 4));
    float* const k_scale = w.k_scale + stripe * kStripe;
    const float* const mean = p.smooth_k ? w.k_mean + unit * H : nullptr;
    for (long i = 0; i < kStripe; ++i)
        k_scale[i] = i < count ? quantize_row(p.k.at(s.k0 + first + i, head), mean, p.H, 1.0f, rows + i * H).scale : 0.0f;
    pack_keys(rows, H, count, p.H, w.k + stripe * kStripe * w.H4, 0);
    if (p.float_values) {
        float* const to = w.v_float + stripe * kStripe * w.V16;
        for (long i = 0; i < count; ++i)
            for (long c = 0; c < w.V16; ++c) to[i * w.V16 + c] = c < p.V ? p.v.at(s.k0 + first + i, head)[c] : 0.0f;
        return;
    }
    const float* const v_scale = w.v_scale + unit * w.V16;
    for (long i = 0; i < count; ++i)
        for (long c = 0; c < p.V; c += W) {
            const vfloat scale = load(v_scale + c);
            write_codes(load_up_to(p.v.at(s.k0 + first + i, head) + c, p.V - c), scale == vfloat{} ? splat(1.0f) : scale,
                        rows + i * w.V16 + c);
        }
    pack_values(rows, w.V16, count, p.V, w.v + stripe * kStripe * w.V16, w.V16);
}

// Tasks are numbered from the last rows of a sequence to its first, the longest causal rows first.
void attend(const Int8Attention& p, const Packed& w, long number) {
    long sequence = 0;
    while (w.first_task[sequence + 1] <= number) ++sequence;
    const Sequence s(p, sequence);
    const long tiles = (w.first_task[sequence + 1] - w.first_task[sequence]) / p.K, local = number - w.first_task[sequence];
    const long head = local % p.K, row = (tiles - 1 - local / p.K) * kRows, group = p.N / p.K, end = s.num_queries * group;
    const long unit = sequence * p.K + head;
    Tile tile;
    tile.place(p, s, row, row + kRows < end ? row + kRows : end, kRows);
    if (!p.is_causal) {
        for (long i = 0; i < kRows; ++i) tile.newest[i] = int(s.num_keys - 1), tile.oldest[i] = 0;
        tile.low = 0, tile.high = s.num_keys;
    }
    static_assert(sizeof(BlockScratch) % sizeof(float) == 0);
    float* const memory = state_scratch.take(RowStates::size(p.H, p.V) + sizeof(BlockScratch) / sizeof(float));
    BlockScratch& scratch = *reinterpret_cast<BlockScratch*>(memory);
    RowStates states(memory + sizeof(BlockScratch) / sizeof(float), p.H, p.V);
    const auto query = [&](long i) { return p.q.at(s.q0 + (row + i) / group, head * group + (row + i) % group); };
    states.begin(query, tile.last - tile.first, p.H, p.scale, p.smooth_k && s.num_keys ? w.k_mean + unit * whole(p.H, 16) : nullptr);
    const Form form{float(p.levels), p.sum_codes, w.H4 / 4};
    for (long first = tile.low / p.block * p.block; first < tile.high; first += p.block) {
        const long stripe = w.stripe(p, sequence, head) + first / kStripe;
        KeyBlock block{};
        block.k = w.k + stripe * kStripe * w.H4, block.k_scale = w.k_scale + stripe * kStripe;
        if (p.float_values) block.v_float = w.v_float + stripe * kStripe * w.V16;
        else block.v = w.v + stripe * kStripe * w.V16;
        block.first = first, block.count = s.num_keys - first < p.block ? s.num_keys - first : p.block;
        fold_block(form, tile, states, block, scratch);
    }
    if (p.float_values) finish(p, s, tile, states, head, nullptr, 1.0f);
    else finish(p, s, tile, states, head, w.v_scale + unit * w.V16, form.levels);
}

}  // namespace

void int8_attention(const Int8Attention& p) {
    const Packed w = allocate(p);
    const long stripes = w.first_stripe[p.num_sequences] * p.K, tasks = w.first_task[p.num_sequences];
#pragma omp parallel num_threads(p.num_threads) if (p.num_threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (long unit = 0; unit < p.num_sequences * p.K; ++unit)
            if (w.first_stripe[unit / p.K + 1] > w.first_stripe[unit / p.K]) statistics(p, w, unit / p.K, unit % p.K);
#pragma omp for schedule(dynamic, 4)
        for (long i = 0; i < stripes; ++i) {
            long sequence = 0;
            while (w.first_stripe[sequence + 1] * p.K <= i) ++sequence;
            const long local = i - w.first_stripe[sequence] * p.K;
            const long each = w.first_stripe[sequence + 1] - w.first_stripe[sequence];
            pack_stripe(p, w, sequence, local / each, local % each);
        }
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < tasks; ++i) attend(p, w, i);
    }
    free(w.first_stripe);
}

void int8_products(const Int8Products& p) {
    const long L4 = whole(p.L, 4), S16 = whole(p.S, 16), stripes = divide_up(p.queries ? p.S : p.L, kStripe);
    byte* const packed = reinterpret_cast<byte*>(packed_scratch.take(stripes * kStripe * (p.queries ? L4 : S16) / 4 + 64));
    byte* const row = reinterpret_cast<byte*>(row_scratch.take(L4 / 4 + 16));
    for (long i = 0; i < p.M; ++i) {
        int* const out = p.out + i * p.S;
        for (long c = 0; c < L4; ++c) row[c] = c < p.L ? p.queries ? byte(p.queries[i * p.L + c]) : p.shares[i * p.L + c] : 0;
        if (!p.queries) {
            pack_values(p.b, p.S, p.L, p.S, reinterpret_cast<code*>(packed), S16);
            multiply_values<1>(reinterpret_cast<code*>(packed), S16, L4 / 4, row, L4, [&](int, long column, vint sum) {
                for (int j = 0; j < W && column + j < p.S; ++j) out[column + j] = sum[j];
            });
            continue;
        }
        int start = 0;
        for (long c = 0; c < p.L; ++c) start -= 128 * p.queries[i * p.L + c];
        for (long s = 0; s < p.S; s += kStripe) {
            pack_keys(p.b + s * p.L, p.L, p.S - s < kStripe ? p.S - s : kStripe, p.L, packed, 0);
            multiply_keys<1>(packed, L4 / 4, reinterpret_cast<code*>(row), L4, &start, [&](int, long key, vint sum) {
                for (int j = 0; j < W && s + key + j < p.S; ++j) out[s + key + j] = sum[j];
            });
        }
    }
}

}  // namespace sateen::SATEEN_ISA
