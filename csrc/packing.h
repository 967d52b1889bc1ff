// How numbers are kept: plainly, or in two arrays: 16-bit parameters with what makes fp32 masters of
// them, and 8-bit states with their scales. The functions of fastopt/packing.py, with the same bits.
//
// The arithmetic sees fp32 numbers only. They are kept in the elements' own array `a` and an array
// `b` that goes with it, both contiguous.
#pragma once

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "dtypes.h"
#include "isa.h"
#include "random.h"

namespace fastopt {

enum class Packing : int {
  remainder,
  master_of_bfloat16,
  master_of_float16,
  stochastic,
  codes,
  unsigned_codes,  // for numbers that are not negative
};
inline constexpr int kPackings = 6;

constexpr bool is_coded(Packing packing) {
  return packing == Packing::codes || packing == Packing::unsigned_codes;
}
constexpr bool is_random(Packing packing) {
  return is_coded(packing) || packing == Packing::stochastic;
}

inline constexpr int32_t kSumBlock = 256;  // elements that share a checksum

// What numbers can be kept as: plainly as each DType, then in each Packing. STORAGES of
// fastopt/packing.py, which are compared by name on loading.
struct Storage {
  const char* name;
  int64_t a_bytes;  // of an element of the first array
  int64_t b_bytes;  // of an element of the second one; 0: there is none
};
inline constexpr Storage kStorages[] = {
    {"float32", 4, 0},
    {"float64", 8, 0},
    {"bfloat16", 2, 0},
    {"float16", 2, 0},
    {"remainder", 2, 2},
    {"master_of_bfloat16", 2, 4},
    {"master_of_float16", 2, 4},
    {"stochastic", 2, 0},
    {"codes", 1, 4},
    {"unsigned_codes", 1, 4},
};
static_assert(std::size(kStorages) == kDTypes + kPackings);

// To nearest, ties away from zero: a remainder of 16 bits cannot tell the two ties of an even number
// apart, which both would round to it. In the upper bits.
template <class L>
FASTOPT_INLINE typename L::U nearest_bfloat16(typename L::F x) {
  return x != x ? L::fill(kNaN) : L::bits(x) + 0x8000;
}

// What belongs to the elements from the i-th on, one for each lane of L: `get` makes the numbers,
// `put` what is to be stored of them in the upper bits of `a`, and in `b`, with 32 random bits.
template <Packing>
struct Packed;

template <>
struct Packed<Packing::remainder> {
  template <class L>
  static FASTOPT_INLINE typename L::F get(const void* a, const void* b, int32_t i) {
    const typename L::U bits = L::widen(static_cast<const uint16_t*>(a) + i) << 16;
    const typename L::U remainder = L::widen(static_cast<const int16_t*>(b) + i);
    const typename L::F value = L::floats(bits);
    const typename L::F master = L::floats(bits + remainder);
    // A parameter that was set to 0 or infinity, with the remainder of what it was before.
    return master != master ? value : master;
  }
  template <class L>
  static FASTOPT_INLINE void put(typename L::F x, typename L::U, typename L::U& a,
                                 typename L::U& b) {
    a = nearest_bfloat16<L>(x);
    b = x != x ? L::fill(0) : L::bits(x);
  }
};

template <DType dtype>
struct PackedMaster {
  template <class L>
  static FASTOPT_INLINE typename L::U encode(typename L::F x) {
    if constexpr (dtype == DType::bfloat16)
      return nearest_bfloat16<L>(x) >> 16;
    else
      return Element<dtype>::encode(x);
  }
  template <class L>
  static FASTOPT_INLINE typename L::F decode(const uint16_t* x) {
    if constexpr (dtype == DType::bfloat16)
      return decode_bfloat16<L>(x);
    else
      return Element<dtype>::decode(*x);
  }
  template <class L>
  static FASTOPT_INLINE typename L::F get(const void* a, const void* b, int32_t i) {
    const auto* param = static_cast<const uint16_t*>(a) + i;
    const typename L::F master = L::load(static_cast<const float*>(b) + i);
    // A master that is not what the parameter was rounded from is out of date.
    return encode<L>(master) == L::widen(param) ? master : decode<L>(param);
  }
  template <class L>
  static FASTOPT_INLINE void put(typename L::F x, typename L::U, typename L::U& a,
                                 typename L::U& b) {
    a = encode<L>(x) << 16;
    b = L::bits(x);
  }
};

template <>
struct Packed<Packing::master_of_bfloat16> : PackedMaster<DType::bfloat16> {};
template <>
struct Packed<Packing::master_of_float16> : PackedMaster<DType::float16> {};

// Rounds up with a probability that is the dropped part: unbiased.
template <>
struct Packed<Packing::stochastic> {
  template <class L>
  static FASTOPT_INLINE typename L::F get(const void* a, const void*, int32_t i) {
    return decode_bfloat16<L>(static_cast<const uint16_t*>(a) + i);
  }
  template <class L>
  static FASTOPT_INLINE void put(typename L::F x, typename L::U random, typename L::U& a,
                                 typename L::U&) {
    a = x != x ? L::fill(kNaN) : L::bits(x) + (random >> 16);
  }
};

// A code c stands for (z - 1) * scale, where z is the c-th number from 1 on that has kMantissa bits
// after the point: evenly spaced near 0, then in octaves, each with the relative precision of
// kMantissa bits. The scale makes the largest of a block the largest code.
//
// Rounded stochastically: a moving average moves by less than half a code in many steps, and would
// never move at all, not even to 0 after the last gradient.
//
// Squares have four times the octaves of what has a sign, twice the decades. They do not become
// code 0, so that they do not decode to 0: a denominator of eps alone would make a step of any size.
// Code 0 is what new states are filled with.
template <bool is_signed>
struct Codes {
  static constexpr int kMantissa = is_signed ? 5 : 4;
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kMaxCode = is_signed ? 127 : 255;
  static constexpr uint32_t kOne = 127u << 23;  // the bits of 1.0
  static constexpr uint32_t kSign = 1u << 31;

  template <class L>
  static FASTOPT_INLINE typename L::F level(typename L::U code) {
    return L::floats((code << kShift) + kOne) - 1.0f;
  }
  static FASTOPT_INLINE float scale_of(uint32_t largest) {
    if (largest >= 0x7f800000) return bit_cast<float>(kNaN);
    const float scale = bit_cast<float>(largest) / level<OneLane>(kMaxCode);
    return scale < 0x1p-120f ? 0x1p-120f : scale;  // no denormal numbers, for their inverses
  }
  template <class L>
  static FASTOPT_INLINE typename L::F get(const void* a, float scale, int32_t i) {
    if constexpr (is_signed) {
      // Extended to 32 bits, a code has its sign where a number has its own: -0 stays -0.
      const typename L::U code = L::widen(static_cast<const int8_t*>(a) + i);
      return L::floats(L::bits(level<L>(code & kMaxCode) * scale) | (code & kSign));
    } else {
      return level<L>(L::widen(static_cast<const uint8_t*>(a) + i)) * scale;
    }
  }
  template <class L>
  static FASTOPT_INLINE typename L::U put(typename L::F x, typename L::U random, float inverse) {
    const typename L::U bits = L::bits(x);
    const typename L::F z = L::floats(bits & ~kSign) * inverse + 1.0f;
    // Both moments round by bits of their own. The last one of 16 is left out where the largest z,
    // with its rounding errors, might get beyond the largest code.
    const typename L::U dither =
        (is_signed ? random & 0xfffe : random >> 16) << (kShift - 16);
    const typename L::U code = (L::bits(z) + (dither - kOne)) << (24 - kShift);
    if constexpr (is_signed)
      return (code & (kMaxCode << 24)) | (bits & kSign);
    const typename L::U smallest = L::fill(1u << 24);
    return code > smallest ? code : smallest;
  }
};

template <>
struct Packed<Packing::codes> : Codes<true> {};
template <>
struct Packed<Packing::unsigned_codes> : Codes<false> {};

// The conversions of fp16 are written for one number at a time.
template <Packing packing, class Lanes>
using LanesFor = std::conditional_t<packing == Packing::master_of_float16, OneLane, Lanes>;

// A weighted sum of the 16-bit words. A change of one word always changes it; other changes may be
// missed, once in about 2^16 blocks or more: then an old remainder moves them by half a bf16 step.
struct SumFactors {
  int16_t of[kSumBlock];
  constexpr SumFactors() : of() {
    for (uint32_t i = 0; i < kSumBlock; ++i) {
      const uint32_t x = (i + 1) * 0x9e3779b1;
      of[i] = static_cast<int16_t>((x ^ x >> 16) * 0x2c1b3c6d >> 17 | 1);
    }
  }
};
inline constexpr SumFactors kSumFactors;

FASTOPT_INLINE uint32_t checksum(const int16_t* a, int32_t n) {
  uint32_t sum = 0;
  for (int32_t i = 0; i < n; ++i) sum += static_cast<uint32_t>(a[i] * kSumFactors.of[i]);
  return sum;
}

// Makes n numbers of the arrays `a` and `b`; of codes, whole blocks that share a scale.
template <Packing packing, class Lanes>
struct Unpack {
  static FASTOPT_INLINE void run(const void* a, const void* b, const uint32_t* sums, int32_t block,
                                 int32_t n, float* x) {
    if constexpr (packing == Packing::remainder) {
      static constexpr int16_t nothing[kSumBlock] = {};
      for (int32_t begin = 0; begin < n; begin += kSumBlock) {
        const int32_t count = std::min(kSumBlock, n - begin);
        const int16_t* param = static_cast<const int16_t*>(a) + begin;
        // Else somebody else wrote the parameter, and the remainder is out of date.
        const bool stands = checksum(param, count) == sums[begin / kSumBlock];
        const int16_t* remainder = stands ? static_cast<const int16_t*>(b) + begin : nothing;
        for_each_group<Lanes, 1>(count, [&](auto lanes, int32_t i) FASTOPT_INLINE_LAMBDA {
          using L = decltype(lanes);
          L::store(Packed<packing>::template get<L>(param, remainder, i), x + begin + i);
        });
      }
    } else if constexpr (is_coded(packing)) {
      const auto* scales = static_cast<const float*>(b);
      for (int32_t begin = 0; begin < n; begin += block) {
        const float scale = *scales++;
        for_each_group<Lanes, 1>(block, [&](auto lanes, int32_t i) FASTOPT_INLINE_LAMBDA {
          using L = decltype(lanes);
          L::store(Packed<packing>::template get<L>(a, scale, begin + i), x + begin + i);
        });
      }
    } else {
      for_each_group<LanesFor<packing, Lanes>, 1>(
          n, [&](auto lanes, int32_t i) FASTOPT_INLINE_LAMBDA {
            using L = decltype(lanes);
            L::store(Packed<packing>::template get<L>(a, b, i), x + i);
          });
    }
  }
};

// Stores n numbers, which begin with the element `first` of a chunk, in the arrays.
template <Packing packing, class Lanes>
struct Pack {
  static FASTOPT_INLINE void run(const float* x, uint32_t key, int32_t first, int32_t block,
                                 int32_t n, void* a, void* b, uint32_t* sums) {
    if constexpr (is_coded(packing)) {
      auto* scales = static_cast<float*>(b);
      // All scales before all codes: the processor need not wait for one before it goes on.
      for (int32_t k = 0; k * block < n; ++k) scales[k] = scale_of(x + k * block, block);
      for (int32_t begin = 0; begin < n; begin += block)
        encode(x + begin, advance(key, first + begin), block, 1.0f / *scales++,
               static_cast<uint8_t*>(a) + begin);
    } else {
      using Wide = LanesFor<packing, Lanes>;
      constexpr int vectors = Wide::template vectors<uint16_t>;
      for_each_group<Wide, vectors>(n, [&](auto lanes, int32_t i) FASTOPT_INLINE_LAMBDA {
        using L = decltype(lanes);
        constexpr int count = L::template vectors<uint16_t>;
        const uint32_t key_here = advance(key, first + i);
        typename L::U of_a[count], of_b[count];
        for (int k = 0; k < count; ++k) {
          const int32_t at = i + k * L::n;
          Packed<packing>::template put<L>(L::load(x + at), random_bits<L>(key_here, k * L::n),
                                           of_a[k], of_b[k]);
          if constexpr (packing == Packing::master_of_bfloat16 ||
                        packing == Packing::master_of_float16)
            L::store(L::floats(of_b[k]), static_cast<float*>(b) + at);
        }
        L::store_upper_bits(of_a, static_cast<uint16_t*>(a) + i);
        if constexpr (packing == Packing::remainder)
          L::store_lower_bits(of_b, static_cast<uint16_t*>(b) + i);
      });
      if constexpr (packing == Packing::remainder)
        for (int32_t begin = 0; begin < n; begin += kSumBlock)
          sums[begin / kSumBlock] = checksum(static_cast<const int16_t*>(a) + begin,
                                             std::min(kSumBlock, n - begin));
    }
  }

 private:
  static FASTOPT_INLINE float scale_of(const float* x, int32_t n) {
    uint32_t largest = 0;
    for (int32_t i = 0; i < n; ++i)
      largest = std::max(largest, bit_cast<uint32_t>(x[i]) & 0x7fffffff);
    return Packed<packing>::scale_of(largest);
  }
  static FASTOPT_INLINE void encode(const float* x, uint32_t key, int32_t n, float inverse,
                                    uint8_t* codes) {
    for_each_group<Lanes, Lanes::template vectors<uint8_t>>(
        n, [&](auto lanes, int32_t i) FASTOPT_INLINE_LAMBDA {
          using L = decltype(lanes);
          constexpr int vectors = L::template vectors<uint8_t>;
          const uint32_t key_here = advance(key, i);
          typename L::U words[vectors];
          for (int k = 0; k < vectors; ++k)
            words[k] = Packed<packing>::template put<L>(
                L::load(x + i + k * L::n), random_bits<L>(key_here, k * L::n), inverse);
          L::store_upper_bits(words, codes + i);
        });
  }
};

}  // namespace fastopt
