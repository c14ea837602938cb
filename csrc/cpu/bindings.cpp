// pairloss._cpu: engine.h and targets.h for Python. Pointers come as integers, 0 for null; pairloss/cpu.py keeps their tensors alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "engine.h"
#include "targets.h"

namespace py = pybind11;
using pairloss::Call;
using pairloss::Gradients;

namespace {

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Call make_call(bool is_double, bool bfloat16, bool half, bool symmetric, bool has_ids, int64_t n, int64_t m, int64_t d, uintptr_t x,
    uintptr_t y, uintptr_t order_x, uintptr_t order_y, std::optional<double> norm, uintptr_t ids_x, uintptr_t ids_y, int64_t words,
    std::optional<int64_t> self_offset, uintptr_t row_bias, uintptr_t col_bias, bool circle, double margin, double gamma, double cutoff,
    double logit_bound, bool totals, bool own, int64_t tile, int threads) {
  return {is_double, bfloat16, half, symmetric, has_ids, n, m, d, pointer(x), pointer(y), pointer<int64_t>(order_x), pointer<int64_t>(order_y),
      norm.has_value(), norm.value_or(0), pointer<int64_t>(ids_x), pointer<int64_t>(ids_y), words, self_offset.has_value(),
      self_offset.value_or(0), pointer(row_bias), pointer(col_bias), circle, margin, gamma, cutoff, logit_bound, totals, own, tile, threads};
}

Gradients gradients(uintptr_t dx, uintptr_t dy, uintptr_t dnorm, uintptr_t drow_bias, uintptr_t dcol_bias) {
  return {pointer(dx), pointer(dy), pointer(dnorm), pointer(drow_bias), pointer(dcol_bias)};
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  using release = py::call_guard<py::gil_scoped_release>;

  py::class_<Call>(module, "Call")
      .def(py::init(&make_call), py::kw_only(), py::arg("is_double"), py::arg("bfloat16"), py::arg("half"), py::arg("symmetric"),
          py::arg("has_ids"), py::arg("n"), py::arg("m"), py::arg("d"), py::arg("x"), py::arg("y"), py::arg("order_x"), py::arg("order_y"),
          py::arg("norm"), py::arg("ids_x"), py::arg("ids_y"), py::arg("words"), py::arg("self_offset"), py::arg("row_bias"),
          py::arg("col_bias"), py::arg("circle"), py::arg("margin"), py::arg("gamma"), py::arg("cutoff"), py::arg("logit_bound"), py::arg("totals"),
          py::arg("own"), py::arg("tile"), py::arg("threads"));

  module.def(
      "row_stats",
      [](const Call& call, uintptr_t row_logs, uintptr_t row_sums, uintptr_t col_logs, uintptr_t col_sums) {
        pairloss::row_stats(call, pointer(row_logs), pointer(row_sums), pointer(col_logs), pointer(col_sums));
      },
      release());
  module.def(
      "row_stats_backward",
      [](const Call& call, uintptr_t row_sums, uintptr_t row_grads, uintptr_t col_sums, uintptr_t col_grads, uintptr_t dx, uintptr_t dy,
          uintptr_t dnorm, uintptr_t drow_bias, uintptr_t dcol_bias) {
        pairloss::row_stats_backward(call, pointer(row_sums), pointer(row_grads), pointer(col_sums), pointer(col_grads),
            gradients(dx, dy, dnorm, drow_bias, dcol_bias));
      },
      release());
  module.def(
      "pair_sum",
      [](const Call& call, bool over_positives, bool softplus, uintptr_t sums, uintptr_t weights, uintptr_t dx, uintptr_t dy,
          uintptr_t dnorm, uintptr_t drow_bias, uintptr_t dcol_bias) {
        pairloss::pair_sum(
            call, over_positives, softplus, pointer(sums), pointer(weights), gradients(dx, dy, dnorm, drow_bias, dcol_bias));
      },
      release());
  module.def(
      "own_products", [](const Call& call, uintptr_t products) { pairloss::own_products(call, pointer(products)); }, release());
  module.def(
      "own_products_backward",
      [](const Call& call, uintptr_t weights, uintptr_t dx, uintptr_t dy, uintptr_t dnorm) {
        pairloss::own_products_backward(call, pointer(weights), gradients(dx, dy, dnorm, 0, 0));
      },
      release());
  module.def("targets", &pairloss::targets);
  module.def("use_target", &pairloss::use_target);
}
