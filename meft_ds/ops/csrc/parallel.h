// SPDX-License-Identifier: Apache-2.0
// Splits a range of work over OpenMP threads; small work stays on the calling thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace meft {

// Below this many multiplications one thread is faster than waking another.
constexpr int64_t kSmallWork = 1 << 20;

inline int team_for(int64_t work, int threads) { return work < kSmallWork ? 1 : threads; }

// Calls body(begin, end) on disjoint pieces of [0, n), each of `grain` items (the last may be shorter). Threads take
// pieces as they come free, so that one delayed by other load on the machine does not hold up the rest. The thread
// count comes from the caller (torch.get_num_threads): an extension may be linked to another OpenMP runtime than torch.
template <class Body>
void split(int64_t n, int64_t grain, int threads, const Body& body) {
  const int64_t pieces = (n + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(threads, pieces));
  if (team <= 1) {
    if (n > 0) body(0, n);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
  for (int64_t i = 0; i < pieces; ++i) body(i * grain, std::min(n, (i + 1) * grain));
}

}  // namespace meft
