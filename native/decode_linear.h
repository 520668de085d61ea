// Products of a decode step: prepared inputs by token, rows of weights shared out between the threads.
#pragma once

#include <math.h>

#include "attention_rows.h"
#include "decode.h"
#include "team.h"

namespace sateen::SATEEN_ISA {
namespace {

constexpr long kUnitBytes = 1 << 17;  // of weights that a thread takes at a time

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

long unit_rows(const Linear& linear) {
    const long row = linear_bytes(linear.format, kLinearRows, linear.columns).weight / kLinearRows;
    const long rows = kUnitBytes / (row ? row : 1) / kLinearRows * kLinearRows;
    return rows < kLinearRows ? kLinearRows : rows;
}

// The products of one prepared input, their rows shared out together.
template <long COUNT>
void multiply_all(Team& team, const void* prepared, long M, const Product (&products)[COUNT]) {
    long ends[COUNT], total = 0;
    for (long i = 0; i < COUNT; ++i) ends[i] = total += divide_up(products[i].linear->rows, unit_rows(*products[i].linear));
    team.share(total, [&](long unit) {
        long i = 0;
        while (unit >= ends[i]) ++i;
        const Linear& linear = *products[i].linear;
        const long rows = unit_rows(linear), first = (unit - (i ? ends[i - 1] : 0)) * rows;
        const long last = first + rows < linear.rows ? first + rows : linear.rows;
        linear_multiply(linear, prepared, M, first, last, products[i].y, linear.rows);
    });
}

void prepare(const Linear& linear, const float* x, long t, void* prepared) {
    linear_prepare(linear.format, x, linear.columns, linear.columns, t, t + 1, prepared);
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
