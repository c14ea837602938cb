// pairloss._cuda: engine.h for Python. Pointers come as integers, 0 for null; pairloss/cuda.py keeps their tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "engine.h"

#ifndef PAIRLOSS_DEVICE_TYPE  // the tests build the module for tensors on the CPU
#define PAIRLOSS_DEVICE_TYPE "cuda"
#endif

namespace py = pybind11;

namespace pairloss::cuda {

// Calls f with a number of the dtype's type as tag.
template <class F>
auto with_kernels(const std::string& dtype, F f) {
  if (dtype == "float64") return f(Kernels<double>());
  if (dtype == "float32") return f(Kernels<float>());
  if (dtype == "float16") return f(Kernels<Float16>());
  if (dtype == "bfloat16") return f(Kernels<Bfloat16>());
  throw std::invalid_argument("pairloss._cuda: no kernels for " + dtype);
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
    double margin, double gamma, uintptr_t cutoff, int device, uintptr_t stream) {
  return {x, y, symmetric, d, sets, words, self_offset.has_value(), self_offset.value_or(0), circle, margin, gamma, pointer(cutoff), device,
      pointer(stream)};
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

  py::class_<Side>(module, "Side", py::module_local()).def(py::init(&make_side), py::kw_only(), py::arg("n"), py::arg("rows"), py::arg("ids"), py::arg("id_ranges"),
      py::arg("bias"), py::arg("weights"), py::arg("weight_ranges"));
  py::class_<Call>(module, "Call", py::module_local()).def(py::init(&make_call), py::kw_only(), py::arg("x"), py::arg("y"), py::arg("symmetric"), py::arg("d"),
      py::arg("sets"), py::arg("words"), py::arg("self_offset"), py::arg("circle"), py::arg("margin"), py::arg("gamma"), py::arg("cutoff"),
      py::arg("device"), py::arg("stream"));

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
}
