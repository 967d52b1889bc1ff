// Numbers that are kept in two arrays: 16-bit parameters with what makes fp32 masters of them, and
// 8-bit states with their scales. The functions of fastopt/packing.py, with the same bits.
//
// The arithmetic sees fp32 numbers only. They are kept in the elements' own array `a` and an array
// `b` that goes with it, both contiguous.
#pragma once

#include <algorithm>

#include "dtypes.h"
#include "isa.h"
#include "random.h"

namespace fastopt {

// In the order of fastopt.packing.PACKINGS, after the plain dtypes.
enum class Packing : int {
  remainder,           // a: bf16; b: int16
  master_of_bfloat16,  // a: bf16; b: fp32
  master_of_float16,   // a: fp16; b: fp32
  stochastic,          // a: bf16; b: none
  codes,               // a: uint8; b: fp32, one for each kCodeBlock elements
  unsigned_codes,      // the same, for numbers that are not negative
};
inline constexpr int kPackings = 6;

constexpr bool is_coded(Packing packing) {
  return packing == Packing::codes || packing == Packing::unsigned_codes;
}

inline constexpr int32_t kCodeBlock = 256;
inline constexpr int64_t kItemBytes[kPackings] = {2, 2, 2, 2, 1, 1};  // of an element in `a`

inline constexpr uint32_t kNaN = 0x7fc00000;  // the bits of one

// To nearest, ties away from zero: a remainder of 16 bits cannot tell the two ties of an even number
// apart, which both would round to it.
FASTOPT_INLINE uint16_t nearest_bfloat16(float x) {
  return static_cast<uint16_t>((x != x ? kNaN : bit_cast<uint32_t>(x) + 0x8000) >> 16);
}

// What belongs to the i-th element: `get` makes the number, `put` stores it, with 16 random bits.
template <Packing>
struct Packed;

template <>
struct Packed<Packing::remainder> {
  static FASTOPT_INLINE float get(const void* a, const void* b, int32_t i) {
    const uint32_t bits = uint32_t{static_cast<const uint16_t*>(a)[i]} << 16;
    const int32_t remainder = static_cast<const int16_t*>(b)[i];
    const float value = bit_cast<float>(bits);
    const float master = bit_cast<float>(bits + static_cast<uint32_t>(remainder));
    // A parameter that was set to 0 or infinity, with the remainder of what it was before.
    return master != master ? value : master;
  }
  static FASTOPT_INLINE void put(float x, uint32_t, void* a, void* b, int32_t i) {
    static_cast<uint16_t*>(a)[i] = nearest_bfloat16(x);
    static_cast<uint16_t*>(b)[i] = static_cast<uint16_t>(x != x ? 0 : bit_cast<uint32_t>(x));
  }
};

template <DType dtype>
struct PackedMaster {
  static FASTOPT_INLINE uint16_t encode(float x) {
    if constexpr (dtype == DType::bfloat16) return nearest_bfloat16(x);
    return Element<dtype>::encode(x);
  }
  static FASTOPT_INLINE float get(const void* a, const void* b, int32_t i) {
    const uint16_t param = static_cast<const uint16_t*>(a)[i];
    const float master = static_cast<const float*>(b)[i];
    // A master that is not what the parameter was rounded from is out of date.
    return encode(master) == param ? master : Element<dtype>::decode(param);
  }
  static FASTOPT_INLINE void put(float x, uint32_t, void* a, void* b, int32_t i) {
    static_cast<uint16_t*>(a)[i] = encode(x);
    static_cast<float*>(b)[i] = x;
  }
};

template <>
struct Packed<Packing::master_of_bfloat16> : PackedMaster<DType::bfloat16> {};
template <>
struct Packed<Packing::master_of_float16> : PackedMaster<DType::float16> {};

// Rounds up with a probability that is the dropped part: unbiased.
template <>
struct Packed<Packing::stochastic> {
  static FASTOPT_INLINE float get(const void* a, const void*, int32_t i) {
    return Element<DType::bfloat16>::decode(static_cast<const uint16_t*>(a)[i]);
  }
  static FASTOPT_INLINE void put(float x, uint32_t random, void* a, void*, int32_t i) {
    const uint32_t bits = x != x ? kNaN : bit_cast<uint32_t>(x) + random;
    static_cast<uint16_t*>(a)[i] = static_cast<uint16_t>(bits >> 16);
  }
};

// A code c stands for (z - 1) * scale, where z is the c-th number from 1 on that has kMantissa bits
// after the point: evenly spaced near 0, then in octaves, each with the relative precision of
// kMantissa bits. The scale makes the largest of a block the largest code.
//
// Squares have four times the octaves of what has a sign, twice the decades. They are rounded
// stochastically: a moving average moves by less than half a code in most steps, and would never
// move at all. They do not
// become code 0, so that they do not decode to 0: a denominator of eps alone would make a step of
// any size. Code 0 is what new states are filled with.
template <bool is_signed>
struct Codes {
  static constexpr int kMantissa = is_signed ? 5 : 4;
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kMaxCode = is_signed ? 127 : 255;
  static constexpr uint32_t kOne = 127u << 23;  // the bits of 1.0
  static constexpr uint32_t kSign = 1u << 31;

  static FASTOPT_INLINE float level(uint32_t code) {
    return bit_cast<float>((code << kShift) + kOne) - 1.0f;
  }
  static FASTOPT_INLINE float scale_of(uint32_t largest) {
    const float scale = bit_cast<float>(largest) / level(kMaxCode);
    return scale < 0x1p-120f ? 0x1p-120f : scale;  // no denormal numbers, for their inverses
  }
  static FASTOPT_INLINE float get(const void* a, float scale, int32_t i) {
    if constexpr (is_signed) {
      // The sign of the code's extension to 32 bits becomes that of z, and of 1.
      const auto code = static_cast<uint32_t>(int32_t{static_cast<const int8_t*>(a)[i]});
      const uint32_t z = (code << kShift & (kMaxCode << kShift | kSign)) + kOne;
      return (bit_cast<float>(z) - bit_cast<float>((code & kSign) | kOne)) * scale;
    }
    return level(static_cast<const uint8_t*>(a)[i]) * scale;
  }
  static FASTOPT_INLINE void put(float x, uint32_t random, void* a, float inverse, int32_t i) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const float z = bit_cast<float>(bits & ~kSign) * inverse + 1.0f;
    // By 16 bits the largest z, with its rounding errors, stays within the largest code.
    const uint32_t dither = is_signed ? 1u << (kShift - 1) : random << (kShift - 16);
    const uint32_t code = bit_cast<uint32_t>(z) + dither - kOne;
    // Computed in the upper bits, for the compiler to narrow one vector and not two.
    static_cast<uint8_t*>(a)[i] = static_cast<uint8_t>(
        is_signed ? ((code << (24 - kShift) & 0x7f000000) | (bits & kSign)) >> 24
                  : std::max(code >> kShift, 1u));
  }
};

template <>
struct Packed<Packing::codes> : Codes<true> {};
template <>
struct Packed<Packing::unsigned_codes> : Codes<false> {};

// Makes n numbers of the arrays `a` and `b`.
template <Packing packing>
struct Unpack {
  static FASTOPT_INLINE void run(const void* a, const void* b, int32_t n, float* x) {
    if constexpr (is_coded(packing)) {
      for (int32_t begin = 0; begin < n; begin += kCodeBlock) {
        const int32_t end = std::min(begin + kCodeBlock, n);
        const float scale = static_cast<const float*>(b)[begin / kCodeBlock];
        for (int32_t i = begin; i < end; ++i) x[i] = Packed<packing>::get(a, scale, i);
      }
    } else {
      for (int32_t i = 0; i < n; ++i) x[i] = Packed<packing>::get(a, b, i);
    }
  }
};

// Stores n numbers, which begin with the element `first` of a chunk, in the arrays.
template <Packing packing>
struct Pack {
  static FASTOPT_INLINE void run(const float* x, uint32_t key, int32_t first, int32_t n, void* a,
                                 void* b) {
    if constexpr (is_coded(packing)) {
      for (int32_t begin = 0; begin < n; begin += kCodeBlock) {
        const int32_t end = std::min(begin + kCodeBlock, n);
        uint32_t largest = 0;
        for (int32_t i = begin; i < end; ++i)
          largest = std::max(largest, bit_cast<uint32_t>(x[i]) & 0x7fffffff);
        const float scale = Packed<packing>::scale_of(largest);
        static_cast<float*>(b)[begin / kCodeBlock] = scale;
        const float inverse = 1.0f / scale;
        for (int32_t i = begin; i < end; ++i)
          Packed<packing>::put(x[i], random_bits(key, first + i), a, inverse, i);
      }
    } else {
      for (int32_t i = 0; i < n; ++i)
        Packed<packing>::put(x[i], random_bits(key, first + i), a, b, i);
    }
  }
};

}  // namespace fastopt
