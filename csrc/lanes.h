// Numbers by lanes: one at a time, or eight in vectors that are spelled out.
//
// Left to itself the compiler vectorizes a loop by as many numbers as fill a vector of its
// narrowest type, 16 or 32. Conversions between 8, 16 and 32 bits then take several instructions
// for each vector; here one widens 8 numbers, and 2 or 4 vectors are narrowed together.
#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

namespace fastopt {

template <class To, class From>
FASTOPT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

struct OneLane {
  using F = float;
  using U = uint32_t;
  static constexpr int n = 1;
  template <class Stored>
  static constexpr int vectors = 1;  // that fill a vector of `Stored`

  static FASTOPT_INLINE F floats(U x) { return bit_cast<F>(x); }
  static FASTOPT_INLINE U bits(F x) { return bit_cast<U>(x); }
  static FASTOPT_INLINE U fill(uint32_t x) { return x; }
  static FASTOPT_INLINE U iota() { return 0; }
  static FASTOPT_INLINE F load(const float* x) { return *x; }
  static FASTOPT_INLINE void store(F x, float* to) { *to = x; }
  // Extends integers, those with a sign by their sign.
  template <class Stored>
  static FASTOPT_INLINE U widen(const Stored* x) {
    return static_cast<U>(*x);
  }
  template <class Stored>
  static FASTOPT_INLINE void store_upper_bits(const U (&x)[1], Stored* to) {
    *to = static_cast<Stored>(x[0] >> (32 - 8 * sizeof(Stored)));
  }
  static FASTOPT_INLINE void store_lower_bits(const U (&x)[1], uint16_t* to) {
    *to = static_cast<uint16_t>(x[0]);
  }
};

#if FASTOPT_X86_LEVELS
struct EightLanes {
  typedef float F __attribute__((vector_size(32)));
  typedef uint32_t U __attribute__((vector_size(32)));
  static constexpr int n = 8;
  template <class Stored>
  static constexpr int vectors = 4 / sizeof(Stored);

  static FASTOPT_INLINE F floats(U x) { return reinterpret_cast<F>(x); }
  static FASTOPT_INLINE U bits(F x) { return reinterpret_cast<U>(x); }
  static FASTOPT_INLINE U fill(uint32_t x) { return U{} + x; }
  static FASTOPT_INLINE U iota() { return U{0, 1, 2, 3, 4, 5, 6, 7}; }
  static FASTOPT_INLINE F load(const float* x) { return *reinterpret_cast<const UnalignedF*>(x); }
  static FASTOPT_INLINE void store(F x, float* to) { *reinterpret_cast<UnalignedF*>(to) = x; }
  template <class Stored>
  static FASTOPT_INLINE U widen(const Stored* x) {
    // Not __builtin_convertvector, of which GCC 12 makes two halves.
    return U{OneLane::widen(x),     OneLane::widen(x + 1), OneLane::widen(x + 2),
             OneLane::widen(x + 3), OneLane::widen(x + 4), OneLane::widen(x + 5),
             OneLane::widen(x + 6), OneLane::widen(x + 7)};
  }
  static FASTOPT_INLINE void store_upper_bits(const U (&x)[2], uint16_t* to) {
    *reinterpret_cast<UnalignedHalves*>(to) = upper_halves(x[0], x[1]);
  }
  static FASTOPT_INLINE void store_upper_bits(const U (&x)[4], uint8_t* to) {
    *reinterpret_cast<UnalignedBytes*>(to) = __builtin_shufflevector(
        reinterpret_cast<Bytes>(upper_halves(x[0], x[1])),
        reinterpret_cast<Bytes>(upper_halves(x[2], x[3])), 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21,
        23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
  }
  static FASTOPT_INLINE void store_lower_bits(const U (&x)[2], uint16_t* to) {
    *reinterpret_cast<UnalignedHalves*>(to) = __builtin_shufflevector(
        reinterpret_cast<Halves>(x[0]), reinterpret_cast<Halves>(x[1]), 0, 2, 4, 6, 8, 10, 12, 14,
        16, 18, 20, 22, 24, 26, 28, 30);
  }

 private:
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint8_t Bytes __attribute__((vector_size(32)));
  typedef F UnalignedF __attribute__((aligned(1), may_alias));
  typedef Halves UnalignedHalves __attribute__((aligned(1), may_alias));
  typedef Bytes UnalignedBytes __attribute__((aligned(1), may_alias));

  static FASTOPT_INLINE Halves upper_halves(U x, U y) {
    return __builtin_shufflevector(reinterpret_cast<Halves>(x), reinterpret_cast<Halves>(y), 1, 3,
                                   5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
};
#else
using EightLanes = OneLane;
#endif

// Calls f(Lanes, i) for each group of `vectors` vectors that begins with the i-th of n numbers, and
// f(OneLane, i) for each number that is left.
template <class Lanes, int vectors, class Index, class F>
FASTOPT_INLINE void for_each_group(Index n, const F& f) {
  constexpr int group = vectors * Lanes::n;
  Index i = 0;
  for (; i + group <= n; i += group) f(Lanes(), i);
  if constexpr (group > 1)
    for (; i < n; ++i) f(OneLane(), i);
}

}  // namespace fastopt
