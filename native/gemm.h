// Small matrix products out of registers: C[m, n] = A[m, d] B[d, n] where B and C have whole vectors along n.
// A is read one number at a time, so it needs no packing in either order; B is read a vector at a time.
#pragma once

#include "simd.h"

namespace sateen::SATEEN_ISA {
namespace {

// Rows of C that a tile of two vectors keeps in registers: 32 vector registers with AVX-512, 16 otherwise.
constexpr int kTileRows = W == 16 ? 12 : W == 8 ? 6 : 4;

enum class Into { zero, add, rescale };  // what C holds before: ignored, added to, or multiplied per column first

struct Matrix {
    const float* a;
    long lda;
    const float* b;
    long ldb;
    float* c;
    long ldc;
};

template <int ROWS, int VECTORS, bool BY_COLUMN, Into INTO>
SATEEN_INLINE void tile(const Matrix& m, long depth, const float* factor) {
    vfloat sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) {
            if constexpr (INTO == Into::zero) sum[i][j] = vfloat{};
            if constexpr (INTO == Into::add) sum[i][j] = load(m.c + i * m.ldc + j * W);
            if constexpr (INTO == Into::rescale) sum[i][j] = load(m.c + i * m.ldc + j * W) * load(factor + j * W);
        }
    for (long d = 0; d < depth; ++d) {
        vfloat row[VECTORS];
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) row[j] = load(m.b + d * m.ldb + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const vfloat x = splat(BY_COLUMN ? m.a[d * m.lda + i] : m.a[i * m.lda + d]);
#pragma GCC unroll 4
            for (int j = 0; j < VECTORS; ++j) sum[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < VECTORS; ++j) store(m.c + i * m.ldc + j * W, sum[i][j]);
}

template <int VECTORS, bool BY_COLUMN, Into INTO>
inline void panel(Matrix m, long rows, long depth, const float* factor) {
    const long step_a = BY_COLUMN ? 1 : m.lda;
    long i = 0;
    const auto advance = [&](long by) {
        i += by;
        m.a += by * step_a;
        m.c += by * m.ldc;
    };
    for (; i + kTileRows <= rows; advance(kTileRows)) tile<kTileRows, VECTORS, BY_COLUMN, INTO>(m, depth, factor);
    if constexpr (kTileRows > 8)
        for (; i + 8 <= rows; advance(8)) tile<8, VECTORS, BY_COLUMN, INTO>(m, depth, factor);
    if constexpr (kTileRows > 4)
        for (; i + 4 <= rows; advance(4)) tile<4, VECTORS, BY_COLUMN, INTO>(m, depth, factor);
    for (; i + 2 <= rows; advance(2)) tile<2, VECTORS, BY_COLUMN, INTO>(m, depth, factor);
    for (; i < rows; advance(1)) tile<1, VECTORS, BY_COLUMN, INTO>(m, depth, factor);
}

// `columns` is a multiple of W. BY_COLUMN: A[i, d] lies at a[d * lda + i], otherwise at a[i * lda + d].
template <bool BY_COLUMN, Into INTO>
inline void multiply(Matrix m, long rows, long columns, long depth, const float* factor = nullptr) {
    long j = 0;
    for (; j + 2 * W <= columns; j += 2 * W, m.b += 2 * W, m.c += 2 * W) {
        panel<2, BY_COLUMN, INTO>(m, rows, depth, factor);
        if (factor) factor += 2 * W;
    }
    if (j < columns) panel<1, BY_COLUMN, INTO>(m, rows, depth, factor);
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
