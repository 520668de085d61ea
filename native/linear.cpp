// The functions of linear.h: which kernel serves which format, and the product with threads of its own.

#include "linear_float.h"
#include "linear_integer.h"

namespace sateen::SATEEN_ISA {

long linear_scratch_bytes(Format format, long columns, long M) {
    switch (format) {
        case Format::int8:
        case Format::int4: return M * integer_stride(columns);
        case Format::bf16: return M * float_stride<Bf16>(columns);
        default: return M * float_stride<F32>(columns);
    }
}

void linear_prepare(Format format, const float* x, long x_stride, long columns, long first, long last, void* scratch) {
    switch (format) {
        case Format::int8:
        case Format::int4: return prepare_integer(x, x_stride, columns, first, last, scratch);
        case Format::bf16: return prepare_float<Bf16>(x, x_stride, columns, first, last, scratch);
        default: return prepare_float<F32>(x, x_stride, columns, first, last, scratch);
    }
}

void linear_prepare_rest(const float* x, long columns, long from, long to, void* scratch) {
    prepare_rest(x, columns, from, to, scratch);
}

namespace {

constexpr long kBlockBytes = 256 * 1024;  // of activations, which stay in the second cache while weights pass by

void multiply_block(const Linear& linear, const void* scratch, long M, long first_row, long last_row, float* y, long y_stride) {
    switch (linear.format) {
        case Format::f32: return multiply_float<F32>(linear, scratch, M, first_row, last_row, y, y_stride);
        case Format::bf16: return multiply_float<Bf16>(linear, scratch, M, first_row, last_row, y, y_stride);
        case Format::f16: return multiply_float<F16>(linear, scratch, M, first_row, last_row, y, y_stride);
        case Format::int8: return multiply_integer<false>(linear, scratch, M, first_row, last_row, y, y_stride);
        case Format::int4: return multiply_integer<true>(linear, scratch, M, first_row, last_row, y, y_stride);
    }
}

thread_local Scratch linear_scratch;

}  // namespace

void linear_multiply(const Linear& linear, const void* scratch, long M, long first_row, long last_row, float* y,
                     long y_stride) {
    const long token_bytes = linear_scratch_bytes(linear.format, linear.columns, 1);
    const long step = round_up(kBlockBytes / token_bytes + 1, 16);
    for (long m = 0; m < M; m += step)
        multiply_block(linear, static_cast<const char*>(scratch) + m * token_bytes, M - m < step ? M - m : step, first_row,
                       last_row, y + m * y_stride, y_stride);
}

void linear_forward(const LinearForward& p) {
    const Linear& linear = p.linear;
    const long parts = p.num_threads;
    void* const shared = linear_scratch.take(linear_scratch_bytes(linear.format, linear.columns, p.M) / sizeof(float));
#pragma omp parallel num_threads(p.num_threads) if (p.num_threads > 1)
    {
#pragma omp for
        for (long i = 0; i < parts; ++i)
            linear_prepare(linear.format, p.x, p.x_stride, linear.columns, p.M * i / parts, p.M * (i + 1) / parts, shared);
#pragma omp for
        for (long i = 0; i < parts; ++i) {
            const RowRange rows = linear_share(linear.rows, i, parts);
            linear_multiply(linear, shared, p.M, rows.first, rows.last, p.y, p.y_stride);
        }
    }
}

}  // namespace sateen::SATEEN_ISA
