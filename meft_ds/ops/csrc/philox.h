// SPDX-License-Identifier: Apache-2.0
// Random bits that depend on (key, step, element) only, and rounding with them. Philox4x32 with 7 rounds (Salmon et
// al., SC 2011); which element takes which bits is described at random_halves in meft_ds/ops/torch_sketch.py.
#pragma once

#include <cstdint>
#include <cstring>

#include "numbers.h"
#include "tiles.h"
#include "vectors.h"

namespace meft {

constexpr int64_t kRandomBlock = 128;  // elements that share 16 counters

typedef uint64_t VecWide __attribute__((vector_size(kLanes * 4)));

// Products of the low 32 bits of each 64-bit lane; what lies above them does not count.
inline VecWide multiply_low(VecWide a, uint64_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecWide>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(static_cast<int64_t>(b))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecWide>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(static_cast<int64_t>(b))));
#else
  return (a & 0xFFFFFFFFu) * b;
#endif
}

// The high 32 bits of each lane, above which anything may stand: a shuffle, because shifts wait for the same unit as
// products.
inline VecWide high_words(VecWide a) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecWide>(_mm512_shuffle_epi32(reinterpret_cast<__m512i>(a), _MM_PERM_DDBB));
#elif defined(__AVX2__)
  return reinterpret_cast<VecWide>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(a), 0xF5));
#else
  return a >> 32;
#endif
}

inline VecWide even_lanes() {
#if defined(__AVX512F__)
  return VecWide{0, 2, 4, 6, 8, 10, 12, 14};
#else
  return VecWide{0, 2, 4, 6};
#endif
}

// Of the words of 16 counters, the low halves serve 16 elements, the high halves the 16 that follow.
inline void store_halves(VecBits words, uint16_t* halves) {
#if defined(__AVX512BW__)
  typedef uint16_t Order __attribute__((vector_size(64)));
  const Order low_then_high = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                               1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const auto order = reinterpret_cast<__m512i>(low_then_high);
  _mm512_storeu_si512(halves, _mm512_permutexvar_epi16(order, reinterpret_cast<__m512i>(words)));
#else
  store_bits(halves, words & 0xFFFFu);
  store_bits(halves + 16, words >> 16);
#endif
}

// The random halves of elements 128 * block ... 128 * block + 127, in their order. A counter sits in a 64-bit lane, so
// that a product needs no taking apart: one vector holds the even counters, one the odd ones.
inline void random_block(uint64_t block, uint64_t key, uint32_t step, uint16_t* halves) {
  constexpr int kVectors = 32 / kLanes;
  const uint64_t first = block * 16;
  VecWide c[kVectors][4];
  for (int v = 0; v < kVectors; ++v) {
    c[v][0] = even_lanes() + ((first & 0xFFFFFFFFu) + static_cast<uint64_t>(v / 2 * kLanes + v % 2));
    c[v][1] = VecWide{} + (first >> 32);
    c[v][2] = VecWide{} + step;
    c[v][3] = VecWide{};
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#pragma GCC unroll 7
  for (int round = 0; round < 7; ++round) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const VecWide a = multiply_low(c[v][0], 0xD2511F53u), b = multiply_low(c[v][2], 0xCD9E8D57u);
      c[v][0] = high_words(b) ^ c[v][1] ^ k0;
      c[v][1] = b;
      c[v][2] = high_words(a) ^ c[v][3] ^ k1;
      c[v][3] = a;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int word = 0; word < 4; ++word)
    for (int v = 0; v < kVectors; v += 2)
      store_halves(reinterpret_cast<VecBits>((c[v][word] & 0xFFFFFFFFu) | (c[v + 1][word] << 32)),
                   halves + 32 * word + v / 2 * kLanes);
}

// The bits of fp32 rounded to T: up (away from 0) if the fraction of a unit in the last place, in 2**-16, plus the
// random half reaches 2**16. Infinity and NaN stay. Equal to round_stochastically in torch_sketch.py bit for bit.
inline VecBits round_bits(Vec v, VecBits half, BFloat16) {
  const VecBits bits = bits_of(v);
  return choose(v != v, bits | (1u << 22), bits + half) >> 16;
}

inline VecBits round_bits(Vec v, VecBits half, Float16) {
  const VecBits bits = bits_of(v), magnitude = bits & 0x7FFFFFFFu;
  // Thirteen bits are dropped: the last three of a half cannot matter.
  const VecBits normal = ((magnitude + (half >> 3)) >> 13) - (112u << 10);
  // Below 2**-14 the unit is 2**-24 whatever the exponent; the count of units is the encoding.
  const Vec units = floats_of(choose(magnitude < 0x38800000u, magnitude, VecBits{})) * 0x1.0p+24f;
  const VecInt whole = __builtin_convertvector(units, VecInt);
  const Vec fraction = (units - __builtin_convertvector(whole, Vec)) * 65536.0f;
  const VecBits sum = reinterpret_cast<VecBits>(__builtin_convertvector(fraction, VecInt)) + half;
  const VecBits tiny = reinterpret_cast<VecBits>(whole) + (sum >> 16);
  VecBits rounded = choose(magnitude < 0x38800000u, tiny, normal);
  rounded = choose(magnitude >= 0x47800000u || rounded > 0x7C00u, VecBits{} + 0x7C00u, rounded);
  rounded = choose(magnitude > 0x7F800000u, VecBits{} + 0x7E00u, rounded);
  return rounded | ((bits >> 16) & 0x8000u);
}

// Loads of 2 kLanes halves, and stores of as many rounded values, in the order of Two.
inline void load_two_halves(const uint16_t* halves, VecBits& a, VecBits& b, Float16) {
  a = load_halves(halves);
  b = load_halves(halves + kLanes);
}
inline void load_two_halves(const uint16_t* halves, VecBits& a, VecBits& b, BFloat16) {
  VecBits words;
  std::memcpy(&words, halves, sizeof words);
  a = words & 0xFFFFu;
  b = words >> 16;
}
inline void store_two_bits(uint16_t* to, VecBits a, VecBits b, Float16) {
  store_bits(to, a);
  store_bits(to + kLanes, b);
}
inline void store_two_bits(uint16_t* to, VecBits a, VecBits b, BFloat16) {
  const VecBits words = a | (b << 16);
  std::memcpy(to, &words, sizeof words);
}

}  // namespace meft
