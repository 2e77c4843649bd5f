// SPDX-License-Identifier: Apache-2.0
// What an operator costs on a device of a profile: the larger of its arithmetic and its bytes, and a fixed time.
#pragma once
#include <ATen/core/ivalue.h>
#include <ATen/core/function_schema.h>

#include <string>
#include <vector>

namespace emulated {

// Rates are those that kernels reach, not the published peaks: the profile has multiplied them by its efficiencies.
struct Rates {
  double matmul_flops = 1e14;      // bf16 and fp16 products with all sides large
  double matmul_half_size = 0;     // a product whose shortest side is this long reaches half of it
  double fp32_flops = 1e13;        // products in fp32
  double bytes = 1e12;             // device memory
  double cache_bytes = 5e12;       // second-level cache, for gathers
  double kernel = 2e-6;            // fixed time of a kernel on the device
  double pinned_down = 2e10, pinned_up = 2e10, pageable_down = 6e9, pageable_up = 6e9;  // PCIe
  double copy_latency = 1e-5;
};
extern Rates rates;

// What an operator does. `shortest` is the shortest side of a product.
struct Effort {
  double bytes = 0, cache_bytes = 0, flops = 0;
  int64_t shortest = 0;
  bool fp32 = false;
};

// `name` without namespace and overload; `args` and `outs` as the operator got and made them.
Effort effort_of(const std::string& name, const c10::FunctionSchema& schema, const std::vector<c10::IValue>& args,
             const std::vector<c10::IValue>& outs);
Effort product(double m, double n, double k, double batch, bool fp32, double bytes);
double seconds_of(const Effort& work);
double touched(const at::Tensor& t);  // bytes of the elements that it shows, expanded dimensions once

}  // namespace emulated
