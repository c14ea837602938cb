// pairloss._cuda: engine.h for Python. Pointers come as integers, 0 for null; pairloss/cuda.py keeps their tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "engine.h"

#ifndef PAIRLOSS_DEVICE_TYPE  // the tests build the module for tensors on the CPU
#define PAIRLOSS_DEVICE_TYPE "cuda"
#endif

namespace py = pybind11;

namespace pairloss::cuda {

template <class T>
struct Type {
  using type = T;
};

// Calls f with the dtype's type.
template <class F>
auto with_type(const std::string& dtype, F f) {
  if (dtype == "float64") return f(Type<double>());
  if (dtype == "float32") return f(Type<float>());
  if (dtype == "float16") return f(Type<Float16>());
  if (dtype == "bfloat16") return f(Type<Bfloat16>());
  throw std::invalid_argument("pairloss._cuda: no kernels for " + dtype);
}

template <class F>
auto with_kernels(const std::string& dtype, F f) {
  return with_type(dtype, [&](auto t) { return f(Kernels<typename decltype(t)::type>()); });
}

// Calls f with the vectors of a dtype in which products are added up.
template <class F>
void with_sum(const std::string& dtype, F f) {
  if (dtype == "float64") return f(Vectors<double>());
  if (dtype == "float32") return f(Vectors<float>());
  throw std::invalid_argument("pairloss._cuda: no sums in " + dtype);
}

}  // namespace pairloss::cuda

namespace {

using namespace pairloss::cuda;

template <class V = void>
V* pointer(uintptr_t address) {
  return reinterpret_cast<V*>(address);
}

Side make_side(int64_t n, uintptr_t rows, uintptr_t ids, uintptr_t id_ranges, uintptr_t bias, uintptr_t weights, uintptr_t weight_ranges) {
  return {pointer(rows), pointer<int32_t>(ids), pointer<int32_t>(id_ranges), pointer(bias), pointer(weights), pointer(weight_ranges), n};
}

Call make_call(const Side& x, const Side& y, bool symmetric, int64_t d, int sets, int words, std::optional<int64_t> self_offset, bool circle,
    double margin, double gamma, uintptr_t cutoff, const Stream& stream) {
  return {x, y, symmetric, d, sets, words, self_offset.has_value(), self_offset.value_or(0), circle, margin, gamma, pointer(cutoff), stream};
}

Terms terms_of(const std::string& name) {
  if (name == "exp") return Terms::EXPONENTIAL;
  if (name == "softplus") return Terms::SOFTPLUS;
  if (name == "linear") return Terms::LINEAR;
  throw std::invalid_argument("pairloss._cuda: no term " + name);
}

}  // namespace

PYBIND11_MODULE(PAIRLOSS_MODULE, module) {
  using release = py::call_guard<py::gil_scoped_release>;

  module.attr("device_type") = PAIRLOSS_DEVICE_TYPE;
  module.attr("entries") = ENTRIES;

  py::class_<Stream>(module, "Stream", py::module_local()).def(py::init([](int device, uintptr_t handle) {
    return Stream{device, pointer(handle)};
  }));

  py::class_<Side>(module, "Side", py::module_local()).def(py::init(&make_side), py::kw_only(), py::arg("n"), py::arg("rows"), py::arg("ids"), py::arg("id_ranges"),
      py::arg("bias"), py::arg("weights"), py::arg("weight_ranges"));
  py::class_<Call>(module, "Call", py::module_local()).def(py::init(&make_call), py::kw_only(), py::arg("x"), py::arg("y"), py::arg("symmetric"), py::arg("d"),
      py::arg("sets"), py::arg("words"), py::arg("self_offset"), py::arg("circle"), py::arg("margin"), py::arg("gamma"), py::arg("cutoff"),
      py::arg("stream"));

  module.def("tile", [](const std::string& dtype) {
    const Tile tile = with_kernels(dtype, [](auto kernels) { return kernels.tile(); });
    return py::make_tuple(tile.rows, tile.cols, tile.chunk, tile.gradient);
  });
  module.def(
      "row_stats",
      [](const std::string& dtype, const Call& call, uintptr_t rows_m, uintptr_t rows_s, uintptr_t cols_m, uintptr_t cols_s, int64_t span_x,
          int64_t span_y, bool bounded) {
        const Partials partials{pointer(rows_m), pointer(rows_s), pointer(cols_m), pointer(cols_s), span_x, span_y, bounded};
        with_kernels(dtype, [&](auto kernels) { kernels.row_stats(call, partials); });
      },
      release());
  module.def(
      "gradients",
      [](const std::string& dtype, const Call& call, const std::string& term, int over, uintptr_t visits, int parts, uintptr_t rows,
          uintptr_t bias, uintptr_t sums) {
        const Gradients gradients{terms_of(term), over, pointer<int32_t>(visits), parts, pointer(rows), pointer(bias), pointer(sums)};
        with_kernels(dtype, [&](auto kernels) { kernels.gradients(call, gradients); });
      },
      release());
  module.def(
      "scaled_rows",
      [](const Stream& stream, const std::string& from, const std::string& to, uintptr_t rows, uintptr_t norm, uintptr_t order, int64_t n,
          int64_t d, uintptr_t result) {
        const GivenRows given{pointer(rows), pointer(norm), pointer<int64_t>(order), n, d};
        with_type(from, [&](auto x) {
          with_type(to, [&](auto t) {
            using X = typename decltype(x)::type;
            using T = typename decltype(t)::type;
            if constexpr (std::is_same_v<X, double> == std::is_same_v<T, double>) {
              scaled_rows<X, T>(stream, given, pointer(result));
            } else {
              throw std::invalid_argument("pairloss._cuda: no rows of " + to + " from " + from);
            }
          });
        });
      },
      release());
  module.def(
      "scaled_rows_backward",
      [](const Stream& stream, const std::string& dtype, uintptr_t rows, uintptr_t norm, uintptr_t order, int64_t n, int64_t d,
          uintptr_t grads, uintptr_t drows, uintptr_t along) {
        const GivenRows given{pointer(rows), pointer(norm), pointer<int64_t>(order), n, d};
        with_type(dtype, [&](auto x) {
          scaled_rows_backward<typename decltype(x)::type>(stream, given, pointer(grads), pointer(drows), pointer(along));
        });
      },
      release());
  module.def(
      "total",
      [](const Stream& stream, const std::string& dtype, uintptr_t s, uintptr_t m, uintptr_t sums, uintptr_t logs, int64_t size, int groups,
          bool bounded) {
        with_sum(dtype, [&](auto v) { v.total(stream, pointer(s), pointer(m), pointer(sums), pointer(logs), size, groups, bounded); });
      },
      release());
  module.def(
      "largest",
      [](const Stream& stream, const std::string& dtype, uintptr_t sums, uintptr_t grads, uintptr_t to, int64_t size) {
        with_sum(dtype, [&](auto v) { v.largest(stream, pointer(sums), pointer(grads), pointer(to), size); });
      },
      release());
  module.def(
      "scaled_weights",
      [](const Stream& stream, const std::string& dtype, uintptr_t sums, uintptr_t grads, uintptr_t largest, int64_t parts,
          uintptr_t steepest, uintptr_t weights, uintptr_t unscale, int64_t size) {
        with_sum(dtype, [&](auto v) {
          v.scaled_weights(stream, pointer(sums), pointer(grads), pointer(largest), parts, pointer(steepest), pointer(weights),
              pointer(unscale), size);
        });
      },
      release());
  module.def(
      "sum_of_parts",
      [](const Stream& stream, const std::string& dtype, uintptr_t from, uintptr_t factor, uintptr_t to, int64_t n, int64_t stride,
          int64_t width, int parts) {
        with_sum(dtype, [&](auto v) { v.sum_of_parts(stream, pointer(from), pointer(factor), pointer(to), n, stride, width, parts); });
      },
      release());
  module.def(
      "ranges",
      [](const Stream& stream, const std::string& dtype, uintptr_t values, uintptr_t skipped_at_0, uintptr_t to, int64_t n, int64_t size,
          int vectors) {
        const auto launch = [&](auto v) {
          ranges<decltype(v)>(stream, pointer(values), pointer(skipped_at_0), pointer(to), n, size, vectors);
        };
        if (dtype == "int32") return launch(int32_t());
        with_sum(dtype, [&](auto v) { launch(typename decltype(v)::Number()); });
      },
      release());
}
