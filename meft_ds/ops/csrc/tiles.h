// SPDX-License-Identifier: Apache-2.0
// Tiles of kLanes rows turned on their side, so that one vector holds one column: what a sparse product needs to work
// on neighbouring rows at once without gathers. Also the vector forms of rounding fp32 to what is stored.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "numbers.h"
#include "vectors.h"

namespace meft {

typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));

// Memory on cache-line borders: a vector never straddles two lines. Its content starts undefined.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(::operator new(bytes(n), kAlign))) {}
  ~Scratch() { ::operator delete(data_, kAlign); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  static size_t bytes(int64_t n) { return sizeof(T) * static_cast<size_t>(n > 0 ? n : 1); }
  T* data_;
};

inline VecBits bits_of(Vec v) { return reinterpret_cast<VecBits>(v); }
inline Vec floats_of(VecBits v) { return reinterpret_cast<Vec>(v); }
inline VecBits choose(VecInt mask, VecBits yes, VecBits no) { return mask ? yes : no; }

// Swaps, of two rows that lie S apart, the S x S blocks off the diagonal.
template <int S, int... I>
inline void exchange(VecBits& a, VecBits& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  const VecBits first = __builtin_shufflevector(a, b, ((I & S) ? kLanes + I - S : I)...);
  b = __builtin_shufflevector(a, b, ((I & S) ? kLanes + I : I + S)...);
#else
  const VecBits first = __builtin_shuffle(a, b, VecBits{((I & S) ? kLanes + I - S : I)...});
  b = __builtin_shuffle(a, b, VecBits{((I & S) ? kLanes + I : I + S)...});
#endif
  a = first;
}

template <int S>
inline void exchange_all(VecBits* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if ((i & S) == 0) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kLanes>());
}

// rows[i][j] <-> rows[j][i] of a kLanes x kLanes block.
inline void transpose(VecBits* rows) {
  if constexpr (kLanes > 8) exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

// What T::put gives, as the bits of each lane.
inline VecBits put_bits(Vec v, Float32) { return bits_of(v); }
inline VecBits put_bits(Vec v, BFloat16) {
  const VecBits bits = bits_of(v);
  const VecBits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return choose((bits & 0x7FFFFFFFu) > 0x7F800000u, VecBits{} + 0x7FC0u, rounded);
}
inline VecBits put_bits(Vec v, Float16) {
  const VecBits bits = bits_of(v), doubled = bits + bits;
  const Vec scaled = (floats_of(bits & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
  const VecBits exponent = doubled & 0xFF000000u;
  const VecBits bias = choose(exponent < 0x71000000u, VecBits{} + 0x71000000u, exponent);
  const VecBits sum = bits_of(floats_of((bias >> 1) + 0x07800000u) + scaled);
  const VecBits finite = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  return ((bits >> 16) & 0x8000u) | choose(doubled > 0xFF000000u, VecBits{} + 0x7E00u, finite);
}

// Stores lanes of bits that put_bits made; of the halves, the low 16 bits.
inline void store_bits(float* to, VecBits bits) { std::memcpy(to, &bits, sizeof bits); }
inline void store_bits(uint16_t* to, VecBits bits) {
  const VecHalf halves = __builtin_convertvector(bits, VecHalf);
  std::memcpy(to, &halves, sizeof halves);
}
template <class Raw>
void store_bits(Raw* to, VecBits bits, int64_t n) {
  if (n >= kLanes) return store_bits(to, bits);
  Raw lanes[kLanes];
  store_bits(lanes, bits);
  std::memcpy(to, lanes, static_cast<size_t>(n) * sizeof(Raw));
}

template <class T>
Vec load_some(const typename T::raw* x, int64_t n) {
  return n >= kLanes ? load(x, T()) : load_part<T>(x, n);
}

// How kLanes or 2 kLanes tokens of one column lie in a line of a tile. fp16 becomes fp32 once, on the way in; of bf16,
// a 32-bit word holds two tokens (t below, t + kLanes above), which a shift and a mask take apart: half the memory.
template <class T>
struct Line {
  static constexpr int kTokens = kLanes;
  using Sums = Vec[1];
  static VecBits pack(const typename T::raw* const* rows, int64_t at, int64_t n, int i) {
    return bits_of(load_some<T>(rows[i] + at, n));
  }
  static void add(Sums& sums, VecBits line, Vec factor) { sums[0] = multiply_add(floats_of(line), factor, sums[0]); }
};

template <>
struct Line<BFloat16> {
  static constexpr int kTokens = 2 * kLanes;
  using Sums = Vec[2];
  static VecBits pack(const uint16_t* const* rows, int64_t at, int64_t n, int i) {
    const Vec below = load_some<BFloat16>(rows[i] + at, n), above = load_some<BFloat16>(rows[i + kLanes] + at, n);
    return (bits_of(below) >> 16) | bits_of(above);
  }
  static void add(Sums& sums, VecBits line, Vec factor) {
    sums[0] = multiply_add(floats_of(line << 16), factor, sums[0]);
    sums[1] = multiply_add(floats_of(line & 0xFFFF0000u), factor, sums[1]);
  }
};

// Rows [Line::kTokens][n] -> lines [n].
template <class T>
void turn(const typename T::raw* const* rows, int64_t n, VecBits* lines) {
  for (int64_t at = 0; at < n; at += kLanes) {
    VecBits block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = Line<T>::pack(rows, at, n - at, i);
    transpose(block);
    for (int64_t i = 0; i < kLanes && at + i < n; ++i) lines[at + i] = block[i];
  }
}

}  // namespace meft
