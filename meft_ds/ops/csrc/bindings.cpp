// SPDX-License-Identifier: Apache-2.0
// Python face of the kernels. Tensors come as addresses, checked in meft_ds/ops: without torch's headers this file
// compiles in seconds and does not depend on torch's C++ ABI. Every call gives up the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "adam.h"
#include "experts.h"
#include "moves.h"

namespace py = pybind11;
using Address = std::uintptr_t;
using meft::Hyper;
using meft::State;

void bind_sketch(py::module_& module);  // sketch_bindings.cpp

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

void bind_experts(py::module_& module) {
  using NoGil = py::call_guard<py::gil_scoped_release>;
  using meft::Entries;
  using meft::Sizes;

  py::class_<Sizes>(module, "Sizes").def(py::init([](int64_t T, int64_t E, int64_t m, int64_t d) {
    return Sizes{T, E, m, d};
  }));
  py::class_<Entries>(module, "Entries").def(py::init([](Address ends, Address slot, Address candidate) {
    return Entries{at<const int64_t>(ends), at<const int32_t>(slot), at<const int32_t>(candidate)};
  }));
  module.def(
      "top_experts",
      [](Address p, int dtype, int64_t T, int64_t n, int64_t per_token, Address ids, int threads) {
        meft::top_experts(at<const void>(p), dtype, T, n, per_token, at<int64_t>(ids), threads);
      },
      NoGil());
  module.def(
      "expert_scores",
      [](Address x, Address keys, int64_t key_stride, int dtype, const Sizes& n, Address starts, int64_t n_experts,
         Address experts, Address tokens, Address q, int threads) {
        meft::expert_scores(at<const void>(x), at<const void>(keys), key_stride, dtype, n, at<const int64_t>(starts),
                            n_experts, at<const int64_t>(experts), at<const uint8_t>(tokens), at<float>(q), threads);
      },
      NoGil());
  module.def(
      "select_keys",
      [](Address q, Address gates, Address tokens, Address experts, const Sizes& n, int64_t most, Address mask,
         Address active, int threads) {
        meft::select_keys(at<const float>(q), at<const float>(gates), at<const uint8_t>(tokens),
                          at<const int64_t>(experts), n, most, at<uint8_t>(mask), at<uint8_t>(active), threads);
      },
      NoGil());
  module.def(
      "count_entries",
      [](Address mask, Address experts, Address slots, const Sizes& n, Address ends) {
        return meft::count_entries(at<const uint8_t>(mask), at<const int64_t>(experts), at<const int32_t>(slots), n,
                                   at<int64_t>(ends));
      },
      NoGil());
  module.def(
      "list_entries",
      [](Address mask, Address experts, Address slots, const Sizes& n, Address slot, Address candidate) {
        meft::list_entries(at<const uint8_t>(mask), at<const int64_t>(experts), at<const int32_t>(slots), n,
                           at<int32_t>(slot), at<int32_t>(candidate));
      },
      NoGil());
  module.def(
      "expert_forward",
      [](Address x, Address bank, int dtype, const Sizes& n, const Entries& entries, Address scores, Address gates,
         Address kept, Address y, int y_dtype, bool add, int threads) {
        meft::expert_forward(at<const void>(x), at<const void>(bank), dtype, n, entries, at<const float>(scores),
                             at<const float>(gates), at<float>(kept), at<void>(y), y_dtype, add, threads);
      },
      NoGil());
  module.def(
      "expert_backward_tokens",
      [](Address dy, Address bank, int dtype, const Sizes& n, const Entries& entries, Address kept, Address gates,
         Address dq, Address s, Address d_gates, Address dx, int dx_dtype, bool add, int threads) {
        meft::expert_backward_tokens(at<const void>(dy), at<const void>(bank), dtype, n, entries,
                                     at<const float>(kept), at<const float>(gates), at<float>(dq), at<float>(s),
                                     at<float>(d_gates), at<void>(dx), dx_dtype, add, threads);
      },
      NoGil());
  module.def(
      "expert_backward_rows",
      [](Address x, Address dy, int dtype, const Sizes& n, const Entries& entries, Address dq, Address s, Address grad,
         int64_t n_rows, bool add, int threads) {
        meft::expert_backward_rows(at<const void>(x), at<const void>(dy), dtype, n, entries, at<const float>(dq),
                                   at<const float>(s), at<float>(grad), n_rows, add, threads);
      },
      NoGil());
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
  module.def("ascending", [](Address ids, int64_t k, int64_t rows) {
    return meft::ascending(at<const int64_t>(ids), k, rows);
  });
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
  bind_experts(module);
  bind_sketch(module);
}
