// Thin matrix products, y[M, rows] = x[M, columns] W[rows, columns]^T + bias, for the few tokens of a decode step.
//
// How to call it, from a kernel source inside namespace SATEEN_ISA and inside an OpenMP region of the caller:
//   1. scratch = linear_scratch_bytes(format, columns, M) bytes at a 64-byte boundary, shared by the threads;
//   2. linear_prepare(format, x, stride, columns, first_token, last_token, scratch): each thread some tokens; barrier;
//   3. linear_multiply(linear, scratch, M, first_row, last_row, y, stride): each thread the rows of linear_share().
// Weights with the same format and columns share one prepared scratch; so do int8 and int4 (see prepared_like).
// One output is summed in the same order whatever M is, and whichever rows a thread has.
#pragma once

#include "isa.h"

namespace sateen {

enum class Format : int { f32, bf16, f16, int8, int4 };

constexpr long kLinearRows = 16;   // rows of a panel of the integer formats; threads share whole panels
constexpr long kLinearGroup = 32;  // columns that share a scale, of weights and of activations

// f32, bf16, f16: `weight` is [rows, columns] in row order, nothing else is read.
// int8: `weight` is uint8 [panels, columns / 4, 16, 4], code + 128; `scales` is bfloat16 [panels, groups, 16].
// int4: `weight` is uint8 [panels, groups, 4, 16, 4]: of byte [p, g, q, r, e] the low four bits are row 16 p + r and
//   column 32 g + 4 q + e, the high ones column 16 further; `scales` is bfloat16 [panels, groups, 2, 16], step, minimum.
// Panels and groups are padded: rows to a multiple of 16, columns to a multiple of 32.
struct Linear {
    Format format;
    long rows, columns;
    const void* weight;
    const void* scales;  // null for f32, bf16 and f16
    const float* bias;   // [rows] or null
};

// How many bytes a weight and its scales have.
struct LinearBytes {
    long weight, scales;
};

static inline LinearBytes linear_bytes(Format format, long rows, long columns) {
    const long padded = (rows + kLinearRows - 1) / kLinearRows * kLinearRows;
    const long groups = (columns + kLinearGroup - 1) / kLinearGroup;
    switch (format) {
        case Format::f32: return {rows * columns * 4, 0};
        case Format::int8: return {padded * groups * kLinearGroup, padded * groups * 2};
        case Format::int4: return {padded * groups * kLinearGroup / 2, padded * groups * 4};
        default: return {rows * columns * 2, 0};
    }
}

struct RowRange {
    long first, last;
};

// The rows of thread `part` of `parts`: whole panels, as even as they go.
static inline RowRange linear_share(long rows, long part, long parts) {
    const long panels = (rows + kLinearRows - 1) / kLinearRows;
    const long first = panels * part / parts * kLinearRows, last = panels * (part + 1) / parts * kLinearRows;
    return {first < rows ? first : rows, last < rows ? last : rows};
}

// The format whose prepared activations `format` reads: int8 for int4, itself otherwise.
static inline Format prepared_like(Format format) { return format == Format::int4 ? Format::int8 : format; }

// The whole product, with threads of its own.
struct LinearForward {
    Linear linear;
    const float* x;  // [M, columns]
    long M, x_stride;
    float* y;  // [M, rows]
    long y_stride;
    int num_threads;
};

#ifdef SATEEN_ISA
namespace SATEEN_ISA {

long linear_scratch_bytes(Format format, long columns, long M);

// Activations of tokens [first, last) in the form that linear_multiply reads: float32 as they are, rounded to bfloat16
// for bfloat16 weights, or int8 codes with a scale per group of 32.
void linear_prepare(Format format, const float* x, long x_stride, long columns, long first, long last, void* scratch);

// What the prepared int8 codes of token `from` left of its activations x, prepared as token `to`: the two products add up
// to that of activations of nearly 16 bits.
void linear_prepare_rest(const float* x, long columns, long from, long to, void* scratch);

// y[m * y_stride + row] for tokens [0, M) and rows [first_row, last_row); first_row is a multiple of kLinearRows, and
// so is last_row unless it is the number of rows.
void linear_multiply(const Linear& linear, const void* scratch, long M, long first_row, long last_row, float* y,
                     long y_stride);

}  // namespace SATEEN_ISA
#endif

SATEEN_DECLARE(linear_forward, LinearForward)

}  // namespace sateen
