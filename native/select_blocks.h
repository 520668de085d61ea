// The n largest of some scores, without sorting: the n-th largest is found by halving the range of their bits.
#pragma once

#include "simd.h"

namespace sateen::SATEEN_ISA {
namespace {

// Integers in the order of the floats; -0 counts as 0.
SATEEN_INLINE vint ordered(vfloat x) {
    const vint word = bits(x + vfloat{});
    return word ^ ((word >> 31) & 0x7fffffff);
}

inline long count_from(const int* keys, long count, int least) {
    vint found{};
    for (long i = 0; i < count; i += W) found -= load_int(keys + i) >= splat_int(least);
    long total = 0;
    for (int i = 0; i < W; ++i) total += found[i];
    return total;
}

// Writes the indices of the `wanted` largest of scores[0, count) to `chosen`, ascending, padded with -1; ties go to the
// lower index and -inf is never chosen. `scores` has room for whole vectors; `keys` is scratch of the same size.
inline void choose_largest(float* scores, long count, long wanted, int* keys, int* chosen) {
    const long wide = round_up(count, W);
    for (long i = count; i < wide; ++i) scores[i] = -kInf;
    for (long i = 0; i < wide; i += W) {
        const vint key = ordered(load(scores + i));
        __builtin_memcpy(keys + i, &key, sizeof key);
    }
    const int lowest = ordered(splat(-kInf))[0];
    // `low` admits at least `wanted`, `high` fewer.
    long low = lowest, admitted = count_from(keys, wide, lowest + 1), written = 0;
    long above = admitted;
    if (admitted > wanted) {
        long high = 0x7fffffffL + 1;
        low = lowest + 1, above = 0;
        while (high - low > 1 && admitted != wanted) {
            const long middle = low + (high - low) / 2, found = count_from(keys, wide, int(middle));
            if (found >= wanted) low = middle, admitted = found;
            else high = middle, above = found;
        }
        if (admitted == wanted) above = admitted, --low;
    }
    // Everything above `low`, and the first of those equal to it as far as there is room.
    long equal = admitted > wanted ? wanted - above : 0;
    for (long i = 0; i < count && written < wanted; ++i)
        if (keys[i] > low || (keys[i] == low && equal-- > 0)) chosen[written++] = int(i);
    for (; written < wanted; ++written) chosen[written] = -1;
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
