// Element types in memory, and blocks of them loaded to and stored from the type of the arithmetic.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"
#include "lanes.h"

namespace fastopt {

enum class DType : uint8_t { float32, float64, bfloat16, float16 };
inline constexpr int kDTypes = 4;

template <DType>
struct Element;

template <>
struct Element<DType::float32> {
  using Stored = float;
  static FASTOPT_INLINE float decode(float x) { return x; }
  template <class T>
  static FASTOPT_INLINE float encode(T x) { return static_cast<float>(x); }
};

template <>
struct Element<DType::float64> {
  using Stored = double;
  static FASTOPT_INLINE double decode(double x) { return x; }
  template <class T>
  static FASTOPT_INLINE double encode(T x) { return static_cast<double>(x); }
};

// 16-bit types go through float, as in torch. Both encodings round to nearest, ties to even. They
// are integer arithmetic rather than F16C instructions or _Float16, so that they vectorise on every
// instruction set and do not depend on the flush-to-zero mode.
inline constexpr uint32_t kNaN = 0x7fc00000;  // the bits of one

template <class L>
FASTOPT_INLINE typename L::F decode_bfloat16(const uint16_t* x) {
  return L::floats(L::widen(x) << 16);
}

// In the upper bits.
template <class L>
FASTOPT_INLINE typename L::U encode_bfloat16(typename L::F x) {
  const typename L::U bits = L::bits(x);
  return x != x ? L::fill(kNaN) : bits + ((bits >> 16 & 1) + 0x7fff);
}

template <>
struct Element<DType::bfloat16> {
  using Stored = uint16_t;
  static FASTOPT_INLINE float decode(uint16_t x) { return decode_bfloat16<OneLane>(&x); }
  template <class T>
  static FASTOPT_INLINE uint16_t encode(T x) {
    return static_cast<uint16_t>(encode_bfloat16<OneLane>(static_cast<float>(x)) >> 16);
  }
};

template <>
struct Element<DType::float16> {
  using Stored = uint16_t;
  static FASTOPT_INLINE float decode(uint16_t x) {
    constexpr uint32_t exponent_mask = 0x7c00 << 13;
    const uint32_t shifted = (uint32_t{x} & 0x7fff) << 13;
    const uint32_t exponent = shifted & exponent_mask;
    const uint32_t rebiased = shifted + ((127u - 15u) << 23);
    const uint32_t inf_or_nan = rebiased + ((128u - 16u) << 23);
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(rebiased + (1u << 23)) -
                                                  bit_cast<float>(113u << 23));
    const uint32_t magnitude =
        exponent == exponent_mask ? inf_or_nan : (exponent == 0 ? subnormal : rebiased);
    return bit_cast<float>(magnitude | ((uint32_t{x} & 0x8000) << 16));
  }
  template <class T>
  static FASTOPT_INLINE uint16_t encode(T value) {
    constexpr uint32_t infinity = 255u << 23;
    constexpr uint32_t too_large = (127u + 16u) << 23;      // 2^16: infinity in fp16
    constexpr uint32_t smallest_normal = (127u - 14u) << 23;  // 2^-14
    constexpr uint32_t denormal_magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    // Adding the magic number leaves the rounded subnormal in the low bits of the sum.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) +
                                                  bit_cast<float>(denormal_magic)) -
                               denormal_magic;
    const uint32_t normal =
        (magnitude - ((127u - 15u) << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t special = magnitude > infinity ? 0x7e00 : 0x7c00;
    const uint32_t finite = magnitude < smallest_normal ? subnormal : normal;
    return static_cast<uint16_t>(sign | (magnitude >= too_large ? special : finite));
  }
};

// Loads n elements, `stride` elements apart.
template <class T, DType dtype, class Lanes>
struct Load {
  static FASTOPT_INLINE void run(const void* from, int64_t stride, int64_t n, T* to) {
    const auto* source = static_cast<const typename Element<dtype>::Stored*>(from);
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i)
        to[i] = static_cast<T>(Element<dtype>::decode(source[i * stride]));
    } else if constexpr (dtype == DType::bfloat16 && std::is_same_v<T, float>) {
      for_each_group<Lanes, 1>(n, [&](auto lanes, int64_t i) FASTOPT_INLINE_LAMBDA {
        using L = decltype(lanes);
        L::store(decode_bfloat16<L>(source + i), to + i);
      });
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<T>(Element<dtype>::decode(source[i]));
    }
  }
};

template <class T, DType dtype, class Lanes>
struct Store {
  static FASTOPT_INLINE void run(const T* from, void* to, int64_t stride, int64_t n) {
    auto* target = static_cast<typename Element<dtype>::Stored*>(to);
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) target[i * stride] = Element<dtype>::encode(from[i]);
    } else if constexpr (dtype == DType::bfloat16 && std::is_same_v<T, float>) {
      constexpr int vectors = Lanes::template vectors<uint16_t>;
      for_each_group<Lanes, vectors>(n, [&](auto lanes, int64_t i) FASTOPT_INLINE_LAMBDA {
        using L = decltype(lanes);
        typename L::U words[L::template vectors<uint16_t>];
        int64_t at = i;
        for (auto& word : words) {
          word = encode_bfloat16<L>(L::load(from + at));
          at += L::n;
        }
        L::store_upper_bits(words, target + i);
      });
    } else {
      for (int64_t i = 0; i < n; ++i) target[i] = Element<dtype>::encode(from[i]);
    }
  }
};

}  // namespace fastopt
