// SPDX-License-Identifier: Apache-2.0
// Splits a range of work over OpenMP threads; small work stays on the calling thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace meft {

// Calls body(begin, end) on disjoint pieces of [0, n). A thread gets at least `grain` items; pieces start at multiples
// of `align` items, so that two threads do not write one cache line. The thread count comes from the caller
// (torch.get_num_threads), because an extension may be linked to another OpenMP runtime than torch.
template <class Body>
void split(int64_t n, int64_t grain, int64_t align, int threads, const Body& body) {
  const int64_t wanted = std::min<int64_t>(threads, n / std::max<int64_t>(grain, 1));
  if (wanted <= 1) {
    if (n > 0) body(0, n);
    return;
  }
  const int64_t piece = ((n + wanted - 1) / wanted + align - 1) / align * align;
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(wanted))
  for (int64_t t = 0; t < wanted; ++t) {
    const int64_t begin = t * piece, end = std::min(n, begin + piece);
    if (begin < end) body(begin, end);
  }
}

}  // namespace meft
