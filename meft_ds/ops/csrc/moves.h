// SPDX-License-Identifier: Apache-2.0
// Moving rows (as bytes, whatever their dtype) and summing squares.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "parallel.h"

namespace meft {

constexpr int64_t kCopyGrainBytes = 1 << 18;

// Whether ids ascend strictly and lie in [0, rows): one pass, where torch would need several small ops.
inline bool ascending(const int64_t* ids, int64_t k, int64_t rows) {
  if (k == 0) return true;
  bool good = ids[0] >= 0 && ids[k - 1] < rows;
  for (int64_t i = 1; i < k; ++i) good &= ids[i - 1] < ids[i];
  return good;
}

// to[i] = from[ids[i]] for strides and width in bytes.
inline void gather(const char* from, int64_t from_stride, const int64_t* ids, int64_t k, char* to, int64_t to_stride,
                   int64_t width, int threads) {
  split(k, kCopyGrainBytes / std::max<int64_t>(width, 1) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + i * to_stride, from + ids[i] * from_stride, width);
  });
}

// to[ids[i]] = from[i].
inline void scatter(char* to, int64_t to_stride, const int64_t* ids, int64_t k, const char* from, int64_t from_stride,
                    int64_t width, int threads) {
  split(k, kCopyGrainBytes / std::max<int64_t>(width, 1) + 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(to + ids[i] * to_stride, from + i * from_stride, width);
  });
}

// Sums one block in 16 fixed lanes: the order of additions depends on the block only, never on the vector width.
template <class T>
double block_squares(const typename T::raw* __restrict__ x, int64_t n) {
  constexpr int kLanes = 16;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const double value = static_cast<double>(T::get(x[i + lane]));
      lanes[lane] += value * value;
    }
  }
  for (; i < n; ++i) {
    const double value = static_cast<double>(T::get(x[i]));
    lanes[i % kLanes] += value * value;
  }
  double sum = 0.0;
  for (double lane : lanes) sum += lane;
  return sum;
}

// Blocks of a fixed size are summed by any thread and added in order by one, so threads do not change the result.
template <class T>
double squares(const typename T::raw* x, int64_t n, int threads) {
  constexpr int64_t kBlock = 1 << 14;
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  std::vector<double> sums(static_cast<size_t>(blocks));
  split(blocks, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      sums[static_cast<size_t>(b)] = block_squares<T>(x + b * kBlock, std::min(kBlock, n - b * kBlock));
  });
  double sum = 0.0;
  for (double block : sums) sum += block;
  return sum;
}

inline double sq_norm(const void* x, int dtype, int64_t n, int threads) {
  switch (dtype) {
    case kFloat32: return squares<Float32>(static_cast<const float*>(x), n, threads);
    case kBFloat16: return squares<BFloat16>(static_cast<const uint16_t*>(x), n, threads);
    default: return squares<Float16>(static_cast<const uint16_t*>(x), n, threads);
  }
}

}  // namespace meft
