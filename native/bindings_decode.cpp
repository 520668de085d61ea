// The Python face of decode_plan.h. A plan keeps every array it was given.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "decode_plan.h"

namespace nb = nanobind;

namespace sateen {
namespace {

using Any = nb::ndarray<nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const long, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* message) {
    if (!holds) throw std::invalid_argument(message);
}

Format float_format(const Any& x) {
    const auto type = x.dtype();
    if (type == nb::dtype<float>()) return Format::f32;
    require(type.bits == 16 && type.lanes == 1, "numbers are float32, bfloat16 or float16");
    if (type.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return Format::bf16;
    require(type.code == uint8_t(nb::dlpack::dtype_code::Float), "numbers are float32, bfloat16 or float16");
    return Format::f16;
}

struct BoundPlan {
    DecodePlan plan;
    std::vector<Any> kept;
    std::vector<Floats> kept_floats;
    std::vector<const float*> vectors;
    std::vector<Linear> linears;
    int num_heads = 0;

    BoundPlan(long hidden_size, double eps, long page) : plan(hidden_size, float(eps), page) {}

    int vector(const Any& x) {
        kept.push_back(x);
        vectors.push_back(plan.vector(x.data(), float_format(x), long(x.size())));
        return int(vectors.size()) - 1;
    }

    // A matrix as linear.h reads it: floats as they are, or codes of a low-bit format with their scales. Of a stack of
    // `count` matrices the first.
    int linear(int format, long rows, long columns, const Any& weight, const std::optional<Any>& scales, int bias, long count) {
        Linear linear{Format(format), rows, columns, weight.data(), scales ? scales->data() : nullptr, at(bias)};
        const LinearBytes bytes = linear_bytes(linear.format, rows, columns);
        require(long(weight.nbytes()) == bytes.weight * count, "the weight has the bytes of its format and shape");
        require(long(scales ? scales->nbytes() : 0) == bytes.scales * count, "the scales have the bytes of their format and shape");
        kept.push_back(weight);
        if (scales) kept.push_back(*scales);
        linears.push_back(linear);
        return int(linears.size()) - 1;
    }

    // What int8 rows have besides their codes.
    CacheScales scales(const nb::dict& of, long rows, long K, long H) {
        const auto k = nb::cast<Floats>(of["k_scale"]), v = nb::cast<Floats>(of["v_scale"]), mean = nb::cast<Floats>(of["k_mean"]);
        require(long(k.size()) == rows * K && long(v.size()) == rows * K && mean.size() % size_t(K * H) == 0,
                "int8 rows have a scale per head and a key mean per sequence");
        for (const Floats& x : {k, v, mean}) kept_floats.push_back(x);
        return {k.data(), v.data(), mean.data(), bool(nb::cast<int>(of["integers"]))};
    }

    const float* at(int vector) const { return vector < 0 ? nullptr : vectors.at(size_t(vector)); }

    int angles(const Floats& frequencies) { return plan.angles(frequencies.data(), long(frequencies.size())); }

    // What a layer of HySparse chooses, lends and reads.
    void sparse(const nb::dict& of, DecodeLayer& l) {
        const auto number = [&](const char* name) { return nb::cast<int>(of[name]); };
        SparseParts& s = l.sparse;
        s.listed = number("listed"), s.recent = number("recent"), s.block_size = number("block_size"), s.forced_window = number("forced_window");
        s.source = 1 + number("source"), s.angles = number("listed_angles"), s.sink = at(number("listed_sink"));
        s.lends_input = number("lends_input"), s.borrows_input = number("borrows_input");
        require(s.listed >= 0 && s.recent >= 0 && s.forced_window >= 0 && s.block_size >= (s.listed ? 1 : 0), "counts are not negative");
        require(s.source <= plan.num_layers() && (!s.source || plan.layer(s.source - 1).sparse.listed), "a reader's source is an oracle before it");
        if (!s.source) return;
        const DecodeLayer& source = plan.layer(s.source - 1);
        require(source.H == l.H && source.V == l.V && l.N % source.K == 0, "a reader has its source's channels");
    }

    // Indices of vectors and matrices by name; `experts` and `head` are there where the layer has them.
    void layer(const nb::dict& of, const Any& k, const Any& v) {
        const auto number = [&](const char* name) { return nb::cast<int>(of[name]); };
        const auto matrix = [&](const char* name) { return number(name) < 0 ? Linear{} : linears.at(size_t(number(name))); };
        DecodeLayer l{};
        l.input_norm = at(number("input_norm")), l.mlp_norm = at(number("mlp_norm"));
        l.q_norm = at(number("q_norm")), l.k_norm = at(number("k_norm")), l.sink = at(number("sink"));
        l.q = matrix("q"), l.k = matrix("k"), l.v = matrix("v"), l.o = matrix("o");
        l.gate = matrix("gate"), l.up = matrix("up"), l.down = matrix("down");
        require(k.ndim() == 3 && v.ndim() == 3 && k.shape(0) == v.shape(0) && k.shape(1) == v.shape(1),
                "the cache has keys [rows, K, H] and values [rows, K, V]");
        l.K = long(k.shape(1)), l.H = long(k.shape(2)), l.V = long(v.shape(2));
        l.N = l.q.rows / l.H, l.F = l.gate.rows;
        if (of.contains("router")) {
            Experts& e = l.experts;
            e.E = number("num_experts"), e.A = number("experts_per_token");
            require(e.E >= e.A && e.A > 0, "a token has at most all experts");
            e.router = {Format::f32, e.E, plan.D, at(number("router")), nullptr, nullptr};
            e.bias = at(number("router_bias")), e.scaling = nb::cast<float>(of["scaling"]), e.normalised = number("is_normalised");
        }
        if (of.contains("gate_proj")) {
            l.sparse.gate = matrix("gate_proj");
            require(l.sparse.gate.columns == plan.D && l.sparse.gate.rows % l.N == 0 && prepared_like(l.sparse.gate.format) == prepared_like(l.q.format),
                    "gates read what queries read");
        }
        if (of.contains("block_size")) sparse(of, l);
        const bool has_rows = !l.sparse.source || l.k.rows;
        require(l.q.rows == l.N * l.H && (!has_rows || (l.k.rows == l.K * l.H && l.v.rows == l.K * l.V)) && l.N % l.K == 0 &&
                    l.o.columns == l.N * l.V && l.up.rows == l.F && l.down.columns == l.F,
                "projections and cache agree on heads and channels");
        for (const Linear* linear : {&l.q, &l.k, &l.v, &l.gate, &l.up})
            require(linear->columns == plan.D || !linear->rows, "layers read the residual stream");
        require(l.o.rows == plan.D && l.down.rows == plan.D, "layers write the residual stream");
        require((!has_rows || (prepared_like(l.q.format) == prepared_like(l.k.format) && prepared_like(l.q.format) == prepared_like(l.v.format))) &&
                    prepared_like(l.gate.format) == prepared_like(l.up.format),
                "matrices with one input have one format");
        require(k.dtype() == v.dtype(), "keys and values have one format");
        const bool is_scaled = of.contains("k_scale");
        if (is_scaled) require(k.dtype() == nb::dtype<signed char>(), "rows with scales are int8");
        l.cache = {k.data(), v.data(), is_scaled ? Format::int8 : float_format(k), number("ring_rows"), {}};
        if (is_scaled) l.cache.scales = scales(of, long(k.shape(0)), l.K, l.H);
        l.value_scale = nb::cast<float>(of["value_scale"]), l.angles = number("angles");
        kept.push_back(k), kept.push_back(v);
        if (!of.contains("join")) return plan.add(l, number("window"));
        const DecodeHead head{at(number("hidden_norm")), at(number("embedding_norm")), at(number("final_norm")), matrix("join"),
                              bool(number("hidden_first"))};
        require(head.join.rows == plan.D && head.join.columns == 2 * plan.D, "a head joins two hidden states");
        plan.add(l, number("window"), &head);
        ++num_heads;
    }

    void ends(int embedding, int head, int final_norm) {
        plan.embedding = linears.at(size_t(embedding)), plan.head = linears.at(size_t(head)), plan.final_norm = at(final_norm);
        require(plan.embedding.format <= Format::f16 && plan.embedding.columns == plan.D && plan.head.columns == plan.D,
                "the embedding has floats and both ends have the residual stream's width");
    }

    void step(int head, const std::optional<Floats>& hidden, const Numbers& ids, const Numbers& first_token, const Numbers& start, const Numbers& page_rows,
              const Numbers& first_page, const Numbers& slot, const Numbers& mean_rows, const Floats& x, const Ints& routes, const Ints& lists, int num_threads) {
        const long B = long(start.size());
        require(long(first_token.size()) == B + 1 && long(first_page.size()) == B && long(slot.size()) == B && long(mean_rows.size()) == B, "one number per sequence");
        const long T = first_token.data()[B];
        require(x.ndim() == 2 && long(x.shape(0)) == T && long(x.shape(1)) == plan.D, "x is [T, D]");
        require(long(ids.size()) == T, "one id per token");
        require(head < num_heads && (head < 0) == !hidden && (!hidden || hidden->size() == x.size()), "a head reads hidden states [T, D]");
        require(head >= 0 || long(routes.size()) == T * plan.routes_per_token(), "routes have the experts of every token and layer");
        require(head >= 0 || long(lists.size()) == T * plan.lists_per_token(), "lists have the blocks of every token and oracle");
        const Batch batch{T, B, ids.data(), first_token.data(), start.data(), page_rows.data(), first_page.data(), slot.data(), mean_rows.data()};
        nb::gil_scoped_release release;
        plan.step(batch, head, hidden ? hidden->data() : nullptr, x.data(), routes.data(), lists.data(), num_threads);
    }

    void logits(const Floats& x, const Floats& out, bool is_normed, int num_threads) {
        require(x.ndim() == 2 && out.ndim() == 2 && x.shape(0) == out.shape(0) && long(x.shape(1)) == plan.D &&
                    long(out.shape(1)) == plan.head.rows, "x is [M, D] and the logits [M, V]");
        nb::gil_scoped_release release;
        plan.logits(x.data(), long(x.shape(0)), is_normed ? nullptr : plan.final_norm, out.data(), num_threads);
    }
};

}  // namespace

void bind_decode(nb::module_& m) {
    nb::class_<BoundPlan>(m, "DecodePlan")
        .def(nb::init<long, double, long>(), nb::arg("hidden_size"), nb::arg("eps"), nb::arg("page"))
        .def("vector", &BoundPlan::vector)
        .def("linear", &BoundPlan::linear, nb::arg("format"), nb::arg("rows"), nb::arg("columns"), nb::arg("weight"),
             nb::arg("scales").none(), nb::arg("bias"), nb::arg("count") = 1)
        .def("angles", &BoundPlan::angles)
        .def("layer", &BoundPlan::layer)
        .def("ends", &BoundPlan::ends)
        .def("step", &BoundPlan::step, nb::arg("head"), nb::arg("hidden").none(), nb::arg("ids"), nb::arg("first_token"), nb::arg("start"), nb::arg("page_rows"),
             nb::arg("first_page"), nb::arg("slot"), nb::arg("mean_rows"), nb::arg("x"), nb::arg("routes"), nb::arg("lists"), nb::arg("num_threads"))
        .def_prop_ro("lists_per_token", [](const BoundPlan& p) { return p.plan.lists_per_token(); })
        .def_prop_ro("routes_per_token", [](const BoundPlan& p) { return p.plan.routes_per_token(); })
        .def("logits", &BoundPlan::logits, nb::arg("x"), nb::arg("out"), nb::arg("is_normed"), nb::arg("num_threads"));
}

}  // namespace sateen
