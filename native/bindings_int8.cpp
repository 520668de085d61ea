// The Python face of int8_attention.h.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "int8_attention.h"

namespace nb = nanobind;

namespace sateen {
namespace {

template <typename T, int N>
using Dense = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Floats3 = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Offsets = Dense<const int, 1>;
using Sinks = std::optional<Dense<const float, 1>>;

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

Rows rows(const Floats3& x) {
    require(x.stride(2) == 1 || x.shape(2) <= 1 || x.size() == 0, "channels must be contiguous");
    return {x.data(), long(x.stride(0)), long(x.stride(1))};
}

bool has_shape(const auto& x, long a, long b, long c) {
    return long(x.shape(0)) == a && long(x.shape(1)) == b && long(x.shape(2)) == c;
}

void require_offsets(const Offsets& cu, long end) {
    require(cu.shape(0) >= 1 && cu.data()[0] == 0, "offsets start at 0");
    for (size_t i = 1; i < cu.shape(0); ++i) require(cu.data()[i] >= cu.data()[i - 1], "offsets do not decrease");
    require(long(cu.data()[cu.shape(0) - 1]) == end, "offsets end at the number of tokens");
}

// What both forms have in common; T, S, N, K, H and V are set.
void fill(AttentionShape& p, const Offsets& cu_q, const Offsets& cu_k, const Sinks& sink, double scale, long window,
          long block, int num_threads, const Dense<float, 3>& out, const Dense<float, 2>& lse) {
    require(p.K > 0 && p.N % p.K == 0, "the key/value heads divide the query heads");
    require(cu_q.shape(0) == cu_k.shape(0), "queries and keys have the same number of sequences");
    require_offsets(cu_q, p.T);
    require_offsets(cu_k, p.S);
    require(!sink || long(sink->shape(0)) == p.N, "one sink per query head");
    require(num_threads > 0, "at least one thread");
    require(block >= 64 && block <= 1024 && block % 64 == 0, "blocks are whole 64 keys, 1024 at most");
    require(p.H > 0 && p.V > 0 && p.H <= 1024 && p.V <= 1024, "heads have 1 to 1024 channels");
    require(has_shape(out, p.T, p.N, p.V), "out is [T, N, V]");
    require(long(lse.shape(0)) == p.N && long(lse.shape(1)) == p.T, "lse is [N, T]");
    p.cu_q = cu_q.data(), p.cu_k = cu_k.data(), p.num_sequences = long(cu_q.shape(0)) - 1;
    p.sink = sink ? sink->data() : nullptr;
    p.scale = float(scale), p.window = window > 0 ? window : 0, p.num_threads = num_threads;
}

void int8_attention(const Floats3& q, const Floats3& k, const Floats3& v, const Offsets& cu_q, const Offsets& cu_k,
                    const Sinks& sink, double scale, bool is_causal, long window, bool smooth_k, bool float_values,
                    int levels, bool scale_per_channel, bool sum_codes, long block, int num_threads,
                    Dense<float, 3>& out, Dense<float, 2>& lse) {
    Int8Attention p{};
    p.q = rows(q), p.k = rows(k), p.v = rows(v);
    p.T = long(q.shape(0)), p.N = long(q.shape(1)), p.H = long(q.shape(2));
    p.S = long(k.shape(0)), p.K = long(k.shape(1)), p.V = long(v.shape(2));
    require(has_shape(k, p.S, p.K, p.H) && has_shape(v, p.S, p.K, p.V), "q, k and v have one shape each way");
    require(levels > 0 && levels <= 255, "codes of P are bytes");
    fill(p, cu_q, cu_k, sink, scale, is_causal ? window : 0, block, num_threads, out, lse);
    p.is_causal = is_causal, p.smooth_k = smooth_k, p.float_values = float_values, p.levels = levels;
    p.scale_per_channel = scale_per_channel, p.sum_codes = sum_codes, p.block = block;
    p.out = out.data(), p.lse = lse.data();
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(int8_attention, p);
}

using Codes = Dense<const signed char, 3>;
using Scales = Dense<const float, 2>;

void int8_rows_attention(const Floats3& q, const Codes& k, const Scales& k_scale, const Codes& v, const Scales& v_scale,
                         const Dense<const float, 3>& k_mean, const Offsets& cu_q, const Offsets& cu_k, const Sinks& sink,
                         double scale, long window, long block, int num_threads, Dense<float, 3>& out, Dense<float, 2>& lse) {
    Int8RowsAttention p{};
    p.q = rows(q);
    p.T = long(q.shape(0)), p.N = long(q.shape(1)), p.H = long(q.shape(2));
    p.S = long(k.shape(0)), p.K = long(k.shape(1)), p.V = long(v.shape(2));
    require(has_shape(k, p.S, p.K, p.H) && has_shape(v, p.S, p.K, p.V), "q, k and v have one shape each way");
    for (const Scales* scales : {&k_scale, &v_scale})
        require(long(scales->shape(0)) == p.S && long(scales->shape(1)) == p.K, "scales are [S, K]");
    fill(p, cu_q, cu_k, sink, scale, window, block, num_threads, out, lse);
    require(has_shape(k_mean, p.num_sequences, p.K, p.H), "key means are [B, K, H]");
    p.k_codes = k.data(), p.v_codes = v.data(), p.k_scale = k_scale.data(), p.v_scale = v_scale.data();
    p.k_mean = k_mean.data(), p.block = block, p.out = out.data(), p.lse = lse.data();
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(int8_rows_attention, p);
}

void int8_scores(const Dense<const signed char, 2>& q, const Dense<const signed char, 2>& k, Dense<int, 2>& out) {
    require(q.shape(1) == k.shape(1) && out.shape(0) == q.shape(0) && out.shape(1) == k.shape(0), "q [M, L], k [S, L], out [M, S]");
    const Int8Products p{q.data(), nullptr, k.data(), long(q.shape(0)), long(q.shape(1)), long(k.shape(0)), out.data()};
    SATEEN_DISPATCH(int8_products, p);
}

void int8_weighted(const Dense<const unsigned char, 2>& shares, const Dense<const signed char, 2>& v, Dense<int, 2>& out) {
    require(shares.shape(1) == v.shape(0) && out.shape(0) == shares.shape(0) && out.shape(1) == v.shape(1),
            "shares [M, L], v [L, S], out [M, S]");
    const Int8Products p{nullptr, shares.data(), v.data(), long(shares.shape(0)), long(shares.shape(1)), long(v.shape(1)), out.data()};
    SATEEN_DISPATCH(int8_products, p);
}

}  // namespace

void bind_int8(nb::module_& m) {
    m.def("int8_attention", &int8_attention, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cu_q"), nb::arg("cu_k"),
          nb::arg("sink").none(), nb::arg("scale"), nb::arg("is_causal"), nb::arg("window"), nb::arg("smooth_k"),
          nb::arg("float_values"), nb::arg("levels"), nb::arg("scale_per_channel"), nb::arg("sum_codes"), nb::arg("block"),
          nb::arg("num_threads"), nb::arg("out"), nb::arg("lse"));
    m.def("int8_rows_attention", &int8_rows_attention, nb::arg("q"), nb::arg("k"), nb::arg("k_scale"), nb::arg("v"),
          nb::arg("v_scale"), nb::arg("k_mean"), nb::arg("cu_q"), nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("scale"),
          nb::arg("window"), nb::arg("block"), nb::arg("num_threads"), nb::arg("out"), nb::arg("lse"));
    m.def("int8_scores", &int8_scores, nb::arg("q"), nb::arg("k"), nb::arg("out"));
    m.def("int8_weighted", &int8_weighted, nb::arg("shares"), nb::arg("v"), nb::arg("out"));
}

}  // namespace sateen
