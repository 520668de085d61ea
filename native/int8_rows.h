// Attention of a few queries to cached int8 rows: a block of rows is packed into the first-level cache, read there by all
// query heads of its key/value head, and forgotten, so that a row comes from memory once. Rows may lie anywhere: a block
// is put together from runs, as pages and rings hold them.
#pragma once

#include "int8_block.h"

namespace sateen::SATEEN_ISA {
namespace {

// Consecutive cached rows of one key/value head; strides in numbers.
struct RowRun {
    const code *k, *v;
    const float *k_scale, *v_scale;
    long k_stride, v_stride, scale_stride, count;
};

// Bytes that will be read next, asked for while keys and values are packed, 16 rows at a time: rows of a head are too far
// apart for the hardware to foresee them.
struct Ahead {
    const char *k, *v;
    long k_bytes, v_bytes;  // of 16 rows
};

SATEEN_INLINE void fetch(const char* from, long bytes) {
    for (long i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

// Up to `block` packed keys and values of one head.
struct PackedRows {
    byte* k;
    code* v;
    float *k_scale, *v_scale;
    long H, V, H4, V16, block, count;

    static long size(long H, long V, long block) { return block * (whole(H, 4) + whole(V, 16)) / 4 + 2 * block; }

    PackedRows(float* at, long H, long V, long block) : H(H), V(V), H4(whole(H, 4)), V16(whole(V, 16)), block(block), count(0) {
        k = reinterpret_cast<byte*>(at), at += block * H4 / 4;
        v = reinterpret_cast<code*>(at), at += block * V16 / 4;
        k_scale = at, v_scale = at + block;
    }

    // Every run but a block's last ends at a multiple of 16 keys.
    void add(const RowRun& run, Ahead ahead) {
        for (long done = 0; done < run.count;) {
            const long at = count % kStripe, room = kStripe - at, keys = run.count - done < room ? run.count - done : room;
            for (long i = 0; i < keys; i += 16) {
                const long some = keys - i < 16 ? keys - i : 16;
                pack_keys(run.k + (done + i) * run.k_stride, run.k_stride, some, H, k + count / kStripe * kStripe * H4, at + i);
                fetch(ahead.k, ahead.k_bytes);
                pack_values(run.v + (done + i) * run.v_stride, run.v_stride, some, V, v + (count + i) * V16, V16);
                fetch(ahead.v, ahead.v_bytes);
                ahead.k += ahead.k_bytes, ahead.v += ahead.v_bytes;
            }
            for (long i = 0; i < keys; ++i) {
                k_scale[count + i] = run.k_scale[(done + i) * run.scale_stride];
                v_scale[count + i] = run.v_scale[(done + i) * run.scale_stride];
            }
            done += keys, count += keys;
        }
    }

    // Keys from number `first` of their sequence on; what follows them in their stripe counts as zeros.
    KeyBlock close(long first) {
        for (long i = count; i < round_up(count, kStripe); ++i) k_scale[i] = v_scale[i] = 0.0f;
        return {k, k_scale, v, nullptr, v_scale, first, count};
    }
};

// Adds what another part of the keys gave to rows [0, used).
inline void merge(const RowStates& into, const RowStates& part, long used) {
    for (long i = 0; i < used; ++i) {
        const float a = into.top[i], b = part.top[i], top = b > a ? b : a, base = top == -kInf ? 0.0f : top;
        const float keep = exp2_fast(splat(a - base))[0], take = exp2_fast(splat(b - base))[0];
        into.top[i] = top, into.sum[i] = into.sum[i] * keep + part.sum[i] * take;
        for (long c = 0; c < into.columns; c += W) {
            float* const at = into.out + i * into.columns + c;
            store(at, load(at) * keep + load(part.out + i * into.columns + c) * take);
        }
    }
}

}  // namespace
}  // namespace sateen::SATEEN_ISA
