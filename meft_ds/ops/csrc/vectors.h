// SPDX-License-Identifier: Apache-2.0
// Vectors of fp32 filled from fp32, bf16 or fp16: the compiler's vector types, which gcc and clang map to whatever the
// CPU has. Intrinsics stand only where such code cannot say it: fused multiply-add (the build keeps products and sums
// apart elsewhere) and the bf16 dot product.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || (defined(__AVX__) && defined(__FMA__))
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "numbers.h"

namespace meft {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(kLanes * 2)));

inline Vec load(const float* x, Float32) {
  Vec v;
  std::memcpy(&v, x, sizeof v);
  return v;
}

inline VecBits load_halves(const uint16_t* x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecBits>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
#endif
  VecHalf halves;
  std::memcpy(&halves, x, sizeof halves);
  return __builtin_convertvector(halves, VecBits);
}

inline Vec load(const uint16_t* x, BFloat16) { return reinterpret_cast<Vec>(load_halves(x) << 16); }

// Float16::get, lane by lane.
inline Vec load(const uint16_t* x, Float16) {
  const VecBits bits = load_halves(x);
  const VecBits magnitude = (bits & 0x7FFFu) << 13;
  const Vec value = reinterpret_cast<Vec>(magnitude) * 0x1.0p+112f;
  const VecBits special = reinterpret_cast<VecBits>(magnitude >= 0x0F800000u) & 0x7F800000u;
  return reinterpret_cast<Vec>(reinterpret_cast<VecBits>(value) | special | ((bits & 0x8000u) << 16));
}

// a * b + c, rounded once where the CPU can.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX__) && defined(__FMA__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  float32x4_t pa[2], pb[2], pc[2];
  std::memcpy(pa, &a, sizeof a);
  std::memcpy(pb, &b, sizeof b);
  std::memcpy(pc, &c, sizeof c);
  pc[0] = vfmaq_f32(pc[0], pa[0], pb[0]);
  pc[1] = vfmaq_f32(pc[1], pa[1], pb[1]);
  std::memcpy(&c, pc, sizeof c);
  return c;
#else
  return a * b + c;
#endif
}

inline float sum_lanes(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
#endif
}

template <class T>
void store(typename T::raw* to, Vec v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = T::put(lanes[lane]);
}

// The last `n` < kLanes values, zeros behind them.
template <class T>
Vec load_part(const typename T::raw* x, int64_t n) {
  typename T::raw lanes[kLanes] = {};
  std::memcpy(lanes, x, static_cast<size_t>(n) * sizeof *lanes);
  return load(lanes, T());
}

template <class T>
void store_part(typename T::raw* to, Vec v, int64_t n) {
  typename T::raw lanes[kLanes];
  store<T>(lanes, v);
  std::memcpy(to, lanes, static_cast<size_t>(n) * sizeof *lanes);
}

// Two vectors of neighbouring values, in an order that costs least to make: store_two undoes it.
template <class T>
struct Two {
  static void load_two(const typename T::raw* x, Vec& a, Vec& b) {
    a = load(x, T());
    b = load(x + kLanes, T());
  }
  static int place_a(int lane) { return lane; }
  static int place_b(int lane) { return lane + kLanes; }
};

// A 32-bit word holds two bf16 values: a shift gives the even one, a mask the odd one, without any widening.
template <>
struct Two<BFloat16> {
  static void load_two(const uint16_t* x, Vec& a, Vec& b) {
    VecBits words;
    std::memcpy(&words, x, sizeof words);
    a = reinterpret_cast<Vec>(words << 16);
    b = reinterpret_cast<Vec>(words & 0xFFFF0000u);
  }
  static int place_a(int lane) { return 2 * lane; }
  static int place_b(int lane) { return 2 * lane + 1; }
};

template <class T, class To>
inline void store_two(typename To::raw* to, Vec a, Vec b, bool add) {
  float first[kLanes], second[kLanes];
  std::memcpy(first, &a, sizeof a);
  std::memcpy(second, &b, sizeof b);
  typename To::raw out[2 * kLanes];
  if (add) {
    for (int lane = 0; lane < kLanes; ++lane) {
      first[lane] += To::get(to[Two<T>::place_a(lane)]);
      second[lane] += To::get(to[Two<T>::place_b(lane)]);
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    out[Two<T>::place_a(lane)] = To::put(first[lane]);
    out[Two<T>::place_b(lane)] = To::put(second[lane]);
  }
  std::memcpy(to, out, sizeof out);
}

// out[i] = x . rows[i] for R rows. A product is summed in the same order whatever R is.
template <class T, int R>
inline void dot_rows(const typename T::raw* x, const typename T::raw* const* rows, int64_t d, float* out) {
  Vec sums[R] = {};
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) {
    const Vec v = load(x + c, T());
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[i] = multiply_add(v, load(rows[i] + c, T()), sums[i]);
  }
  if (c < d) {
    const Vec v = load_part<T>(x + c, d - c);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[i] = multiply_add(v, load_part<T>(rows[i] + c, d - c), sums[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) out[i] = sum_lanes(sums[i]);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
// Two products per lane and instruction. Subnormals count as zero, which no score can tell.
template <int R>
inline void dot_rows_bf16(const uint16_t* x, const uint16_t* const* rows, int64_t d, float* out) {
  __m512 sums[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) sums[i] = _mm512_setzero_ps();
  int64_t c = 0;
  for (; c + 32 <= d; c += 32) {
    const __m512bh v = (__m512bh)_mm512_loadu_si512(x + c);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], v, (__m512bh)_mm512_loadu_si512(rows[i] + c));
  }
  if (c < d) {
    const __mmask32 some = (1u << (d - c)) - 1u;
    const __m512bh v = (__m512bh)_mm512_maskz_loadu_epi16(some, x + c);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
      sums[i] = _mm512_dpbf16_ps(sums[i], v, (__m512bh)_mm512_maskz_loadu_epi16(some, rows[i] + c));
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) out[i] = _mm512_reduce_add_ps(sums[i]);
}
template <>
inline void dot_rows<BFloat16, 8>(const uint16_t* x, const uint16_t* const* rows, int64_t d, float* out) {
  dot_rows_bf16<8>(x, rows, d, out);
}
template <>
inline void dot_rows<BFloat16, 4>(const uint16_t* x, const uint16_t* const* rows, int64_t d, float* out) {
  dot_rows_bf16<4>(x, rows, d, out);
}
template <>
inline void dot_rows<BFloat16, 1>(const uint16_t* x, const uint16_t* const* rows, int64_t d, float* out) {
  dot_rows_bf16<1>(x, rows, d, out);
}
#endif

// out[i] = x . rows[i], i < n.
template <class T>
void dot_many(const typename T::raw* x, const typename T::raw* const* rows, int64_t n, int64_t d, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) dot_rows<T, 8>(x, rows + i, d, out + i);
  for (; i + 4 <= n; i += 4) dot_rows<T, 4>(x, rows + i, d, out + i);
  for (; i < n; ++i) dot_rows<T, 1>(x, rows + i, d, out + i);
}

// to = (add ? to : 0) + sum_i weights[i] * rows[i], summed in fp32 in the order of i.
template <class T, class To>
void weighted_sum(const float* weights, const typename T::raw* const* rows, int64_t n, int64_t d, bool add,
                  typename To::raw* to) {
  constexpr int kWide = 8;  // as many independent sums as hide the latency of a multiply-add
  constexpr int kStep = 2 * kLanes;
  int64_t c = 0;
  for (; c + kWide * kLanes <= d; c += kWide * kLanes) {
    Vec sums[kWide] = {};
    for (int64_t i = 0; i < n; ++i) {
      const Vec weight = Vec{} + weights[i];
      const typename T::raw* row = rows[i] + c;
#pragma GCC unroll 4
      for (int k = 0; k < kWide / 2; ++k) {
        Vec a, b;
        Two<T>::load_two(row + k * kStep, a, b);
        sums[2 * k] = multiply_add(weight, a, sums[2 * k]);
        sums[2 * k + 1] = multiply_add(weight, b, sums[2 * k + 1]);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kWide / 2; ++k) store_two<T, To>(to + c + k * kStep, sums[2 * k], sums[2 * k + 1], add);
  }
  for (; c < d; c += kLanes) {
    const int64_t width = d - c < kLanes ? d - c : kLanes;
    Vec sum = {};
    for (int64_t i = 0; i < n; ++i) sum = multiply_add(Vec{} + weights[i], load_part<T>(rows[i] + c, width), sum);
    if (add) sum += load_part<To>(to + c, width);
    store_part<To>(to + c, sum, width);
  }
}

}  // namespace meft
