// A block of cached int8 rows and a few query rows of every head. Needs what int8_quads.h needs.
#pragma once

#include "int8_quads.h"

namespace sateen::SATEEN_ISA {
namespace {

#ifdef __AVX512VNNI__
// Folds blocks of at most 64 keys into ROWS query rows per head, a few tokens of all heads at a time: with so few products
// the time is that of reading, and memory is fastest in the order of its addresses.
template <int ROWS>
struct CodeFold {
    static constexpr long kStep = ROWS == 1 ? 8 : 16;  // tokens whose heads are read one after another
    static constexpr int kQuads = kStep / 4;

    const Tile& tile;
    long K, H, V;
    float* scales;                 // [2, K, 64] of keys and values
    float* x;                      // [K, ROWS, 64] products, then scores, then shares
    int* sums;                     // [K, ROWS, V]
    code* spread;                  // [K, ROWS, 4 H]
    byte* codes;                   // [K, ROWS, 64]
    SoftRows soft;                 // of all heads
    float *step, *size, *per_size; // [K, ROWS] in whole vectors: that of RowStates; that of a code of P; its inverse
    int* start;                    // that of RowStates

    static long memory(long K, long H, long V) {
        const long rows = K * ROWS;
        return SoftRows::size(rows) + K * 2 * kStripe + rows * (kStripe + V + H + kStripe / 4) + round_up(rows, W) * 4;
    }

    CodeFold(const Tile& tile, long K, long H, long V, float* at)
        : tile(tile), K(K), H(H), V(V), soft(K * ROWS, at) {
        const long rows = K * ROWS, all = round_up(rows, W);
        scales = at + SoftRows::size(rows), x = scales + 2 * K * kStripe;
        sums = reinterpret_cast<int*>(x + rows * kStripe);
        spread = reinterpret_cast<code*>(sums + rows * V);
        codes = reinterpret_cast<byte*>(spread + rows * 4 * H);
        step = reinterpret_cast<float*>(codes + rows * kStripe), size = step + all, per_size = size + all;
        start = reinterpret_cast<int*>(per_size + all);
    }

    // Takes over what `states_of(head)` begins with.
    template <typename StatesOf>
    void begin(StatesOf states_of) const {
        for (long head = 0; head < K; ++head) {
            const RowStates s = states_of(head);
            for (long r = 0; r < ROWS; ++r) {
                step[head * ROWS + r] = s.step[r], start[head * ROWS + r] = s.start[r];
                spread_codes(s.codes + r * s.stride, H, spread + (head * ROWS + r) * 4 * H);
            }
        }
    }

    template <typename StatesOf>
    void end(StatesOf states_of) const {
        for (long i = 0; i < K * ROWS; ++i) {
            const RowStates s = states_of(i / ROWS);
            s.top[i % ROWS] = soft.top[i], s.sum[i % ROWS] = soft.sum[i];
        }
    }

    // Products of kStep keys.
    SATEEN_APART void keys(const RowRun& run, long begin, LaterRows later) const {
        const code *k = run.k + begin * run.k_stride, *q = spread;
        int* to = reinterpret_cast<int*>(x) + begin;
        const long K = this->K, H = this->H, stride = run.k_stride;
        for (long head = 0; head < K; ++head, k += H, q += ROWS * 4 * H, to += ROWS * kStripe) {
            __m512i sum[ROWS][kQuads];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int g = 0; g < kQuads; ++g) sum[r][g] = _mm512_setzero_si512();
            for (long c = 0; c < H; c += kVector)
#pragma GCC unroll 2
                for (int g = 0; g < kQuads; g += 2) {
                    later.ask(), later.ask();
                    const KeyQuad some(k + 4 * g * stride + c, stride), others(k + 4 * (g + 1) * stride + c, stride);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                        for (int j = 0; j < 4; ++j) {
                            const __m512i x = load_codes(q + r * 4 * H + c * 4 + j * kVector);
                            sum[r][g] = _mm512_dpbusd_epi32(sum[r][g], some.four[j], x);
                            sum[r][g + 1] = _mm512_dpbusd_epi32(sum[r][g + 1], others.four[j], x);
                        }
                }
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                const __m512i last = fold_lanes(sum[r][kQuads - 2], sum[r][kQuads - 1]);
                const __m512i products = fold_lanes(fold_lanes(sum[r][0], sum[r][1]), last);
                if constexpr (kQuads == 4) _mm512_storeu_si512(to + r * kStripe, products);
                else _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * kStripe), _mm512_castsi512_si256(products));
            }
        }
    }

    // Adds P's codes times kStep values to the sums; the first values of a block begin them.
    SATEEN_APART void values(const RowRun& run, long begin, LaterRows later) const {
        const code* v = run.v + begin * run.v_stride;
        const byte* share = codes + begin;
        int* to = sums;
        const long K = this->K, V = this->V, stride = run.v_stride;
        for (long head = 0; head < K; ++head, share += ROWS * kStripe, to += ROWS * V) {
            for (long c = 0; c < V; c += kVector, v += kVector) {
                __m512i sum[ROWS][4];
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) sum[r][j] = begin ? _mm512_loadu_si512(to + r * V + c + j * W) : _mm512_setzero_si512();
#pragma GCC unroll 4
                for (int g = 0; g < kQuads; ++g) {
                    later.ask();
                    const ValueQuad values(v + 4 * g * stride, stride);
#pragma GCC unroll 8
                    for (int r = 0; r < ROWS; ++r) {
                        int shares;
                        __builtin_memcpy(&shares, share + r * kStripe + 4 * g, 4);
#pragma GCC unroll 4
                        for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbusd_epi32(sum[r][j], _mm512_set1_epi32(shares), values.four[j]);
                    }
                }
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(to + r * V + c + j * W, sum[r][j]);
            }
        }
    }

    // Products to P's codes; what the online softmax carries goes along.
    template <bool MASKED>
    SATEEN_APART void soften(long first) const {
        vint lane;
        for (int i = 0; i < W; ++i) lane[i] = i;
        const long rows = K * ROWS;
        for (long i = 0; i < rows; ++i) {
            float* const at = x + i * kStripe;
            const float* const scale = scales + i / ROWS * kStripe;
            const vint begin = splat_int(start[i]);
            const vfloat unit = splat(step[i]);
            vfloat found = splat(-kInf);
#pragma GCC unroll 4
            for (long j = 0; j < kStripe; j += W) {
                const vint product = load_int(reinterpret_cast<const int*>(at) + j) + begin;
                vfloat y = __builtin_convertvector(product, vfloat) * unit * load(scale + j);
                if constexpr (MASKED) {
                    const vint key = lane + splat_int(int(first + j));
                    y = (key <= splat_int(tile.newest[i % ROWS])) & (key >= splat_int(tile.oldest[i % ROWS])) ? y : splat(-kInf);
                }
                store(at + j, y);
                found = maximum(y, found);
            }
            soft.most[i] = found;
        }
        soft.raise(0, rows);
        for (long i = 0; i < rows; ++i) {
            float* const at = x + i * kStripe;
            const float* const scale = scales + (K + i / ROWS) * kStripe;
            const vfloat from = splat(soft.base[i]);
            vfloat add{}, largest{};
#pragma GCC unroll 4
            for (long j = 0; j < kStripe; j += W) {
                const vfloat y = exp2_fast(load(at + j) - from);
                const vfloat share = y * load(scale + j);
                add += y;
                store(at + j, share);
                largest = maximum(share, largest);
            }
            soft.total[i] = add, soft.most[i] = largest;
        }
        soft.add(0, rows);
        for (long i = 0; i < rows; i += W) {
            const vfloat unit = max_each(soft.most + i) / 255.0f;
            store(size + i, unit), store(per_size + i, unit > 0.0f ? 1.0f / unit : vfloat{});
        }
        for (long i = 0; i < rows; ++i) {
            vint rounded[kStripe / W];
            const vfloat levels = splat(per_size[i]);
#pragma GCC unroll 4
            for (int j = 0; j < kStripe / W; ++j) rounded[j] = nearest(load(x + i * kStripe + j * W) * levels);
            store_codes(rounded, codes + i * kStripe);
        }
    }

    // The 64 rows from run's first on can be read, also those behind its last, whose scales are zeros. `later_keys(s)` is
    // asked for while keys from number s on are read.
    template <typename StatesOf, typename LaterKeys, typename LaterValues>
    void fold(const RowRun& run, long first, StatesOf states_of, LaterKeys later_keys, LaterValues later_values) const {
        for (long head = 0; head < K; ++head) {
            take_scales(run.k_scale, head, run.scale_stride, run.count, scales + head * kStripe);
            take_scales(run.v_scale, head, run.scale_stride, run.count, scales + (K + head) * kStripe);
        }
        for (long s = 0; s < kStripe; s += kStep) {
            if (ROWS == 1) touch(run.k + s * run.k_stride, kStep * run.k_stride);
            keys(run, s, later_keys(s));
        }
        bool is_masked = run.count < kStripe;
        for (int r = 0; r < ROWS; ++r) is_masked |= tile.oldest[r] > first || tile.newest[r] < first + kStripe - 1;
        if (is_masked) soften<true>(first);
        else soften<false>(first);
        for (long s = 0; s < run.count; s += kStep) {
            if (ROWS == 1) touch(run.v + s * run.v_stride, kStep * run.v_stride);
            values(run, s, later_values(s));
        }
        for (long head = 0; head < K; ++head) {
            const RowStates s = states_of(head);
            for (int r = 0; r < ROWS; ++r) {
                const long i = head * ROWS + r;
                for (long c = 0; c < V; c += kVector) {
                    __m512i sum[4];
                    for (int j = 0; j < 4; ++j) sum[j] = _mm512_loadu_si512(sums + i * V + c + j * W);
                    add_in_order(sum, soft.shrink[i], size[i], s.out + r * s.columns + c);
                }
            }
        }
    }
};
#endif

}  // namespace
}  // namespace sateen::SATEEN_ISA
