// SPDX-License-Identifier: Apache-2.0
// Python face of the kernels. Tensors come as addresses, checked in meft_ds/ops: without torch's headers this file
// compiles in seconds and does not depend on torch's C++ ABI. Every call gives up the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "adam.h"
#include "moves.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using meft::Hyper;
using meft::State;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

State state(Address p, Address m, Address v, int moments, Address grad, int grad_type, Address replica,
            int replica_type) {
  return State(at<float>(p), at<char>(m), at<char>(v), at<const char>(grad), at<char>(replica), moments, grad_type,
               replica_type);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;

  py::class_<Hyper>(module, "Hyper").def(py::init([](double lr, double beta1, double beta2, double eps,
                                                     double weight_decay, double grad_scale) {
    return Hyper{lr, beta1, beta2, eps, weight_decay, grad_scale};
  }));
  py::class_<State>(module, "State").def(py::init(&state));

  module.def("adamw", &meft::adamw, NoGil());
  module.def(
      "adamw_rows",
      [](const State& s, Address ids, int64_t k, int64_t rows, int64_t width, const Hyper& h, int64_t step,
         int threads) { meft::adamw_rows(s, at<const int64_t>(ids), k, rows, width, h, step, threads); },
      NoGil());
  module.def(
      "adamw_lazy_rows",
      [](const State& s, Address row_steps, Address row_decay, Address ids, int64_t k, int64_t width, const Hyper& h,
         double decay_log, int threads) {
        meft::adamw_lazy_rows(s, at<int32_t>(row_steps), at<double>(row_decay), at<const int64_t>(ids), k, width, h,
                              decay_log, threads);
      },
      NoGil());
  module.def(
      "gather",
      [](Address from, int64_t from_stride, Address ids, int64_t k, Address to, int64_t to_stride, int64_t width,
         int threads) {
        meft::gather(at<const char>(from), from_stride, at<const int64_t>(ids), k, at<char>(to), to_stride, width,
                     threads);
      },
      NoGil());
  module.def(
      "scatter",
      [](Address to, int64_t to_stride, Address ids, int64_t k, Address from, int64_t from_stride, int64_t width,
         int threads) {
        meft::scatter(at<char>(to), to_stride, at<const int64_t>(ids), k, at<const char>(from), from_stride, width,
                      threads);
      },
      NoGil());
  module.def(
      "sq_norm",
      [](Address x, int dtype, int64_t n, int threads) { return meft::sq_norm(at<const void>(x), dtype, n, threads); },
      NoGil());
}
