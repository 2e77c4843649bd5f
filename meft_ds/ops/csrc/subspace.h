// SPDX-License-Identifier: Apache-2.0
// The subspace update of a weight, W <- round(decay * W + alpha * P s Q^T), without any temporary of W's size: W is read
// and written once. And the direction of Adam that s is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "adam.h"
#include "numbers.h"
#include "parallel.h"
#include "philox.h"
#include "sketch.h"
#include "tiles.h"
#include "vectors.h"

namespace meft {

// Columns worked on at a time: a kLanes-row block of the update stays in the first-level cache, beside what it is read by.
constexpr int64_t kUpdateColumns = 256;

struct Update {
  float alpha, decay;
  uint64_t key;
  uint32_t step;
};

// A row of alpha * P s: the rows of s that it is made of, and their factors.
template <class S>
struct RowSum {
  std::vector<const typename S::raw*> rows;
  std::vector<float> factors;

  RowSum(const typename S::raw* s, int64_t columns, const Entry* entry, int64_t width, int64_t absent, float alpha) {
    for (int64_t w = 0; w < width; ++w) {
      if (entry[w].at == absent) continue;
      rows.push_back(s + entry[w].at * columns);
      factors.push_back(alpha * entry[w].factor);
    }
  }

  // Columns from `at` on, `n` <= kVectors * kLanes of them; what lies behind them is not defined.
  template <int kVectors>
  void add_up(int64_t at, int64_t n, float* to) const {
    Vec sums[kVectors] = {};
    for (size_t w = 0; w < rows.size(); ++w) {
      const Vec factor = Vec{} + factors[w];
      const typename S::raw* row = rows[w] + at;
      if (n == kVectors * kLanes) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sums[v] = multiply_add(load(row + v * kLanes, S()), factor, sums[v]);
      } else {
        for (int v = 0; v < kVectors && v * kLanes < n; ++v)
          sums[v] = multiply_add(load_some<S>(row + v * kLanes, n - v * kLanes), factor, sums[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) store_bits(to + v * kLanes, bits_of(sums[v]));
  }
};

// Lines [columns] of kLanes rows of alpha * P s: line c holds column c of all rows. Rows beyond `count` repeat the last.
// Stretches of a row are summed before they are turned: rows of s, often a power of two apart, would drive one another
// out of the cache if all were read side by side.
template <class S>
void product_lines(const typename S::raw* s, int64_t columns, const Entry* p, int64_t width, int64_t absent,
                   int64_t count, float alpha, VecBits* lines) {
  constexpr int kVectors = 8, kStretch = kVectors * kLanes;
  std::vector<RowSum<S>> sums;
  for (int64_t i = 0; i < kLanes; ++i)
    sums.emplace_back(s, columns, p + std::min(i, count - 1) * width, width, absent, alpha);
  alignas(64) float stretch[kLanes][kStretch];
  for (int64_t at = 0; at < columns; at += kStretch) {
    for (int i = 0; i < kLanes; ++i)
      sums[static_cast<size_t>(i)].template add_up<kVectors>(at, std::min<int64_t>(kStretch, columns - at), stretch[i]);
    for (int64_t c = 0; c < kStretch && at + c < columns; c += kLanes) {
      VecBits block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = bits_of(load(stretch[i] + c, Float32()));
      transpose(block);
      for (int64_t i = 0; i < kLanes && at + c + i < columns; ++i) lines[at + c + i] = block[i];
    }
  }
}

// The new bits of kLanes weights (or of the first n), which the residual, if there is one, makes up for.
template <class W>
VecBits rounded(Vec value, float* residual, int64_t n) {
  const VecBits bits = put_bits(value, W());
  if (residual != nullptr) {
    typename W::raw kept[kLanes];
    store_bits(kept, bits);
    store_bits(residual, bits_of(value - load(kept, W())), n);
  }
  return bits;
}

// `n` weights in a row, of element number `element` on, with `change` added; n <= kUpdateColumns.
template <class W, bool kRandom>
void update_span(typename W::raw* weight, const float* change, float* residual, int64_t element, const Update& u,
                 int64_t n) {
  const auto value = [&](int64_t c) {
    Vec v = load_some<W>(weight + c, n - c);
    if (residual != nullptr) v += load_some<Float32>(residual + c, n - c);
    return v * u.decay + load(change + c, Float32());
  };
  if constexpr (!kRandom) {
    for (int64_t c = 0; c < n; c += kLanes)
      store_bits(weight + c, rounded<W>(value(c), residual == nullptr ? nullptr : residual + c, n - c), n - c);
  } else {
    const int64_t into = element % kRandomBlock;
    if (into == 0 && n % kRandomBlock == 0) {
      for (int64_t start = 0; start < n; start += kRandomBlock) {
        RandomWords words;
        random_block(static_cast<uint64_t>((element + start) / kRandomBlock), u.key, u.step, words);
#pragma GCC unroll 8
        for (int64_t c = 0; c < kRandomBlock; c += kLanes)
          store_bits(weight + start + c, round_bits(value(start + c), random_halves(words, c), W()));
      }
      return;
    }
    // Rows that do not begin with a block: the halves are laid out first, to be read from any element on.
    uint16_t halves[kUpdateColumns + 2 * kRandomBlock];
    for (int64_t start = 0; start < into + n; start += kRandomBlock) {
      RandomWords words;
      random_block(static_cast<uint64_t>((element + start) / kRandomBlock), u.key, u.step, words);
      for (int64_t c = 0; c < kRandomBlock; c += kLanes) store_bits(halves + start + c, random_halves(words, c));
    }
    for (int64_t c = 0; c < n; c += kLanes)
      store_bits(weight + c, round_bits(value(c), load_halves(halves + into + c), W()), n - c);
  }
}

template <class W, class S, bool kRandom>
void update_rows(typename W::raw* weight, int64_t m, int64_t n, const typename S::raw* s, int64_t d1, int64_t d2,
                 const std::vector<Entry>& p, int64_t p_width, const std::vector<Entry>& q, int64_t q_width,
                 const Update& u, float* residual, int64_t begin, int64_t end) {
  Scratch<VecBits> lines(d2 + 1);
  lines[d2] = VecBits{};
  Scratch<float> change(kLanes * kUpdateColumns);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kLanes, count = std::min<int64_t>(kLanes, m - first);
    product_lines<S>(s, d2, p.data() + first * p_width, p_width, d1, count, u.alpha, lines.get());
    for (int64_t start = 0; start < n; start += kUpdateColumns) {
      const int64_t width = std::min(kUpdateColumns, n - start);
      const Entry* entry = q.data() + start * q_width;
      for (int64_t c = 0; c < width; c += kLanes) {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(weight + (first + i) * n + start + c, 1);
        VecBits block[kLanes];
        for (auto& one : block) {
          Vec sum = {};
          for (int64_t w = 0; w < q_width; ++w, ++entry)
            sum = multiply_add(floats_of(lines[entry->at]), Vec{} + entry->factor, sum);
          one = bits_of(sum);
        }
        transpose(block);
        for (int i = 0; i < kLanes; ++i) store_bits(change.get() + i * kUpdateColumns + c, block[i]);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t element = (first + i) * n + start;
        update_span<W, kRandom>(weight + element, change.get() + i * kUpdateColumns,
                                residual == nullptr ? nullptr : residual + element, element, u, width);
      }
    }
  }
}

// weight [m, n], s [d1, d2], p and q row views over d1 and d2; residual fp32 [m, n] or null.
inline void subspace_apply(void* weight, int dtype, int64_t m, int64_t n, const void* s, int s_dtype, int64_t d1,
                           int64_t d2, const ListView& p, const ListView& q, const Update& u, float* residual,
                           int threads) {
  const std::vector<Entry> p_entries = entries_of(p, d1, "p_index"), q_entries = entries_of(q, d2, "q_index");
  const int64_t tiles = (m + kLanes - 1) / kLanes;
  const int team = team_for(m * n, threads);
  with_dtype(dtype, [&](auto weight_type) {
    with_dtype(s_dtype, [&](auto s_type) {
      using W = decltype(weight_type);
      using S = decltype(s_type);
      const auto run = residual == nullptr && dtype != kFloat32 ? update_rows<W, S, true> : update_rows<W, S, false>;
      split(tiles, tiles / (8 * team) + 1, team, [&](int64_t begin, int64_t end) {
        run(static_cast<typename W::raw*>(weight), m, n, static_cast<const typename S::raw*>(s), d1, d2, p_entries,
            p.width, q_entries, q.width, u, residual, begin, end);
      });
    });
  });
}

// out = m_hat / (sqrt(v_hat) + eps), moments moved on by the gradient.
template <class G, class M, class O>
void direction_span(const void* g_, void* m_, void* v_, void* out_, int64_t begin, int64_t end, const Coefficients& k) {
  const auto* __restrict__ g = static_cast<const typename G::raw*>(g_);
  auto* __restrict__ m = static_cast<typename M::raw*>(m_);
  auto* __restrict__ v = static_cast<typename M::raw*>(v_);
  auto* __restrict__ out = static_cast<typename O::raw*>(out_);
  const Coefficients c = k;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float grad = G::get(g[i]) * c.grad_scale;
    const float mean = multiply_add(c.one_minus_beta1, grad, c.beta1 * M::get(m[i]));
    const float square = multiply_add(c.one_minus_beta2 * grad, grad, c.beta2 * M::get(v[i]));
    m[i] = M::put(mean);
    v[i] = M::put(square);
    out[i] = O::put(c.step_size * (mean / multiply_add(std::sqrt(square), c.root_correction, c.eps)));
  }
}

// All flat [n]. `h` counts with lr = 1 and no weight decay.
inline void adam_direction(const void* grad, int grad_type, void* m, void* v, int moments, void* out, int out_type,
                           int64_t n, const Hyper& h, int64_t step, int threads) {
  const Coefficients c = coefficients(h, step);
  with_dtype(grad_type, [&](auto g) {
    with_dtype(out_type, [&](auto o) {
      const auto run = moments == kFloat32 ? direction_span<decltype(g), Float32, decltype(o)>
                                           : direction_span<decltype(g), BFloat16, decltype(o)>;
      split(n, kAdamGrain, threads, [&](int64_t begin, int64_t end) { run(grad, m, v, out, begin, end, c); });
    });
  });
}

}  // namespace meft
