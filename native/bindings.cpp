// The Python face of the kernels: `sateen._native`. Arrays come in through DLPack, so no torch headers and no
// particular torch are needed; the GIL is released while a kernel runs.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#ifdef __linux__
#include <malloc.h>
#include <sys/mman.h>
#endif

#include <optional>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "isa.h"
#include "linear.h"

namespace nb = nanobind;

namespace sateen {
void bind_decode(nb::module_& m);  // bindings_decode.cpp
void bind_sparse(nb::module_& m);  // bindings_sparse.cpp
void bind_int8(nb::module_& m);    // bindings_int8.cpp
}

namespace {

using Array3 = nb::ndarray<const float, nb::ndim<3>, nb::device::cpu>;
using Half3 = nb::ndarray<const unsigned short, nb::ndim<3>, nb::device::cpu>;
using Array2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Array1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Dense3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Dense2 = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Dense1 = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Offsets = nb::ndarray<const int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

sateen::Rows rows(const Array3& x) {
    require(x.stride(2) == 1 || x.shape(2) <= 1 || x.size() == 0, "channels must be contiguous");
    return {x.data(), long(x.stride(0)), long(x.stride(1))};
}

// The strides alone: the numbers have 16 bits.
sateen::Rows rows(const Half3& x) {
    require(x.stride(2) == 1 || x.shape(2) <= 1 || x.size() == 0, "channels must be contiguous");
    return {nullptr, long(x.stride(0)), long(x.stride(1))};
}

bool has_shape(const auto& x, size_t a, size_t b, size_t c) {
    return x.shape(0) == a && x.shape(1) == b && x.shape(2) == c;
}

void require_offsets(const Offsets& cu, size_t end) {
    require(cu.shape(0) >= 1 && cu.data()[0] == 0, "offsets start at 0");
    for (size_t i = 1; i < cu.shape(0); ++i) require(cu.data()[i] >= cu.data()[i - 1], "offsets do not decrease");
    require(size_t(cu.data()[cu.shape(0) - 1]) == end, "offsets end at the number of tokens");
}

void fill(sateen::AttentionShape& p, const Array3& q, const auto& k, const auto& v, const Offsets& cu_q,
          const Offsets& cu_k, const std::optional<Array1>& sink, double scale, long window, int num_threads) {
    p.q = rows(q), p.k = rows(k), p.v = rows(v);
    p.T = long(q.shape(0)), p.N = long(q.shape(1)), p.H = long(q.shape(2));
    p.S = long(k.shape(0)), p.K = long(k.shape(1)), p.V = long(v.shape(2));
    require(p.K > 0 && p.N % p.K == 0, "the key/value heads divide the query heads");
    require(has_shape(k, p.S, p.K, p.H) && has_shape(v, p.S, p.K, p.V), "q, k and v have one shape each way");
    require(cu_q.shape(0) == cu_k.shape(0), "queries and keys have the same number of sequences");
    require_offsets(cu_q, p.T);
    require_offsets(cu_k, p.S);
    require(!sink || sink->shape(0) == size_t(p.N), "one sink per query head");
    require(num_threads > 0, "at least one thread");
    p.cu_q = cu_q.data(), p.cu_k = cu_k.data(), p.num_sequences = long(cu_q.shape(0)) - 1;
    p.sink = sink ? sink->data() : nullptr;
    p.scale = float(scale), p.window = window > 0 ? window : 0, p.num_threads = num_threads;
}

void run_attention_forward(sateen::AttentionForward& p, Dense3& out, Dense2& lse) {
    require(has_shape(out, p.T, p.N, p.V), "out is [T, N, V]");
    require(lse.shape(0) == size_t(p.N) && lse.shape(1) == size_t(p.T), "lse is [N, T]");
    p.out = out.data(), p.lse = lse.data();
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(attention_forward, p);
}

void attention_forward(const Array3& q, const Array3& k, const Array3& v, const Offsets& cu_q, const Offsets& cu_k,
                       const std::optional<Array1>& sink, double scale, long window, int num_threads, Dense3& out,
                       Dense2& lse) {
    sateen::AttentionForward p;
    fill(p, q, k, v, cu_q, cu_k, sink, scale, window, num_threads);
    run_attention_forward(p, out, lse);
}

void attention_forward_half(const Array3& q, const Half3& k, const Half3& v, bool is_bf16, const Offsets& cu_q,
                            const Offsets& cu_k, const std::optional<Array1>& sink, double scale, long window,
                            int num_threads, Dense3& out, Dense2& lse) {
    sateen::AttentionForward p;
    fill(p, q, k, v, cu_q, cu_k, sink, scale, window, num_threads);
    p.half = {k.data(), v.data(), is_bf16};
    run_attention_forward(p, out, lse);
}

void attention_backward(const Array3& d_out, const Array3& q, const Array3& k, const Array3& v, const Offsets& cu_q,
                        const Offsets& cu_k, const std::optional<Array1>& sink, const Array3& out, const Array2& lse,
                        double scale, long window, int num_threads, Dense3& d_q, Dense3& d_k, Dense3& d_v,
                        Dense1& d_sink) {
    sateen::AttentionBackward p;
    fill(p, q, k, v, cu_q, cu_k, sink, scale, window, num_threads);
    const sateen::Rows out_rows = rows(out);
    require(has_shape(d_out, p.T, p.N, p.V) && has_shape(out, p.T, p.N, p.V), "out and d_out are [T, N, V]");
    require(p.T == 0 || (out_rows.token_stride == p.N * p.V && (p.N == 1 || out_rows.head_stride == p.V)), "out is contiguous");
    require(lse.shape(0) == size_t(p.N) && lse.shape(1) == size_t(p.T), "lse is [N, T]");
    require(has_shape(d_q, p.T, p.N, p.H) && has_shape(d_k, p.S, p.K, p.H) && has_shape(d_v, p.S, p.K, p.V),
            "gradients have the shapes of q, k and v");
    require(d_sink.shape(0) == (sink ? size_t(p.N) : 0), "d_sink is [N] with sinks and empty without");
    p.d_out = rows(d_out), p.out = out.data(), p.lse = lse.data();
    p.d_q = d_q.data(), p.d_k = d_k.data(), p.d_v = d_v.data(), p.d_sink = sink ? d_sink.data() : nullptr;
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(attention_backward, p);
}

using Bytes = nb::ndarray<const unsigned char, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Asks for pages of 2 MB where the system has them on request; true where it took the advice.
bool advise_huge_pages(const nb::ndarray<unsigned char, nb::ndim<1>, nb::c_contig, nb::device::cpu>& memory) {
#ifdef __linux__
    constexpr size_t kPage = size_t(1) << 21;
    const size_t from = (size_t(memory.data()) + kPage - 1) / kPage * kPage;
    const size_t to = (size_t(memory.data()) + memory.shape(0)) / kPage * kPage;
    return to > from && madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE) == 0;
#else
    return memory.shape(0) == 0;
#endif
}

void release_free_memory() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

void linear_forward(int format, long rows, long columns, const Bytes& weight, const std::optional<Bytes>& scales,
                    const std::optional<Array1>& bias, const Array2& x, int num_threads, Dense2& out) {
    require(format >= 0 && format <= int(sateen::Format::int4), "an unknown format");
    sateen::LinearForward p;
    p.linear = {sateen::Format(format), rows, columns, weight.data(), scales ? scales->data() : nullptr,
                bias ? bias->data() : nullptr};
    const sateen::LinearBytes bytes = linear_bytes(p.linear.format, rows, columns);
    require(rows > 0 && columns > 0 && weight.shape(0) == size_t(bytes.weight), "the weight has the bytes of its format");
    require((scales ? scales->shape(0) : 0) == size_t(bytes.scales), "the scales have the bytes of their format");
    require(!bias || bias->shape(0) == size_t(rows), "bias is [rows]");
    require(x.shape(1) == size_t(columns), "x is [M, columns]");
    require(out.shape(0) == x.shape(0) && out.shape(1) == size_t(rows), "out is [M, rows]");
    require(num_threads > 0, "at least one thread");
    p.x = x.data(), p.M = long(x.shape(0)), p.x_stride = columns;
    p.y = out.data(), p.y_stride = rows, p.num_threads = num_threads;
    nb::gil_scoped_release release;
    SATEEN_DISPATCH(linear_forward, p);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "Sateen's compiled CPU kernels; use them through sateen.ops.";
    m.def("select_isa", [](const std::string& name) { return std::string(sateen::isa_name(sateen::select_isa(name))); },
          nb::arg("name"), "Sets the instruction set by name, the best one when empty; returns its name.");
    m.def("current_isa", [] { return std::string(sateen::isa_name(sateen::current_isa())); },
          "The instruction set that kernels run with.");
    m.def("attention_forward", &attention_forward, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cu_q"),
          nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("scale"), nb::arg("window"), nb::arg("num_threads"),
          nb::arg("out"), nb::arg("lse"));
    m.def("attention_forward_half", &attention_forward_half, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("is_bf16"),
          nb::arg("cu_q"), nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("scale"), nb::arg("window"),
          nb::arg("num_threads"), nb::arg("out"), nb::arg("lse"));
    m.def("attention_backward", &attention_backward, nb::arg("d_out"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
          nb::arg("cu_q"), nb::arg("cu_k"), nb::arg("sink").none(), nb::arg("out"), nb::arg("lse"), nb::arg("scale"),
          nb::arg("window"), nb::arg("num_threads"), nb::arg("d_q"), nb::arg("d_k"), nb::arg("d_v"), nb::arg("d_sink"));
    m.def("release_free_memory", &release_free_memory);
    m.def("advise_huge_pages", &advise_huge_pages, nb::arg("memory"));
    m.def("linear_forward", &linear_forward, nb::arg("format"), nb::arg("rows"), nb::arg("columns"), nb::arg("weight"),
          nb::arg("scales").none(), nb::arg("bias").none(), nb::arg("x"), nb::arg("num_threads"), nb::arg("out"));
    sateen::bind_decode(m);
    sateen::bind_sparse(m);
    sateen::bind_int8(m);
}
