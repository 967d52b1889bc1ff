// All 2^32 patterns through csrc/packing.h; run by tests/test_packing.py. Prints the number of masters
// whose parameter is not their rounding to nearest, ties to even; exits with 1 where a master does not
// come back, or a parameter with any remainder makes a number that does not round to it.
#include <cstdio>

#include "packing.h"

using namespace fastopt;

int main() {
  constexpr int kBlock = 1 << 16;
  long long away = 0, wrong = 0;
#pragma omp parallel for reduction(+ : away, wrong)
  for (int upper = 0; upper < 1 << 16; ++upper) {
    static thread_local float in[kBlock], out[kBlock];
    static thread_local uint16_t param[kBlock], remainder[kBlock];
    static thread_local uint32_t sums[kBlock / kSumBlock];
    for (int lower = 0; lower < kBlock; ++lower)
      in[lower] = bit_cast<float>(static_cast<uint32_t>(upper) << 16 | lower);
    Pack<Packing::remainder, EightLanes>::run(in, 0, 0, 1, kBlock, param, remainder, sums);
    Unpack<Packing::remainder, EightLanes>::run(param, remainder, sums, 1, kBlock, out);
    int block_away = 0, block_wrong = 0;
    for (int i = 0; i < kBlock; ++i) {
      const bool nan = in[i] != in[i];
      const int even = Element<DType::bfloat16>::encode(in[i]), found = param[i];
      const bool comes_back = bit_cast<uint32_t>(out[i]) == bit_cast<uint32_t>(in[i]);
      const bool stays_nan = out[i] != out[i] && (found & 0x7fff) > 0x7f80;
      block_wrong += !(nan ? stays_nan : comes_back);
      // Where the two roundings differ, it was a tie, and this went away from zero.
      const bool tie = i == 0x8000 && even == upper && found == upper + 1;
      block_wrong += !nan & (found != even) & !tie;
      block_away += !nan & (found != even);
    }
    // Any remainder beside any parameter: `upper` and `lower`.
    std::fill(param, param + kBlock, static_cast<uint16_t>(upper));
    for (int lower = 0; lower < kBlock; ++lower) remainder[lower] = static_cast<uint16_t>(lower);
    for (int i = 0; i < kBlock; i += kSumBlock)
      sums[i / kSumBlock] = checksum(reinterpret_cast<const int16_t*>(param) + i, kSumBlock);
    Unpack<Packing::remainder, EightLanes>::run(param, remainder, sums, 1, kBlock, out);
    const bool nan = (upper & 0x7fff) > 0x7f80;
    for (int i = 0; i < kBlock; ++i)
      block_wrong += nan ? out[i] == out[i] : static_cast<int>(nearest_bfloat16<OneLane>(out[i]) >> 16) != upper;
    away += block_away;
    wrong += block_wrong;
  }
  std::printf("%lld\n", away);
  return wrong != 0;
}
