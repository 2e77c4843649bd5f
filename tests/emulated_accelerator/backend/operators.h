// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace emulated {

constexpr auto kType = c10::DeviceType::PrivateUse1;

// A CPU tensor over a device tensor's memory. Only what runs on a stream may touch its values.
at::Tensor host_view(const at::Tensor& tensor);

// What who reads values at once sees of a device tensor: its memory, or what stands for it where a clock runs.
at::Tensor values_of(const at::Tensor& tensor);

bool ours(const at::Tensor& t);

}  // namespace emulated
