// SPDX-License-Identifier: Apache-2.0
// Products with a sparse matrix given as gather lists: of the columns of a row-major matrix (sketch) and of its rows
// (combine). Each result is summed by one thread, in the order of its list: results do not depend on threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "tiles.h"
#include "vectors.h"

namespace meft {

// A gather list as Python hands it over: index [outputs, width] of 2 (unsigned) or 4 bytes, value fp16 alike.
struct ListView {
  const void* index;
  int index_bytes;
  const uint16_t* value;
  int64_t outputs, width;

  int64_t index_at(int64_t i) const {
    return index_bytes == 2 ? static_cast<const uint16_t*>(index)[i] : static_cast<const int32_t*>(index)[i];
  }
};

struct Entry {
  int32_t at;
  float factor;
};

// The list ready for kernels: checked once, factors in fp32, outputs rounded up to pairs of vectors. An entry of value
// 0 is absent: it points at position `n`, which kernels keep at zero, so that padding spreads no infinity of position 0
// and every output still takes the same number of entries, without a branch.
inline std::vector<Entry> entries_of(const ListView& list, int64_t n, const char* name) {
  constexpr int64_t kTwo = 2 * kLanes;
  const int64_t rounded = (list.outputs + kTwo - 1) / kTwo * kTwo;
  std::vector<Entry> entries(static_cast<size_t>(rounded * list.width), Entry{static_cast<int32_t>(n), 0.0f});
  for (int64_t i = 0; i < list.outputs * list.width; ++i) {
    const int64_t at = list.index_at(i);
    if (at < 0 || at >= n)
      throw std::invalid_argument(std::string(name) + " must lie in [0, " + std::to_string(n) + "), it holds " +
                                  std::to_string(at));
    const float factor = Float16::get(list.value[i]);
    if (factor != 0.0f) entries[static_cast<size_t>(i)] = Entry{static_cast<int32_t>(at), factor};
  }
  return entries;
}

// Rows of the result for the tokens of one tile; `count` <= kTokens of them are there.
template <class To, int kSums>
void write_rows(Vec (&sums)[kLanes][kSums], typename To::raw* out, int64_t stride, int64_t count, int64_t n) {
  for (int half = 0; half < kSums; ++half) {
    VecBits block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = put_bits(sums[i][half], To());
    transpose(block);
    for (int64_t i = 0; i < kLanes && half * kLanes + i < count; ++i)
      store_bits(out + (half * kLanes + i) * stride, block[i], n);
  }
}

template <class From, class To>
void sketch_tiles(const typename From::raw* x, int64_t T, int64_t n, const std::vector<Entry>& entries, int64_t width,
                  int64_t outputs, typename To::raw* out, int64_t begin, int64_t end) {
  using L = Line<From>;
  Scratch<VecBits> lines(n + 1);
  lines[n] = VecBits{};
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * L::kTokens, count = std::min<int64_t>(L::kTokens, T - first);
    const typename From::raw* rows[L::kTokens];
    for (int64_t i = 0; i < L::kTokens; ++i) rows[i] = x + (first + std::min(i, count - 1)) * n;
    turn<From>(rows, n, lines.get());
    const Entry* entry = entries.data();
    for (int64_t o = 0; o < outputs; o += kLanes) {
      typename L::Sums sums[kLanes];
      for (auto& sum : sums) {
        typename L::Sums own = {};
        for (int64_t w = 0; w < width; ++w, ++entry) L::add(own, lines[entry->at], Vec{} + entry->factor);
        std::copy(std::begin(own), std::end(own), std::begin(sum));
      }
      write_rows<To>(sums, out + first * outputs + o, outputs, count, outputs - o);
    }
  }
}

// out[t, o] = sum over w of x[t, index[o, w]] * value[o, w]; x [T, n] row-major.
inline void sketch(const void* x, int dtype, int64_t T, int64_t n, const ListView& list, void* out, int out_dtype,
                   int threads) {
  const std::vector<Entry> entries = entries_of(list, n, "index");
  with_dtype(dtype, [&](auto from) {
    with_dtype(out_dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      const int64_t tiles = (T + Line<From>::kTokens - 1) / Line<From>::kTokens;
      const int team = team_for(T * std::max(n, list.outputs * list.width), threads);
      // Few pieces, since each needs memory for a tile; more than threads, since one may be delayed.
      split(tiles, tiles / (4 * team) + 1, team, [&](int64_t begin, int64_t end) {
        sketch_tiles<From, To>(static_cast<const typename From::raw*>(x), T, n, entries, list.width, list.outputs,
                               static_cast<typename To::raw*>(out), begin, end);
      });
    });
  });
}

// out[o, :] = sum over w of value[o, w] * z[index[o, w], :], fp32; z [m, columns] row-major.
inline void combine(const void* z, int dtype, int64_t m, int64_t columns, const ListView& list, float* out,
                    int threads) {
  const std::vector<Entry> entries = entries_of(list, m, "index");
  const int64_t width = list.width;
  with_dtype(dtype, [&](auto from) {
    using From = decltype(from);
    const auto* rows = static_cast<const typename From::raw*>(z);
    split(list.outputs, 16, team_for(list.outputs * width * columns, threads), [&](int64_t begin, int64_t end) {
      std::vector<const typename From::raw*> own(static_cast<size_t>(width));
      std::vector<float> factors(static_cast<size_t>(width));
      for (int64_t o = begin; o < end; ++o) {
        int64_t held = 0;
        for (int64_t w = 0; w < width; ++w) {
          const Entry& entry = entries[static_cast<size_t>(o * width + w)];
          if (entry.at == m) continue;
          own[static_cast<size_t>(held)] = rows + entry.at * columns;
          factors[static_cast<size_t>(held++)] = entry.factor;
        }
        weighted_sum<From, Float32>(factors.data(), own.data(), held, columns, false, out + o * columns);
      }
    });
  });
}

}  // namespace meft
