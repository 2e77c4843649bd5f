// SPDX-License-Identifier: Apache-2.0
// The sparse adapter on the host: which experts and keys a token uses, its output from the few rows that it selected,
// and the gradients. Every output value is summed by one thread in a fixed order: results do not depend on threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "parallel.h"
#include "vectors.h"

namespace meft {

// Bits that order as signed integers like the floats; -0 like 0.
inline int32_t order_of(float x) {
  const int32_t bits = static_cast<int32_t>(to_bits(x + 0.0f));
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// A bound that tells the k largest of n values: more than k are never above it, fewer than k never at or above it. By
// bisection: counting is vector code without branches, which beats any partial sort of a hundred values.
inline int32_t bound_of_largest(const int32_t* values, int64_t n, int64_t k) {
  int64_t low = values[0], high = values[0];
  for (int64_t i = 1; i < n; ++i) {
    low = std::min<int64_t>(low, values[i]);
    high = std::max<int64_t>(high, values[i]);
  }
  ++high;
  while (high - low > 1) {
    const auto middle = static_cast<int32_t>(low + (high - low) / 2);
    int32_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += values[i] >= middle;
    if (count == k) return middle;
    (count > k ? low : high) = middle;
  }
  return static_cast<int32_t>(low);
}

// The `per_token` largest of p [T, n], equal ones by smaller id: ids [T, per_token], ascending.
inline void top_experts(const void* p, int dtype, int64_t T, int64_t n, int64_t per_token, int64_t* ids, int threads) {
  with_dtype(dtype, [&](auto type) {
    using D = decltype(type);
    const auto* logits = static_cast<const typename D::raw*>(p);
    split(T, 64, team_for(T * n * 16, threads), [&](int64_t begin, int64_t end) {
      std::vector<int32_t> rank(static_cast<size_t>(n));
      std::vector<int64_t> found(static_cast<size_t>(n + 1));
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t e = 0; e < n; ++e) rank[static_cast<size_t>(e)] = order_of(D::get(logits[t * n + e]));
        const int32_t least = bound_of_largest(rank.data(), n, per_token);
        int64_t room = per_token;  // for those equal to the bound
        for (int64_t e = 0; e < n; ++e) room -= rank[static_cast<size_t>(e)] > least;
        int64_t held = 0;
        for (int64_t e = 0; e < n; ++e) {
          const bool equal = rank[static_cast<size_t>(e)] == least;
          found[static_cast<size_t>(held)] = e;
          held += rank[static_cast<size_t>(e)] > least || (equal && room > 0);
          room -= equal;
        }
        std::copy_n(found.data(), per_token, ids + t * per_token);
      }
    });
  });
}

// Shapes that the kernels share: T tokens of E experts of at most m keys, width d.
struct Sizes {
  int64_t T, E, m, d;
};

// q [T, E, m] = x_t . k_j for the keys of each token's experts; 0 beyond a short slice and for padding tokens. Pairs are
// taken expert by expert, so that an expert's keys are read once and stay in the first-level cache.
inline void expert_scores(const void* x, const void* keys, int64_t key_stride, int dtype, const Sizes& n,
                          const int64_t* starts, int64_t n_experts, const int64_t* experts, const uint8_t* tokens,
                          float* q, int threads) {
  const int64_t pairs = n.T * n.E;
  std::vector<int64_t> first(static_cast<size_t>(n_experts + 1));
  for (int64_t i = 0; i < pairs; ++i) ++first[static_cast<size_t>(experts[i] + 1)];
  for (int64_t e = 0; e < n_experts; ++e) first[static_cast<size_t>(e + 1)] += first[static_cast<size_t>(e)];
  std::vector<int64_t> order(static_cast<size_t>(pairs));
  std::vector<int64_t> next(first.begin(), first.end() - 1);
  for (int64_t i = 0; i < pairs; ++i) order[static_cast<size_t>(next[static_cast<size_t>(experts[i])]++)] = i;
  with_dtype(dtype, [&](auto type) {
    using D = decltype(type);
    const auto* inputs = static_cast<const typename D::raw*>(x);
    const auto* store = static_cast<const typename D::raw*>(keys);
    split(n_experts, 1, team_for(pairs * n.m * n.d, threads), [&](int64_t begin, int64_t end) {
      std::vector<const typename D::raw*> rows(static_cast<size_t>(n.m));
      for (int64_t e = begin; e < end; ++e) {
        const int64_t held = starts[e + 1] - starts[e];
        for (int64_t j = 0; j < held; ++j) rows[static_cast<size_t>(j)] = store + (starts[e] + j) * key_stride;
        for (int64_t at = first[static_cast<size_t>(e)]; at < first[static_cast<size_t>(e + 1)]; ++at) {
          const int64_t pair = order[static_cast<size_t>(at)], token = pair / n.E;
          float* out = q + pair * n.m;
          const int64_t real = tokens == nullptr || tokens[token] ? held : 0;
          dot_many<D>(inputs + token * n.d, rows.data(), real, n.d, out);
          std::fill(out + real, out + n.m, 0.0f);
        }
      }
    });
  });
}

// mask [T, E, m]: the `most` largest s = gate * q above 0 of every token, equal ones by smaller position; active
// [n_experts, m]: what some token selected.
inline void select_keys(const float* q, const float* gates, const uint8_t* tokens, const int64_t* experts,
                        const Sizes& n, int64_t most, uint8_t* mask, uint8_t* active, int threads) {
  const int64_t width = n.E * n.m;
  split(n.T, 64, team_for(n.T * width * 4, threads), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> rank(static_cast<size_t>(width));
    for (int64_t t = begin; t < end; ++t) {
      const float* scores = q + t * width;
      uint8_t* mine = mask + t * width;
      if (tokens != nullptr && !tokens[t]) {
        std::memset(mine, 0, static_cast<size_t>(width));
        continue;
      }
      int64_t count = 0;
      for (int64_t i = 0; i < n.E; ++i) {
        const float gate = gates == nullptr ? 1.0f : gates[t * n.E + i];
        for (int64_t j = i * n.m; j < (i + 1) * n.m; ++j) {
          const float value = gate * scores[j];
          const uint8_t above = value > 0.0f;
          rank[static_cast<size_t>(j)] = above ? static_cast<int32_t>(to_bits(value)) : 0;
          mine[j] = above;
          count += above;
        }
      }
      if (count <= most) continue;
      const int32_t least = bound_of_largest(rank.data(), width, most);
      int64_t room = most;  // for those equal to the bound
      for (int64_t j = 0; j < width; ++j) room -= rank[static_cast<size_t>(j)] > least;
      for (int64_t j = 0; j < width; ++j) {
        const bool equal = rank[static_cast<size_t>(j)] == least;
        mine[j] = rank[static_cast<size_t>(j)] > least || (equal && room > 0);
        room -= equal;
      }
    }
  });
  for (int64_t pair = 0; pair < n.T * n.E; ++pair) {
    uint8_t* hit = active + experts[pair] * n.m;
    const uint8_t* mine = mask + pair * n.m;
    for (int64_t j = 0; j < n.m; ++j) hit[j] |= mine[j];
  }
}

// The selected entries of one bank of rows, token by token: entry i of token t lies in ends[t - 1] <= i < ends[t].
struct Entries {
  const int64_t* ends;       // [T]
  const int32_t* slot;       // [entries] row of the bank
  const int32_t* candidate;  // [entries] position in [E, m]
};

// Counts the selected entries whose slot (slots [n_experts, m], -1 = not in this bank) is in the bank: ends [T].
inline int64_t count_entries(const uint8_t* mask, const int64_t* experts, const int32_t* slots, const Sizes& n,
                             int64_t* ends) {
  int64_t total = 0;
  for (int64_t t = 0; t < n.T; ++t) {
    for (int64_t i = 0; i < n.E; ++i) {
      const uint8_t* mine = mask + (t * n.E + i) * n.m;
      const int32_t* slot = slots + experts[t * n.E + i] * n.m;
      for (int64_t j = 0; j < n.m; ++j) total += mine[j] & static_cast<uint8_t>(slot[j] >= 0);
    }
    ends[t] = total;
  }
  return total;
}

inline void list_entries(const uint8_t* mask, const int64_t* experts, const int32_t* slots, const Sizes& n,
                         int32_t* slot_out, int32_t* candidate) {
  // Which key is selected cannot be foreseen: every candidate is written, and a kept one moves the place on.
  std::vector<int32_t> kept_slot(static_cast<size_t>(n.E * n.m + 1)), kept_candidate(static_cast<size_t>(n.E * n.m + 1));
  for (int64_t t = 0; t < n.T; ++t) {
    int64_t held = 0;
    for (int64_t i = 0; i < n.E; ++i) {
      const uint8_t* mine = mask + (t * n.E + i) * n.m;
      const int32_t* slot = slots + experts[t * n.E + i] * n.m;
      for (int64_t j = 0; j < n.m; ++j) {
        kept_slot[static_cast<size_t>(held)] = slot[j];
        kept_candidate[static_cast<size_t>(held)] = static_cast<int32_t>(i * n.m + j);
        held += mine[j] & static_cast<uint8_t>(slot[j] >= 0);
      }
    }
    slot_out = std::copy_n(kept_slot.data(), held, slot_out);
    candidate = std::copy_n(kept_candidate.data(), held, candidate);
  }
}

// y_t (+)= sum of s v over a token's entries, s = gate * q. q comes from `scores` [T, E, m], or from x and the bank's
// keys where that is null; what counts (s > 0) is kept in `kept` [entries] for backward, 0 for the rest.
inline void expert_forward(const void* x, const void* bank, int dtype, const Sizes& n, const Entries& entries,
                           const float* scores, const float* gates, float* kept, void* y, int y_dtype, bool add,
                           int threads) {
  const int64_t total = n.T ? entries.ends[n.T - 1] : 0;
  with_dtype(dtype, [&](auto type) {
    using D = decltype(type);
    const auto* inputs = static_cast<const typename D::raw*>(x);
    const auto* rows = static_cast<const typename D::raw*>(bank);
    split(n.T, 16, team_for(total * n.d, threads), [&](int64_t begin, int64_t end) {
      std::vector<const typename D::raw*> at(static_cast<size_t>(n.E * n.m));
      std::vector<float> s(static_cast<size_t>(n.E * n.m));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t lo = t ? entries.ends[t - 1] : 0, count = entries.ends[t] - lo;
        float* q = kept + lo;
        for (int64_t i = 0; i < count; ++i) at[static_cast<size_t>(i)] = rows + entries.slot[lo + i] * 2 * n.d;
        if (scores == nullptr)
          dot_many<D>(inputs + t * n.d, at.data(), count, n.d, q);
        else
          for (int64_t i = 0; i < count; ++i) q[i] = scores[t * n.E * n.m + entries.candidate[lo + i]];
        for (int64_t i = 0; i < count; ++i) {
          const float gate = gates == nullptr ? 1.0f : gates[t * n.E + entries.candidate[lo + i] / n.m];
          const float z = gate * q[i];
          // relu once more: q may differ in its last bit from what selection saw on another device.
          q[i] = z > 0.0f ? q[i] : 0.0f;
          s[static_cast<size_t>(i)] = z > 0.0f ? z : 0.0f;
          at[static_cast<size_t>(i)] += n.d;
        }
        if (y_dtype == kFloat32)
          weighted_sum<D, Float32>(s.data(), at.data(), count, n.d, add, static_cast<float*>(y) + t * n.d);
        else
          weighted_sum<D, D>(s.data(), at.data(), count, n.d, add, static_cast<typename D::raw*>(y) + t * n.d);
      }
    });
  });
}

// Per token: dz = dy . v, dq = dz gate, d_gate (+)= sum of dz q over an expert's entries, dx (+)= sum of dq k. Leaves
// dq and s [entries] for the rows. dx and d_gates may be null.
inline void expert_backward_tokens(const void* dy, const void* bank, int dtype, const Sizes& n, const Entries& entries,
                                   const float* kept, const float* gates, float* dq, float* s, float* d_gates,
                                   void* dx, int dx_dtype, bool add, int threads) {
  const int64_t total = n.T ? entries.ends[n.T - 1] : 0;
  with_dtype(dtype, [&](auto type) {
    using D = decltype(type);
    const auto* outer = static_cast<const typename D::raw*>(dy);
    const auto* rows = static_cast<const typename D::raw*>(bank);
    split(n.T, 16, team_for(total * n.d, threads), [&](int64_t begin, int64_t end) {
      std::vector<const typename D::raw*> at(static_cast<size_t>(n.E * n.m));
      for (int64_t t = begin; t < end; ++t) {
        const int64_t lo = t ? entries.ends[t - 1] : 0, count = entries.ends[t] - lo;
        for (int64_t i = 0; i < count; ++i) at[static_cast<size_t>(i)] = rows + (entries.slot[lo + i] * 2 + 1) * n.d;
        dot_many<D>(outer + t * n.d, at.data(), count, n.d, dq + lo);
        for (int64_t i = lo; i < lo + count; ++i) {
          const int64_t pair = t * n.E + entries.candidate[i] / n.m;
          const float gate = gates == nullptr ? 1.0f : gates[pair];
          const float dz = kept[i] != 0.0f ? dq[i] : 0.0f;
          if (d_gates != nullptr) d_gates[pair] += dz * kept[i];
          dq[i] = dz * gate;
          s[i] = kept[i] * gate;
          at[static_cast<size_t>(i - lo)] -= n.d;
        }
        if (dx == nullptr) continue;
        if (dx_dtype == kFloat32)
          weighted_sum<D, Float32>(dq + lo, at.data(), count, n.d, add, static_cast<float*>(dx) + t * n.d);
        else
          weighted_sum<D, D>(dq + lo, at.data(), count, n.d, add, static_cast<typename D::raw*>(dx) + t * n.d);
      }
    });
  });
}

// Per row of the bank: dk (+)= sum of dq x and dv (+)= sum of s dy over its entries in the order of tokens, grad
// [n_rows, 2 d]. Rows without entries become zero, or stay as they are with `add`.
inline void expert_backward_rows(const void* x, const void* dy, int dtype, const Sizes& n, const Entries& entries,
                                 const float* dq, const float* s, float* grad, int64_t n_rows, bool add, int threads) {
  const int64_t total = n.T ? entries.ends[n.T - 1] : 0;
  std::vector<int64_t> first(static_cast<size_t>(n_rows + 1));
  for (int64_t i = 0; i < total; ++i) ++first[static_cast<size_t>(entries.slot[i] + 1)];
  for (int64_t u = 0; u < n_rows; ++u) first[static_cast<size_t>(u + 1)] += first[static_cast<size_t>(u)];
  std::vector<int64_t> next(first.begin(), first.end() - 1), token(static_cast<size_t>(total));
  std::vector<float> key_weight(static_cast<size_t>(total)), value_weight(static_cast<size_t>(total));
  for (int64_t t = 0, i = 0; t < n.T; ++t)
    for (; i < entries.ends[t]; ++i) {
      const auto at = static_cast<size_t>(next[static_cast<size_t>(entries.slot[i])]++);
      token[at] = t;
      key_weight[at] = dq[i];
      value_weight[at] = s[i];
    }
  with_dtype(dtype, [&](auto type) {
    using D = decltype(type);
    const auto* inputs = static_cast<const typename D::raw*>(x);
    const auto* outer = static_cast<const typename D::raw*>(dy);
    split(n_rows, 4, team_for(2 * total * n.d, threads), [&](int64_t begin, int64_t end) {
      std::vector<const typename D::raw*> at;
      for (int64_t u = begin; u < end; ++u) {
        const int64_t lo = first[static_cast<size_t>(u)], count = first[static_cast<size_t>(u + 1)] - lo;
        if (count == 0 && add) continue;
        at.resize(static_cast<size_t>(count));
        for (int64_t i = 0; i < count; ++i) at[static_cast<size_t>(i)] = inputs + token[static_cast<size_t>(lo + i)] * n.d;
        weighted_sum<D, Float32>(key_weight.data() + lo, at.data(), count, n.d, add, grad + u * 2 * n.d);
        for (int64_t i = 0; i < count; ++i) at[static_cast<size_t>(i)] = outer + token[static_cast<size_t>(lo + i)] * n.d;
        weighted_sum<D, Float32>(value_weight.data() + lo, at.data(), count, n.d, add, grad + (u * 2 + 1) * n.d);
      }
    });
  });
}

}  // namespace meft
