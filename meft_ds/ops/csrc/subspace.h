// SPDX-License-Identifier: Apache-2.0
// The subspace update of a weight, W <- round(decay * W + alpha * P s Q^T), without any temporary of W's size: W is
// read and written once. And the direction of Adam that s is.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "adam.h"
#include "numbers.h"
#include "parallel.h"
#include "philox.h"
#include "sketch.h"
#include "tiles.h"
#include "vectors.h"

namespace meft {

// Columns worked on at a time: their change, for kLanes rows, stays in the first-level cache.
constexpr int64_t kUpdateColumns = 256;

struct Update {
  float alpha, decay;
  uint64_t key;
  uint32_t step;
};

// The rows of alpha * P s that a tile needs: of which rows of s each is made, with which factors.
template <class S>
class TileRows {
 public:
  using Raw = typename S::raw;
  static constexpr int kVectors = 8, kStretch = kVectors * kLanes;

  TileRows(const Raw* s, int64_t columns, int64_t width, int64_t absent, float alpha)
      : s_(s), columns_(columns), width_(width), absent_(absent), alpha_(alpha),
        rows_(static_cast<size_t>(kLanes * width)), factors_(static_cast<size_t>(kLanes * width)) {}

  // Rows beyond `count` repeat the last.
  void set(const Entry* entries, int64_t count) {
    for (int64_t i = 0; i < kLanes; ++i) {
      held_[i] = 0;
      for (int64_t w = 0; w < width_; ++w) {
        const Entry& entry = entries[std::min(i, count - 1) * width_ + w];
        if (entry.at == absent_) continue;
        const auto place = static_cast<size_t>(i * width_ + held_[i]++);
        rows_[place] = s_ + entry.at * columns_;
        factors_[place] = alpha_ * entry.factor;
      }
    }
  }

  // lines [columns]: line c holds column c of all rows. Stretches of a row are summed before they are turned: rows of
  // s, often a power of two apart, would drive one another out of the cache if all were read side by side.
  void lines(VecBits* lines) const {
    VecBits stretch[kLanes][kVectors];
    for (int64_t at = 0; at < columns_; at += kStretch) {
      for (int i = 0; i < kLanes; ++i) add_up(i, at, stretch[i]);
      for (int v = 0; v < kVectors; ++v) {
        VecBits block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = stretch[i][v];
        transpose(block);
        for (int i = 0; i < kLanes; ++i) {
          const int64_t c = at + v / 2 * (2 * kLanes) + (v % 2 == 0 ? Two<S>::place_a(i) : Two<S>::place_b(i));
          if (c < columns_) lines[c] = block[i];
        }
      }
    }
  }

 private:
  void add_up(int64_t i, int64_t at, VecBits* to) const {
    Vec sums[kVectors] = {};
    const int64_t there = columns_ - at;
    for (int64_t w = i * width_; w < i * width_ + held_[i]; ++w) {
      const Vec factor = Vec{} + factors_[static_cast<size_t>(w)];
      const Raw* row = rows_[static_cast<size_t>(w)] + at;
      Raw part[kStretch];
      if (there < kStretch) {
        std::fill_n(part, kStretch, Raw{});
        row = std::copy_n(row, there, part) - there;
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v += 2) {
        Vec a, b;
        Two<S>::load_two(row + v * kLanes, a, b);
        sums[v] = multiply_add(a, factor, sums[v]);
        sums[v + 1] = multiply_add(b, factor, sums[v + 1]);
      }
    }
    for (int v = 0; v < kVectors; ++v) to[v] = bits_of(sums[v]);
  }

  const Raw* s_;
  int64_t columns_, width_, absent_;
  float alpha_;
  std::vector<const Raw*> rows_;
  std::vector<float> factors_;
  int64_t held_[kLanes] = {};
};

// `n` weights in a row, `change` added, rounded to nearest; what that loses goes into the residual, if there is one.
template <class W>
void update_nearest(typename W::raw* weight, const float* change, float* residual, float decay, int64_t n) {
  for (int64_t c = 0; c < n; c += kLanes) {
    Vec value = load_some<W>(weight + c, n - c);
    if (residual != nullptr) value += load_some<Float32>(residual + c, n - c);
    value = multiply_add(value, Vec{} + decay, load(change + c, Float32()));
    const VecBits bits = put_bits(value, W());
    store_bits(weight + c, bits, n - c);
    if (residual == nullptr) continue;
    typename W::raw kept[kLanes];
    store_bits(kept, bits);
    store_bits(residual + c, bits_of(value - load(kept, W())), n - c);
  }
}

// The same with stochastic rounding; `change` in the order of Two. element: the number of the first one; n <=
// kUpdateColumns.
template <class W>
void update_random(typename W::raw* weight, const float* change, int64_t element, const Update& u, int64_t n) {
  constexpr int64_t kTwo = 2 * kLanes;
  const int64_t into = element % kRandomBlock;
  uint16_t halves[kUpdateColumns + 2 * kRandomBlock];
  for (int64_t start = 0; start < into + n; start += kRandomBlock)
    random_block(static_cast<uint64_t>((element + start) / kRandomBlock), u.key, u.step, halves + start);
  for (int64_t c = 0; c < n; c += kTwo) {
    typename W::raw part[kTwo] = {};
    const bool whole = n - c >= kTwo;
    if (!whole) std::copy_n(weight + c, n - c, part);
    typename W::raw* at = whole ? weight + c : part;
    Vec a, b;
    VecBits half_a, half_b;
    Two<W>::load_two(at, a, b);
    load_two_halves(halves + into + c, half_a, half_b, W());
    a = multiply_add(a, Vec{} + u.decay, load(change + c, Float32()));
    b = multiply_add(b, Vec{} + u.decay, load(change + c + kLanes, Float32()));
    store_two_bits(at, round_bits(a, half_a, W()), round_bits(b, half_b, W()), W());
    if (!whole) std::copy_n(part, n - c, weight + c);
  }
}

// Sums of 2 kLanes columns from `entry` on, in the order of Two<Order>, for the rows of a tile: change [kLanes][...].
template <class Order>
void change_of_columns(const VecBits* lines, const Entry* entry, int64_t width, float* change) {
  for (int half = 0; half < 2; ++half) {
    VecBits block[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const Entry* own = entry + width * (half == 0 ? Two<Order>::place_a(i) : Two<Order>::place_b(i));
      Vec sum = {};
      for (int64_t w = 0; w < width; ++w)
        sum = multiply_add(floats_of(lines[own[w].at]), Vec{} + own[w].factor, sum);
      block[i] = bits_of(sum);
    }
    transpose(block);
    for (int i = 0; i < kLanes; ++i) store_bits(change + i * kUpdateColumns + half * kLanes, block[i]);
  }
}

template <class W, class S, bool kRandom>
void update_rows(typename W::raw* weight, int64_t m, int64_t n, const typename S::raw* s, int64_t d1, int64_t d2,
                 const std::vector<Entry>& p, int64_t p_width, const std::vector<Entry>& q, int64_t q_width,
                 const Update& u, float* residual, int64_t begin, int64_t end) {
  using Order = std::conditional_t<kRandom, W, Float32>;
  Scratch<VecBits> lines(d2 + 1);
  lines[d2] = VecBits{};
  TileRows<S> products(s, d2, p_width, d1, u.alpha);
  Scratch<float> change(kLanes * kUpdateColumns);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile * kLanes, count = std::min<int64_t>(kLanes, m - first);
    products.set(p.data() + first * p_width, count);
    products.lines(lines.get());
    for (int64_t start = 0; start < n; start += kUpdateColumns) {
      const int64_t width = std::min(kUpdateColumns, n - start);
      for (int64_t c = 0; c < width; c += 2 * kLanes) {
        for (int64_t i = 0; i < count; ++i) __builtin_prefetch(weight + (first + i) * n + start + c, 1);
        change_of_columns<Order>(lines.get(), q.data() + (start + c) * q_width, q_width, change.get() + c);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t element = (first + i) * n + start;
        const float* own = change.get() + i * kUpdateColumns;
        if constexpr (kRandom)
          update_random<W>(weight + element, own, element, u, width);
        else
          update_nearest<W>(weight + element, own, residual == nullptr ? nullptr : residual + element, u.decay, width);
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
      auto run = update_rows<W, S, false>;
      if constexpr (!std::is_same_v<W, Float32>)
        if (residual == nullptr) run = update_rows<W, S, true>;
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
