// Products of a decode step: prepared inputs by token, rows of weights shared out between the threads.
#pragma once

#include <math.h>

#include "attention_rows.h"
#include "decode.h"
#include "team.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kLeastBytes = 1 << 15;  // of weights that a thread takes at a time

// silu(gate) * up, in the place of `gate`.
void swiglu(float* gate, const float* up, long count) {
    for (long i = 0; i < count; i += W) {
        const long n = count - i < W ? count - i : W;
        const vfloat x = n == W ? load(gate + i) : load_some(gate + i, n), y = n == W ? load(up + i) : load_some(up + i, n);
        // Beyond 2^120 the quotient is zero to the last bit of float32 either way.
        const vfloat power = x * -kLog2e, bounded = power > splat(120.0f) ? splat(120.0f) : power;
        const vfloat z = x / (exp2_fast(bounded) + 1.0f) * y;
        if (n == W) store(gate + i, z);
        else store_some(gate + i, z, n);
    }
}

// A product whose activations are prepared, and where its outputs go.
struct Product {
    const Linear* linear;
    float* y;
};

long num_panels(const Linear& linear) { return divide_up(linear.rows, kLinearRows); }

// Panels of rows in shares that shrink towards the end, so that threads finish together although a share is long enough
// for the processor to see the stream it reads. All threads cut alike.
struct Shares {
    long total, least, threads;

    Shares(const Linear& like, long panels, int num_threads) : total(panels), threads(num_threads) {
        const long bytes = linear_bytes(like.format, kLinearRows, like.columns).weight;
        least = bytes < kLeastBytes ? kLeastBytes / (bytes ? bytes : 1) : 1;
    }

    long size(long left) const {
        const long even = left / (2 * threads), share = even > least ? even : least;
        return share < left ? share : left;
    }

    long count() const {
        long found = 0;
        for (long left = total; left > 0; left -= size(left)) ++found;
        return found;
    }

    RowRange panels(long share) const {
        long left = total;
        for (long i = 0; i < share; ++i) left -= size(left);
        return {total - left, total - left + size(left)};
    }
};

// The rows of some panels of a product.
RowRange rows_of(const Linear& linear, RowRange panels) {
    const long last = panels.last * kLinearRows;
    return {panels.first * kLinearRows, last < linear.rows ? last : linear.rows};
}

// The products of one prepared input, their rows shared out together.
template <long COUNT>
void multiply_all(Team& team, const void* prepared, long M, const Product (&products)[COUNT]) {
    long total = 0;
    for (const Product& product : products) total += num_panels(*product.linear);
    const Shares shares(*products[0].linear, total, team.size);
    team.share(shares.count(), [&](long share) {
        RowRange left = shares.panels(share);
        for (const Product& product : products) {
            const long panels = num_panels(*product.linear);
            if (panels && left.first < panels && left.last > 0) {  // a matrix without rows is none
                const RowRange rows = rows_of(*product.linear, {left.first > 0 ? left.first : 0, left.last < panels ? left.last : panels});
                linear_multiply(*product.linear, prepared, M, rows.first, rows.last, product.y, product.linear->rows);
            }
            left = {left.first - panels, left.last - panels};
        }
    });
}

void prepare(const Linear& linear, const float* x, long t, void* prepared) {
    linear_prepare(linear.format, x, linear.columns, linear.columns, t, t + 1, prepared);
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
