// The Python face of attention over listed blocks and of the attention that lists them; see bindings.cpp.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>

#include "sparse_attention.h"

namespace nb = nanobind;

namespace {

// float32, or bfloat16 and float16 seen as 16-bit integers; `format` says which.
using Numbers3 = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using Array3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Array2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Array1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Dense3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Dense2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Dense1 = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Lists = nb::ndarray<const int, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using NewLists = nb::ndarray<int, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

bool has_shape(const auto& x, size_t a, size_t b, size_t c) {
    return x.shape(0) == a && x.shape(1) == b && x.shape(2) == c;
}

void require_offsets(const Offsets& cu, size_t end) {
    require(cu.shape(0) >= 1 && cu.data()[0] == 0, "offsets start at 0");
    for (size_t i = 1; i < cu.shape(0); ++i) require(cu.data()[i] >= cu.data()[i - 1], "offsets do not decrease");
    require(size_t(cu.data()[cu.shape(0) - 1]) == end, "offsets end at the number of tokens");
}

sateen::NumberRows rows(const Numbers3& x, int format) {
    require(format >= 0 && format <= int(sateen::Format::f16), "the format is f32, bf16 or f16");
    require(x.itemsize() == (format == int(sateen::Format::f32) ? 4 : 2), "numbers have the size of their format");
    require(x.stride(2) == 1 || x.shape(2) <= 1 || x.size() == 0, "channels must be contiguous");
    return {x.data(), sateen::Format(format), long(x.stride(0)), long(x.stride(1))};
}

void fill(sateen::NumbersShape& p, const Numbers3& q, const Numbers3& k, const Numbers3& v, int format, const Offsets& cu_q,
          const Offsets& cu_k, const std::optional<Array1>& sink, long block_size, double scale, int num_threads) {
    p.q = rows(q, format), p.k = rows(k, format), p.v = rows(v, format);
    p.T = long(q.shape(0)), p.N = long(q.shape(1)), p.H = long(q.shape(2));
    p.S = long(k.shape(0)), p.K = long(k.shape(1)), p.V = long(v.shape(2));
    require(p.K > 0 && p.N % p.K == 0, "the key/value heads divide the query heads");
    require(has_shape(k, p.S, p.K, p.H) && has_shape(v, p.S, p.K, p.V), "q, k and v have one shape each way");
    require(cu_q.shape(0) == cu_k.shape(0), "queries and keys have the same number of sequences");
    require_offsets(cu_q, p.T);
    require_offsets(cu_k, p.S);
    require(!sink || sink->shape(0) == size_t(p.N), "one sink per query head");
    require(block_size > 0 && num_threads > 0, "at least one key per block and one thread");
    p.cu_q = cu_q.data(), p.cu_k = cu_k.data(), p.num_sequences = long(cu_q.shape(0)) - 1;
    p.sink = sink ? sink->data() : nullptr;
    p.block_size = block_size, p.scale = float(scale), p.num_threads = num_threads;
}

void fill_lists(sateen::SparseShape& p, const Lists& lists) {
    require(lists.shape(0) == size_t(p.K) && lists.shape(1) == size_t(p.T), "lists are [K, T, n]");
    p.lists = lists.data(), p.listed = long(lists.shape(2));
}

void sparse_forward(const Numbers3& q, const Numbers3& k, const Numbers3& v, int format, const Lists& lists,
                    const Offsets& cu_q, const Offsets& cu_k, const std::optional<Array1>& sink, long block_size,
                    double scale, int num_threads, Dense3& out, Dense2& lse) {
    sateen::SparseForward p;
    fill(p, q, k, v, format, cu_q, cu_k, sink, block_size, scale, num_threads);
    fill_lists(p, lists);
    require(has_shape(out, p.T, p.N, p.V), "out is [T, N, V]");
    require(lse.shape(0) == size_t(p.N) && lse.shape(1) == size_t(p.T), "lse is [N, T]");
    p.out = out.data(), p.lse = lse.data();
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(sparse_forward, p);
}

void sparse_backward(const Numbers3& d_out, const Numbers3& q, const Numbers3& k, const Numbers3& v, int format,
                     const Lists& lists, const Offsets& cu_q, const Offsets& cu_k, const std::optional<Array1>& sink,
                     const Array3& out, const Array2& lse, long block_size, double scale, int num_threads, Dense3& d_q,
                     Dense3& d_k, Dense3& d_v, Dense1& d_sink) {
    sateen::SparseBackward p;
    fill(p, q, k, v, format, cu_q, cu_k, sink, block_size, scale, num_threads);
    fill_lists(p, lists);
    require(has_shape(d_out, p.T, p.N, p.V) && has_shape(out, p.T, p.N, p.V), "out and d_out are [T, N, V]");
    require(lse.shape(0) == size_t(p.N) && lse.shape(1) == size_t(p.T), "lse is [N, T]");
    require(has_shape(d_q, p.T, p.N, p.H) && has_shape(d_k, p.S, p.K, p.H) && has_shape(d_v, p.S, p.K, p.V),
            "gradients have the shapes of q, k and v");
    require(d_sink.shape(0) == (sink ? size_t(p.N) : 0), "d_sink is [N] with sinks and empty without");
    p.d_out = rows(d_out, int(sateen::Format::f32)), p.out = out.data(), p.lse = lse.data();
    p.d_q = d_q.data(), p.d_k = d_k.data(), p.d_v = d_v.data(), p.d_sink = sink ? d_sink.data() : nullptr;
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(sparse_backward, p);
}

void oracle_forward(const Numbers3& q, const Numbers3& k, const Numbers3& v, int format, const Offsets& cu_q,
                    const Offsets& cu_k, const std::optional<Array1>& sink, long block_size, double scale, int num_threads,
                    long listed, long forced_window, bool is_mean, Dense3& out, Dense2& lse, const std::optional<Dense3>& maxima,
                    const std::optional<NewLists>& lists) {
    sateen::OracleForward p;
    fill(p, q, k, v, format, cu_q, cu_k, sink, block_size, scale, num_threads);
    require(has_shape(out, p.T, p.N, p.V), "out is [T, N, V]");
    require(lse.shape(0) == size_t(p.N) && lse.shape(1) == size_t(p.T), "lse is [N, T]");
    require(listed >= 0 && forced_window >= 0, "counts are not negative");
    require(!maxima || (maxima->shape(0) == size_t(p.N) && maxima->shape(1) == size_t(p.T)), "maxima are [N, T, blocks]");
    require(!lists || has_shape(*lists, p.K, p.T, lists->shape(2)), "lists are [K, T, n]");
    require(!lists || long(lists->shape(2)) >= listed, "lists have room for the chosen blocks");
    p.out = out.data(), p.lse = lse.data();
    p.maxima = maxima ? maxima->data() : nullptr, p.num_blocks = maxima ? long(maxima->shape(2)) : 0;
    p.lists = lists ? lists->data() : nullptr, p.listed = listed, p.forced_window = forced_window, p.is_mean = is_mean;
    p.recent = lists ? long(lists->shape(2)) - listed : 0;
    for (long i = 0; maxima && i < p.num_sequences; ++i)
        require(long(p.cu_k[i + 1] - p.cu_k[i]) <= p.num_blocks * block_size, "maxima have a column per block");
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(oracle_forward, p);
}

}  // namespace

namespace sateen {

void bind_sparse(nb::module_& m) {
    m.def("sparse_forward", &sparse_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("format"), nb::arg("lists"),
          nb::arg("cu_q"), nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("block_size"), nb::arg("scale"),
          nb::arg("num_threads"), nb::arg("out"), nb::arg("lse"));
    m.def("sparse_backward", &sparse_backward, nb::arg("d_out"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("format"),
          nb::arg("lists"), nb::arg("cu_q"), nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("out"), nb::arg("lse"),
          nb::arg("block_size"), nb::arg("scale"), nb::arg("num_threads"), nb::arg("d_q"), nb::arg("d_k"), nb::arg("d_v"),
          nb::arg("d_sink"));
    m.def("oracle_forward", &oracle_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("format"), nb::arg("cu_q"),
          nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("block_size"), nb::arg("scale"), nb::arg("num_threads"),
          nb::arg("listed"), nb::arg("forced_window"), nb::arg("is_mean"), nb::arg("out"), nb::arg("lse"),
          nb::arg("maxima").none(), nb::arg("lists").none());
}

}  // namespace sateen
