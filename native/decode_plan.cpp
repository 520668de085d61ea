// Compiled without level flags; see decode_plan.h.
#include "decode_plan.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

namespace sateen {
namespace {

constexpr long kAlign = 16;      // floats in a cache line
constexpr long kLeastKeys = 64;  // a part of fewer keys costs more to merge than it saves
constexpr long kPartsPerThread = 8;
constexpr long kPhases = 24;     // more than a layer has, and than what comes before and after the layers

long round_up(long n, long to) { return (n + to - 1) / to * to; }

long half_bits(const void* at, long i) {
    unsigned short x;
    std::memcpy(&x, static_cast<const char*>(at) + 2 * i, 2);
    return x;
}

float widen(Format format, const void* at, long i) {
    const unsigned x = unsigned(half_bits(at, i));
    unsigned word = x << 16;
    float y;
    if (format == Format::bf16) return std::memcpy(&y, &word, 4), y;
    const unsigned magnitude = (x & 0x7fff) << 13, sign = (x & 0x8000) << 16;
    std::memcpy(&y, &magnitude, 4);
    y *= 0x1p112f;
    std::memcpy(&word, &y, 4);
    word = (magnitude >= 0x7c00u << 13 ? word | 0x7f800000 : word) | sign;
    return std::memcpy(&y, &word, 4), y;
}

}  // namespace

const float* DecodePlan::vector(const void* data, Format format, long count) {
    if (format == Format::f32) return static_cast<const float*>(data);
    vectors_.push_back({data, format, std::make_unique<std::vector<float>>(count)});
    return vectors_.back().floats->data();
}

void DecodePlan::refresh() {
    for (Vector& v : vectors_)
        for (size_t i = 0; i < v.floats->size(); ++i) (*v.floats)[i] = widen(v.format, v.data, long(i));
}

int DecodePlan::angles(const float* frequencies, long half) {
    frequencies_.emplace_back(frequencies, frequencies + half);
    angles_.push_back({frequencies_.back().data(), half, nullptr, nullptr});
    return int(angles_.size()) - 1;
}

void DecodePlan::add(DecodeLayer layer, long window, const DecodeHead* head) {
    const long group = layer.N / layer.K;
    // A block of an oracle is never in two parts.
    const long unit = layer.sparse.listed ? std::lcm(page_, layer.sparse.block_size) : page_;
    size_t i = 0;
    while (i < kinds_.size() && (kinds_[i].group != group || kinds_[i].window != window || kinds_[i].unit != unit)) ++i;
    if (i == kinds_.size()) kinds_.push_back({group, window, unit, {}, {}, {}});
    layer.span = int(i);
    layer.sparse.lists = lists_;
    lists_ += layer.K * (layer.sparse.listed + layer.sparse.recent);
    layer.experts.routes = routes_;
    routes_ += layer.experts.A;
    layers_.push_back(layer);
    if (head) heads_.push_back(*head);
}

// Tiles of rows, cut into parts of about equal numbers of keys where one thread would be busy for long.
Span DecodePlan::divide(Kind& kind, const Batch& batch, int num_threads) const {
    const auto tile_keys = [&](long b, long first, long rows) {
        const long bottom = batch.start[b] + first / kind.group, top = batch.start[b] + (first + rows - 1) / kind.group;
        const long low = kind.window && bottom >= kind.window ? bottom - kind.window + 1 : 0;
        return std::pair(low, top + 1);
    };
    kind.tasks.clear(), kind.tiles.clear(), kind.first_tile.clear();
    long keys = 0, states = 0;
    for (int pass = 0; pass < 2; ++pass) {
        const long most = std::max(kLeastKeys, keys / (kPartsPerThread * num_threads));
        for (long b = 0; b < batch.B; ++b) {
            const long rows = (batch.first_token[b + 1] - batch.first_token[b]) * kind.group;
            const long base = kind.window && batch.start[b] >= kind.window ? batch.start[b] - kind.window + 1 : 0;
            if (pass) kind.first_tile.push_back(long(kind.tiles.size()));
            for (long first = 0; first < rows; first += kSpanRows) {
                const long used = std::min(kSpanRows, rows - first);
                const auto [low, high] = tile_keys(b, first, used);
                keys += high - low;
                if (!pass) continue;
                const long parts = num_threads > 1 ? (high - low + most - 1) / most : 1;
                const SpanTile tile{long(kind.tasks.size()), parts};
                for (long i = 0; i < parts; ++i) {
                    // Cut at whole blocks of the cache, which in rings begin at the oldest row that is seen.
                    const auto cut = [&](long part) {
                        const long at = low + (high - low) * part / parts;
                        return part == 0 ? low : part == parts ? high : std::clamp(base + (at - base) / kind.unit * kind.unit, low, high);
                    };
                    kind.tasks.push_back({b, first, used, cut(i), cut(i + 1), states});
                    states += used;
                }
                kind.tiles.push_back(tile);
            }
        }
    }
    return {kind.group, kind.window, long(kind.tasks.size()), states, kind.tasks.data(), kind.tiles.data(), kind.first_tile.data()};
}

float* DecodePlan::take(long count) {
    if (count > capacity_) {
        memory_.reset(static_cast<float*>(std::aligned_alloc(64, round_up(count, 1024) * sizeof(float))));
        if (!memory_) throw std::bad_alloc();
        capacity_ = round_up(count, 1024);
        // What is read before it is written shows in the first result.
        std::fill(memory_.get(), memory_.get() + capacity_, std::numeric_limits<float>::quiet_NaN());
    }
    return memory_.get();
}

void DecodePlan::step(const Batch& batch, int head, const float* hidden, float* x, int* routes, int* lists, int num_threads) {
    refresh();
    const long T = batch.T, num_trunk = long(layers_.size() - heads_.size());
    const DecodeLayer* const layers = layers_.data() + (head < 0 ? 0 : num_trunk + head);
    const long num_layers = head < 0 ? num_trunk : 1;
    std::vector<Span> spans;
    for (Kind& kind : kinds_) spans.push_back(divide(kind, batch, num_threads));
    long N_H = 0, K_H = 0, N_V = 0, K_V = 0, padded_N = 0, padded_K = 0, padded_V = 0, F = 0, E = 0, A = 0, states = 0, own = 0;
    long listed_q = 0, listed_out = 0, gates = 0, lent = 0, maxima = 0, longest = 0;
    for (long b = 0; b < batch.B; ++b) longest = std::max(longest, batch.start[b] + batch.first_token[b + 1] - batch.first_token[b]);
    for (const DecodeLayer* l = layers; l < layers + num_layers; ++l) {
        const long H = round_up(l->H, kAlign), V = round_up(l->V, kAlign);
        N_H = std::max(N_H, l->N * l->H), K_H = std::max(K_H, l->K * l->H);
        padded_N = std::max(padded_N, l->N * H), padded_K = std::max(padded_K, l->K * H);
        N_V = std::max(N_V, l->N * l->V), K_V = std::max(K_V, l->K * l->V), padded_V = std::max(padded_V, l->K * V);
        E = std::max(E, l->experts.E), A = std::max(A, l->experts.A), F = std::max(F, l->F * std::max(1L, l->experts.A));
        if (l->cache.scales.k) own = std::max(own, T * l->K * (2 + (H + V) / 4));
        states = std::max(states, spans[l->span].state_rows * l->K * (V + 2));
        const SparseParts& s = l->sparse;
        if (s.source) listed_q = std::max(listed_q, T * l->N * H), listed_out = std::max(listed_out, T * l->N * l->V);
        if (s.listed) maxima = std::max(maxima, T * l->N * round_up((longest + s.block_size - 1) / s.block_size, kAlign));
        if (s.lends_input) lent = T * D;
        gates = std::max(gates, T * s.gate.rows);
    }
    long trig = 0;
    for (const Angles& angles : angles_) trig += 2 * round_up(T * angles.half, kAlign);

    DecodeStep p{};
    const std::pair<float**, long> parts[] = {
        {&p.normed, T * D}, {&p.q, T * N_H}, {&p.k, T * K_H}, {&p.v, T * K_V}, {&p.qr, T * padded_N},
        {&p.kr, T * padded_K}, {&p.vr, T * padded_V}, {&p.states, states}, {&p.own_rows, own}, {&p.attended, T * N_V},
        {&p.gate, T * F}, {&p.up, T * F}, {&p.y, T * D}, {&p.joined, head < 0 ? 0 : 2 * T * D},
        {&p.listed_q, listed_q}, {&p.listed_out, listed_out}, {&p.gates, gates}, {&p.lent_input, lent}, {&p.maxima, maxima},
        {&p.scores, T * E}, {&p.shares, T * A}, {&p.expert_y, T * A * D}};
    long total = trig;
    for (const auto& [at, count] : parts) total += round_up(count, kAlign);
    float* memory = take(total);
    for (const auto& [at, count] : parts) *at = memory, memory += round_up(count, kAlign);
    for (Angles& angles : angles_) {
        const long size = round_up(T * angles.half, kAlign);
        angles.cos = memory, angles.sin = memory + size;
        memory += 2 * size;
    }
    std::vector<long> sequence(T);
    for (long b = 0; b < batch.B; ++b)
        for (long t = batch.first_token[b]; t < batch.first_token[b + 1]; ++t) sequence[t] = b;
    std::vector<int> slots(2 * T * A), groups(2 * E + 2);
    counters_.assign((num_layers + 1) * kPhases, 0);
    p.counters = counters_.data(), p.meeting = &meeting_;
    p.slots = slots.data(), p.groups = groups.data(), p.routes = routes, p.lists = lists, p.longest = longest;
    p.layers = layers, p.num_layers = num_layers, p.head = head < 0 ? nullptr : &heads_[head], p.hidden = hidden;
    p.D = D, p.T = T, p.B = batch.B, p.page = page_, p.eps = eps_;
    p.angles = angles_.data(), p.num_angles = long(angles_.size());
    p.spans = spans.data();
    p.first_token = batch.first_token, p.start = batch.start, p.page_rows = batch.page_rows;
    p.first_page = batch.first_page, p.slot = batch.slot, p.mean_rows = batch.mean_rows, p.sequence = sequence.data(), p.ids = batch.ids;
    p.embedding = embedding, p.x = x, p.num_threads = num_threads;
    SATEEN_DISPATCH(decode_step, p);
}

void DecodePlan::logits(const float* x, long M, const float* norm, float* out, int num_threads) {
    refresh();
    DecodeLogits p{};
    p.normed = take(M * D);
    counters_.assign(kPhases, 0);
    p.counters = counters_.data(), p.meeting = &meeting_;
    p.x = x, p.norm = norm, p.M = M, p.D = D, p.eps = eps_, p.head = head, p.logits = out, p.num_threads = num_threads;
    SATEEN_DISPATCH(decode_logits, p);
}

}  // namespace sateen
