// A decode step as a team of threads takes it: phases over tokens (norms, rotation, joins) and over rows of weights, one
// after another in every layer, and the products between them by linear.h. Float32 between the products.

#include "decode_attention.h"
#include "decode_linear.h"
#include "decode_moe.h"
#include "decode_sparse.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace sateen::SATEEN_ISA {
namespace {

void normalise(const float* x, const float* weight, long count, float eps, float* y) {
    vfloat sum{};
    long i = 0;
    for (; i + W <= count; i += W) sum += load(x + i) * load(x + i);
    float squares = sum_lanes(sum);
    for (; i < count; ++i) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(squares / float(count) + eps);
    for (i = 0; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

// One head's norm, if any, and rotation; channels behind the rotated ones pass through.
void rotate(const float* x, const float* norm, float eps, long channels, const Angles& angles, long t, float* y) {
    if (norm) normalise(x, norm, channels, eps, y);
    else __builtin_memcpy(y, x, channels * sizeof(float));
    const float *const cos = angles.cos + t * angles.half, *const sin = angles.sin + t * angles.half;
    for (long i = 0; i < angles.half; ++i) {
        const float a = y[i], b = y[i + angles.half];
        y[i] = a * cos[i] - b * sin[i];
        y[i + angles.half] = b * cos[i] + a * sin[i];
    }
}

// From the projections of token t to rotated queries, times scale * log2(e), and to what the cache keeps of its row.
void place_heads(const DecodeStep& p, const DecodeLayer& l, long t) {
    const long H = padded(l.H), V = padded(l.V);
    const Angles& angles = p.angles[l.angles];
    const float scale = kLog2e / sqrtf(float(l.H));
    const auto place_queries = [&](const Angles& turn, float* to) {
        for (long n = 0; n < l.N; ++n) {
            float* const q = to + (t * l.N + n) * H;
            rotate(p.q + (t * l.N + n) * l.H, l.q_norm, p.eps, l.H, turn, t, q);
            for (long h = 0; h < l.H; ++h) q[h] *= scale;
            for (long h = l.H; h < H; ++h) q[h] = 0.0f;
        }
    };
    if (l.sparse.source && listed_queries(p, l) != p.qr) place_queries(p.angles[l.sparse.angles], p.listed_q);
    if (!has_own_rows(l)) return;
    place_queries(angles, p.qr);
    for (long head = 0; head < l.K; ++head) {
        float *const k = p.kr + (t * l.K + head) * H, *const v = p.vr + (t * l.K + head) * V;
        rotate(p.k + (t * l.K + head) * l.H, l.k_norm, p.eps, l.H, angles, t, k);
        round_as(l.cache.format, k, l.H);
        for (long h = l.H; h < H; ++h) k[h] = 0.0f;
        const float* const from = p.v + (t * l.K + head) * l.V;
        for (long c = 0; c < V; ++c) v[c] = c < l.V ? from[c] * l.value_scale : 0.0f;
        round_as(l.cache.format, v, l.V);
    }
}

void attention(const DecodeStep& p, const DecodeLayer& l, Team& team) {
    const SparseParts& s = l.sparse;
    if (s.borrows_input) {
        multiply_all<2>(team, p.prepared, p.T, {{&l.q, p.q}, {&s.gate, p.gates}});
        team.share(p.T, [&](long t) { prepare(l.k, p.lent_input, t, p.prepared); });
        multiply_all<2>(team, p.prepared, p.T, {{&l.k, p.k}, {&l.v, p.v}});
    } else {
        multiply_all<4>(team, p.prepared, p.T, {{&l.q, p.q}, {&l.k, p.k}, {&l.v, p.v}, {&s.gate, p.gates}});
    }
    team.share(p.T, [&](long t) { place_heads(p, l, t); });
    if (l.cache.scales.k) {
        team.share(p.B, [&](long b) { take_mean(p, l, b); });
        team.share(p.T, [&](long t) { quantise_row(p, l, t); });
    }
    const Span& span = p.spans[l.span];
    const long units = listed_units(p, l);
    team.share(units + (has_own_rows(l) ? span.num_tasks : 0), [&](long i) {
        if (i < units) attend_listed(p, l, i);
        else if (s.listed) attend_oracle(p, l, span.tasks[i - units]);
        else attend_span(p, l, span.tasks[i - units]);
    });
    team.share(p.T, [&](long t) {
        if (has_own_rows(l)) finish_attention(p, l, t), keep_row(p, l, t);
        if (s.listed) list_blocks(p, l, t);
        if (s.gate.rows) join_branches(p, l, t);
        prepare(l.o, p.attended, t, p.prepared);
    });
    multiply_all<1>(team, p.prepared, p.T, {{&l.o, p.y}});
}

void feed_forward(const DecodeStep& p, const DecodeLayer& l, Team& team) {
    const Shares shares(l.gate, num_panels(l.gate), team.size);
    team.share(shares.count(), [&](long share) {
        const auto [first, last] = rows_of(l.gate, shares.panels(share));
        linear_multiply(l.gate, p.prepared, p.T, first, last, p.gate, l.F);
        linear_multiply(l.up, p.prepared, p.T, first, last, p.up, l.F);
        for (long t = 0; t < p.T; ++t) swiglu(p.gate + t * l.F + first, p.up + t * l.F + first, last - first);
    });
    team.share(p.T, [&](long t) { prepare(l.down, p.gate, t, p.prepared); });
    multiply_all<1>(team, p.prepared, p.T, {{&l.down, p.y}});
}

void embed(const DecodeStep& p, long t, float* to) {
    const Format format = p.embedding.format;
    widen(format, offset(p.embedding.weight, format, p.ids[t] * p.D), p.D, to);
}

void fill_angles(const DecodeStep& p, long t) {
    const long b = p.sequence[t];
    const float position = float(p.start[b] + t - p.first_token[b]);
    for (long i = 0; i < p.num_angles; ++i) {
        const Angles& angles = p.angles[i];
        for (long j = 0; j < angles.half; ++j) {
            angles.cos[t * angles.half + j] = cosf(position * angles.frequencies[j]);
            angles.sin[t * angles.half + j] = sinf(position * angles.frequencies[j]);
        }
    }
}

// An MTP head's input: hidden state and embedding, each normed, through the joining matrix.
void join(const DecodeStep& p, Team& team) {
    const DecodeHead& head = *p.head;
    team.share(p.T, [&](long t) {
        float *const both = p.joined + t * 2 * p.D, *const embedding = p.normed + t * p.D;
        embed(p, t, embedding);
        normalise(p.hidden + t * p.D, head.hidden_norm, p.D, p.eps, both + (head.hidden_first ? 0 : p.D));
        normalise(embedding, head.embedding_norm, p.D, p.eps, both + (head.hidden_first ? p.D : 0));
        prepare(head.join, p.joined, t, p.prepared);
    });
    multiply_all<1>(team, p.prepared, p.T, {{&head.join, p.x}});
}

void add(float* x, const float* y, long count) {
    for (long i = 0; i < count; ++i) x[i] += y[i];
}

void run(const DecodeStep& p, Team& team) {
    if (p.head) join(p, team);
    for (long i = 0; i < p.num_layers; ++i) {
        const DecodeLayer& l = p.layers[i];
        team.share(p.T, [&](long t) {
            float *const x = p.x + t * p.D, *const normed = p.normed + t * p.D;
            if (i) {
                add(x, p.y + t * p.D, p.D);
            } else {
                fill_angles(p, t);
                if (!p.head) embed(p, t, x);
            }
            normalise(x, l.input_norm, p.D, p.eps, normed);
            if (l.sparse.lends_input) __builtin_memcpy(p.lent_input + t * p.D, normed, p.D * sizeof(float));
            prepare(l.q, p.normed, t, p.prepared);
        });
        attention(p, l, team);
        team.share(p.T, [&](long t) {
            float *const x = p.x + t * p.D, *const normed = p.normed + t * p.D;
            add(x, p.y + t * p.D, p.D);
            normalise(x, l.mlp_norm, p.D, p.eps, normed);
            prepare(l.experts.E ? l.experts.router : l.gate, p.normed, t, p.prepared);
        });
        if (l.experts.E) mixture(p, l, team);
        else feed_forward(p, l, team);
    }
    team.share(p.T, [&](long t) {
        float* const x = p.x + t * p.D;
        add(x, p.y + t * p.D, p.D);
        if (p.head) normalise(x, p.head->final_norm, p.D, p.eps, x);
    });
}

template <typename Work>
void with_team(const DecodeScratch& scratch, int num_threads, Work work) {
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
    {
#ifdef _OPENMP
        Team team{scratch.meeting, scratch.counters, omp_get_num_threads()};
#else
        Team team{scratch.meeting, scratch.counters, 1};
#endif
        work(team);
    }
}

constexpr long kRestRows = 512;  // outputs that are computed in two parts and added up

thread_local Scratch prepared_scratch;

void* take_prepared(long bytes) { return prepared_scratch.take(divide_up(bytes, sizeof(float))); }

long prepared_bytes(const DecodeStep& p) {
    long most = p.head ? linear_scratch_bytes(p.head->join.format, 2 * p.D, p.T) : 0;
    const auto count = [&](const Linear& linear, long M) {
        const long bytes = linear_scratch_bytes(linear.format, linear.columns, M);
        most = bytes > most ? bytes : most;
    };
    for (long i = 0; i < p.num_layers; ++i) {
        const DecodeLayer& l = p.layers[i];
        const long slots = l.experts.E ? p.T * l.experts.A : p.T;
        count(l.q, p.T), count(l.o, p.T), count(l.gate, slots), count(l.down, slots);
        if (l.experts.E) count(l.experts.router, p.T);
    }
    return most;
}

}  // namespace

void decode_step(const DecodeStep& given) {
    DecodeStep p = given;
    p.prepared = take_prepared(prepared_bytes(p));
    with_team(p, p.num_threads, [&](Team& team) { run(p, team); });
}

// Integer weights of the output matrix read their inputs in two parts; see linear_prepare_rest.
void decode_logits(const DecodeLogits& p) {
    const bool is_integer = p.head.format == Format::int8 || p.head.format == Format::int4;
    const long tokens = is_integer ? 2 * p.M : p.M;
    void* const prepared = take_prepared(linear_scratch_bytes(p.head.format, p.D, tokens));
    with_team(p, p.num_threads, [&](Team& team) {
        team.share(p.M, [&](long m) {
            const float* const x = p.norm ? p.normed : p.x;
            if (p.norm) normalise(p.x + m * p.D, p.norm, p.D, p.eps, p.normed + m * p.D);
            prepare(p.head, x, m, prepared);
            if (is_integer) linear_prepare_rest(x + m * p.D, p.D, m, p.M + m, prepared);
        });
        if (!is_integer) return multiply_all<1>(team, prepared, p.M, {{&p.head, p.logits}});
        Linear head = p.head;
        head.bias = nullptr;  // once for both parts
        const Shares shares(head, num_panels(head), team.size);
        team.share(shares.count(), [&](long share) {
            const auto [first, last] = rows_of(head, shares.panels(share));
            float* const both = attention_scratch.take(tokens * kRestRows);
            for (long row = first; row < last; row += kRestRows) {
                const long end = row + kRestRows < last ? row + kRestRows : last;
                linear_multiply(head, prepared, tokens, row, end, both - row, kRestRows);
                for (long m = 0; m < p.M; ++m)
                    for (long r = 0; r < end - row; ++r)
                        p.logits[m * head.rows + row + r] = both[m * kRestRows + r] + both[(p.M + m) * kRestRows + r] +
                                                            (p.head.bias ? p.head.bias[row + r] : 0.0f);
            }
        });
    });
}

}  // namespace sateen::SATEEN_ISA
