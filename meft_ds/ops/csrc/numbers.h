// SPDX-License-Identifier: Apache-2.0
// How fp32, bf16 and fp16 are read and written: branch-free integer code that gcc and clang vectorise on any CPU.
// Rounding is to nearest even, as in torch; no compiler support for 16-bit floats is assumed.
#pragma once

#include <cstdint>
#include <cstring>

namespace meft {

// Codes shared with meft_ds/ops/build.py (DTYPE_CODES).
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kNone = 3 };

inline int64_t item_size(int dtype) { return dtype == kFloat32 ? 4 : dtype == kNone ? 0 : 2; }

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct Float32 {
  using raw = float;
  static constexpr bool stored = true;
  static float get(raw x) { return x; }
  static raw put(float x) { return x; }
};

struct BFloat16 {
  using raw = uint16_t;
  static constexpr bool stored = true;
  static float get(raw x) { return from_bits(static_cast<uint32_t>(x) << 16); }
  static raw put(float x) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    // Adding the rounding bias to a NaN could carry into the sign or give infinity, so NaN is answered apart.
    return static_cast<raw>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
};

struct Float16 {
  using raw = uint16_t;
  static constexpr bool stored = true;
  static float get(raw x) {
    // The exponent is rebiased by one exact multiplication, which also normalises subnormals.
    const uint32_t magnitude = (static_cast<uint32_t>(x) & 0x7FFFu) << 13;
    const uint32_t value = to_bits(from_bits(magnitude) * 0x1.0p+112f);
    const uint32_t special = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
    return from_bits(value | special | ((static_cast<uint32_t>(x) & 0x8000u) << 16));
  }
  static raw put(float x) {
    // Lets the FPU round: adding a power of two 13 bits above the last kept bit leaves the rounded mantissa in place.
    const uint32_t bits = to_bits(x);
    const uint32_t doubled = bits + bits;
    float base = (from_bits(bits & 0x7FFFFFFFu) * 0x1.0p+112f) * 0x1.0p-110f;
    uint32_t bias = doubled & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    base = from_bits((bias >> 1) + 0x07800000u) + base;
    const uint32_t sum = to_bits(base);
    const uint32_t finite = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    return static_cast<raw>(((bits >> 16) & 0x8000u) | (doubled > 0xFF000000u ? 0x7E00u : finite));
  }
};

// A gradient that is known to be zero, or a replica that nobody wants: no memory is touched.
struct Nothing {
  using raw = char;
  static constexpr bool stored = false;
  static float get(raw) { return 0.0f; }
  static raw put(float) { return 0; }
};

// Calls body(T()) for the dtype behind a code.
template <class Body>
void with_dtype(int dtype, const Body& body) {
  switch (dtype) {
    case kFloat32: return body(Float32());
    case kBFloat16: return body(BFloat16());
    default: return body(Float16());
  }
}

}  // namespace meft
