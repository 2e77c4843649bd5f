// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>

namespace emulated {

constexpr auto kType = c10::DeviceType::PrivateUse1;

// A CPU tensor over a device tensor's memory. Only what runs on a stream may touch its values.
at::Tensor host_view(const at::Tensor& tensor);

}  // namespace emulated
