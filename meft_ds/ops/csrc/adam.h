// SPDX-License-Identifier: Apache-2.0
// AdamW (torch.optim.AdamW formula) over a whole tensor, over a tensor whose gradient is zero except in some rows, and
// over some rows only. One pass over memory: every value is read once and written once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"
#include "parallel.h"

namespace meft {

// About 50 microseconds of work for one thread: much less would not pay for waking a second one.
constexpr int64_t kAdamGrain = 1 << 15;

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, grad_scale;
};

// The step's constants, worked out in double and used in fp32.
struct Coefficients {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, root_correction, eps, decay, grad_scale;
};

inline Coefficients coefficients(const Hyper& h, int64_t step, double catch_up = 1.0) {
  const double t = static_cast<double>(step);
  Coefficients c;
  c.beta1 = static_cast<float>(h.beta1);
  c.one_minus_beta1 = static_cast<float>(1.0 - h.beta1);
  c.beta2 = static_cast<float>(h.beta2);
  c.one_minus_beta2 = static_cast<float>(1.0 - h.beta2);
  c.step_size = static_cast<float>(h.lr / (1.0 - std::pow(h.beta1, t)));
  c.root_correction = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(h.beta2, t)));
  c.eps = static_cast<float>(h.eps);
  c.decay = static_cast<float>(catch_up * (1.0 - h.lr * h.weight_decay));
  c.grad_scale = static_cast<float>(h.grad_scale);
  return c;
}

// The compiler may not choose where to fuse (-ffp-contract=off): it would choose differently for whole vectors and for
// the values left over, and results would depend on how the work is split over threads and ranks.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

template <class G, class M, class R>
void adam_span(float* __restrict__ p, void* m_, void* v_, const void* g_, void* r_, int64_t n, const Coefficients& k) {
  auto* __restrict__ m = static_cast<typename M::raw*>(m_);
  auto* __restrict__ v = static_cast<typename M::raw*>(v_);
  const auto* __restrict__ g = static_cast<const typename G::raw*>(g_);
  auto* __restrict__ r = static_cast<typename R::raw*>(r_);
  const Coefficients c = k;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float mean = c.beta1 * M::get(m[i]);
    float square = c.beta2 * M::get(v[i]);
    if constexpr (G::stored) {
      const float grad = G::get(g[i]) * c.grad_scale;
      mean = multiply_add(c.one_minus_beta1, grad, mean);
      square = multiply_add(c.one_minus_beta2 * grad, grad, square);
    }
    const float root = multiply_add(std::sqrt(square), c.root_correction, c.eps);
    const float value = multiply_add(-c.step_size, mean / root, c.decay * p[i]);
    p[i] = value;
    m[i] = M::put(mean);
    v[i] = M::put(square);
    if constexpr (R::stored) r[i] = R::put(value);
  }
}

using Span = void (*)(float*, void*, void*, const void*, void*, int64_t, const Coefficients&);

template <class G, class M>
Span pick_replica(int replica) {
  switch (replica) {
    case kFloat32: return adam_span<G, M, Float32>;
    case kBFloat16: return adam_span<G, M, BFloat16>;
    case kFloat16: return adam_span<G, M, Float16>;
    default: return adam_span<G, M, Nothing>;
  }
}

template <class G>
Span pick_moments(int moments, int replica) {
  return moments == kFloat32 ? pick_replica<G, Float32>(replica) : pick_replica<G, BFloat16>(replica);
}

inline Span pick_span(int grad, int moments, int replica) {
  switch (grad) {
    case kFloat32: return pick_moments<Float32>(moments, replica);
    case kBFloat16: return pick_moments<BFloat16>(moments, replica);
    case kFloat16: return pick_moments<Float16>(moments, replica);
    default: return pick_moments<Nothing>(moments, replica);
  }
}

// The tensors of one update; `at` moves along them whatever their dtypes are.
struct State {
  float* p;
  char *m, *v, *replica;
  const char* grad;
  int64_t moment_size, replica_size, grad_size;
  Span step, step_without_grad;

  State(float* p, char* m, char* v, const char* grad, char* replica, int moments, int grad_type, int replica_type)
      : p(p), m(m), v(v), replica(replica), grad(grad), moment_size(item_size(moments)),
        replica_size(item_size(replica_type)), grad_size(item_size(grad_type)),
        step(pick_span(grad_type, moments, replica_type)), step_without_grad(pick_span(kNone, moments, replica_type)) {}

  void with_grad(int64_t at, int64_t grad_at, int64_t n, const Coefficients& c) const {
    step(p + at, m + at * moment_size, v + at * moment_size, grad + grad_at * grad_size, replica + at * replica_size, n,
         c);
  }
  void without_grad(int64_t at, int64_t n, const Coefficients& c) const {
    step_without_grad(p + at, m + at * moment_size, v + at * moment_size, nullptr, replica + at * replica_size, n, c);
  }
};

inline void adamw(const State& s, int64_t n, const Hyper& h, int64_t step, int threads) {
  const Coefficients c = coefficients(h, step);
  split(n, kAdamGrain, threads, [&](int64_t begin, int64_t end) { s.with_grad(begin, begin, end - begin, c); });
}

// Every row takes a step; the gradient of rows that `ids` (ascending, k of them) does not name is zero.
inline void adamw_rows(const State& s, const int64_t* ids, int64_t k, int64_t rows, int64_t width, const Hyper& h,
                       int64_t step, int threads) {
  const Coefficients c = coefficients(h, step);
  split(rows * width, kAdamGrain, threads, [&](int64_t begin, int64_t end) {
    int64_t next = std::lower_bound(ids, ids + k, begin / width) - ids;
    for (int64_t at = begin; at < end;) {
      const int64_t active = next < k ? ids[next] * width : end;
      if (at < active) {
        const int64_t n = std::min(active, end) - at;
        s.without_grad(at, n, c);
        at += n;
      } else {
        const int64_t column = at - active;
        const int64_t n = std::min(end - at, width - column);
        s.with_grad(at, next * width + column, n, c);
        at += n;
        ++next;
      }
    }
  });
}

// Only the rows in `ids` take a step, each with its own step count and with the weight decay of the steps it slept.
inline void adamw_lazy_rows(const State& s, int32_t* row_steps, double* row_decay, const int64_t* ids, int64_t k,
                            int64_t width, const Hyper& h, double decay_log, int threads) {
  split(k * width, kAdamGrain, threads, [&](int64_t begin, int64_t end) {
    Coefficients c{};
    int64_t known_step = -1;
    double known_decay = 0.0;
    for (int64_t at = begin; at < end;) {
      const int64_t i = at / width, row = ids[i], column = at - i * width;
      const int64_t n = std::min(end - at, width - column);
      const int64_t step = static_cast<int64_t>(row_steps[row]) + 1;
      if (step != known_step || row_decay[row] != known_decay) {
        c = coefficients(h, step, std::exp(decay_log - row_decay[row]));
        known_step = step;
        known_decay = row_decay[row];
      }
      s.with_grad(row * width + column, at, n, c);
      at += n;
    }
  });
  // A row may be shared by two threads, so its counters change only after both have read them.
  const double decayed = decay_log + std::log1p(-h.lr * h.weight_decay);
  for (int64_t i = 0; i < k; ++i) {
    row_steps[ids[i]] += 1;
    row_decay[ids[i]] = decayed;
  }
}

}  // namespace meft
