// SPDX-License-Identifier: Apache-2.0
// Python face of the sketches and of the subspace update; conventions as in bindings.cpp. A file of its own, so that
// the two are compiled side by side.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "sketch.h"
#include "subspace.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using meft::Hyper;
using meft::ListView;
using meft::Update;

namespace {

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_sketch(py::module_& module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;

  py::class_<ListView>(module, "ListView")
      .def(py::init([](Address index, int index_bytes, Address value, int64_t outputs, int64_t width) {
        return ListView{at<const void>(index), index_bytes, at<const uint16_t>(value), outputs, width};
      }));
  module.def(
      "sketch",
      [](Address x, int dtype, int64_t T, int64_t n, const ListView& list, Address out, int out_dtype,
         int threads) { meft::sketch(at<const void>(x), dtype, T, n, list, at<void>(out), out_dtype, threads); },
      NoGil());
  module.def(
      "combine",
      [](Address z, int dtype, int64_t m, int64_t columns, const ListView& list, Address out, int threads) {
        meft::combine(at<const void>(z), dtype, m, columns, list, at<float>(out), threads);
      },
      NoGil());
  py::class_<Update>(module, "Update").def(py::init([](double alpha, double decay, uint64_t key, uint32_t step) {
    return Update{static_cast<float>(alpha), static_cast<float>(decay), key, step};
  }));
  module.def(
      "subspace_apply",
      [](Address weight, int dtype, int64_t m, int64_t n, Address s, int s_dtype, int64_t d1, int64_t d2,
         const ListView& p, const ListView& q, const Update& u, Address residual, int threads) {
        meft::subspace_apply(at<void>(weight), dtype, m, n, at<const void>(s), s_dtype, d1, d2, p, q, u,
                             at<float>(residual), threads);
      },
      NoGil());
  module.def(
      "adam_direction",
      [](Address grad, int grad_type, Address m, Address v, int moments, Address out, int out_type, int64_t n,
         const Hyper& h, int64_t step, int threads) {
        meft::adam_direction(at<const void>(grad), grad_type, at<void>(m), at<void>(v), moments, at<void>(out),
                             out_type, n, h, step, threads);
      },
      NoGil());
}
