// What a model and its caches give a decode step, collected once: layers as pointers, small vectors as floats, scratch.
// The caller keeps the tensors alive that are pointed to.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "decode.h"

namespace sateen {

// Where the tokens of one step stand; pointers as in DecodeStep.
struct Batch {
    long T, B;
    const long *ids, *first_token, *start, *page_rows, *first_page, *slot, *mean_rows;
};

class DecodePlan {
  public:
    DecodePlan(long hidden_size, float eps, long page) : D(hidden_size), eps_(eps), page_(page) {}

    // A vector of `count` numbers as floats; float32 is read where it lies, others are converted before each step.
    const float* vector(const void* data, Format format, long count);
    int angles(const float* frequencies, long half);
    // A layer of the trunk, or that of `head`; heads come last. Fills in `span`; `window` is 0 for all keys.
    void add(DecodeLayer layer, long window, const DecodeHead* head = nullptr);

    long num_layers() const { return long(layers_.size()); }
    const DecodeLayer& layer(long i) const { return layers_[size_t(i)]; }

    Linear embedding{}, head{};
    const float* final_norm = nullptr;
    long D;

    // Experts that a token is routed to, all layers of the trunk together.
    long routes_per_token() const { return routes_; }
    // Blocks that a token's queries list, all heads of all oracles.
    long lists_per_token() const { return lists_; }
    // The trunk's hidden states, or with `head` from 0 that head's output for the trunk's or another head's `hidden`.
    void step(const Batch& batch, int head, const float* hidden, float* x, int* routes, int* lists, int num_threads);
    void logits(const float* x, long M, const float* norm, float* out, int num_threads);

  private:
    struct Vector {
        const void* data;
        Format format;
        std::unique_ptr<std::vector<float>> floats;
    };
    struct Kind {
        long group, window, unit;  // keys are cut at multiples of `unit`
        std::vector<SpanTask> tasks;
        std::vector<SpanTile> tiles;
        std::vector<long> first_tile;
    };
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };

    void refresh();
    Span divide(Kind& kind, const Batch& batch, int num_threads) const;
    float* take(long count);

    float eps_;
    long page_;
    std::vector<DecodeLayer> layers_;  // the trunk's, then those of the heads
    std::vector<DecodeHead> heads_;
    long routes_ = 0, lists_ = 0;
    std::vector<Vector> vectors_;
    std::vector<Angles> angles_;
    std::vector<std::vector<float>> frequencies_;
    std::vector<Kind> kinds_;
    std::vector<int> counters_;
    std::unique_ptr<float, Free> memory_;
    long capacity_ = 0;
    Meeting meeting_{};
};

}  // namespace sateen
