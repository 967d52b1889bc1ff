// Random numbers that are a function of where they are used: of a seed, the number of the step, the
// parameter's place in the optimizer, the chunk and the element. fastopt/packing.py and
// kernels/packing.py spell the same function, so that all backends round alike.
#pragma once

#include <cstdint>

#include "isa.h"

namespace fastopt {

// For a chunk. Each word is mixed in with the finalizer of SplitMix64: Steele, Lea and Flood 2014.
inline uint32_t random_key(uint64_t seed, uint64_t step, uint64_t param, uint64_t chunk) {
  uint64_t key = 0;
  for (uint64_t word : {seed, step, param, chunk}) {
    uint64_t z = (key + 0x9e3779b97f4a7c15) ^ word;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    key = z ^ (z >> 31);
  }
  return static_cast<uint32_t>(key >> 32);
}

inline constexpr uint32_t kWeyl = 0x9e3779b1;

// The key with which the i-th element becomes the 0-th.
FASTOPT_INLINE uint32_t advance(uint32_t key, int32_t i) {
  return static_cast<uint32_t>(i) * kWeyl + key;
}

// 32 bits for each lane, for the elements of a chunk from the i-th on: a Weyl sequence that starts
// at the key, and one round of shift and multiply. Little, because it is computed where an 8-bit
// state has few cycles to spare; tests/packing/test_packing.py shows that it is enough.
template <class L>
FASTOPT_INLINE typename L::U random_bits(uint32_t key, int32_t i) {
  typename L::U x = (L::iota() + static_cast<uint32_t>(i)) * kWeyl + key;
  x = (x ^ (x >> 16)) * 0x2c1b3c6d;
  return x;
}

}  // namespace fastopt
