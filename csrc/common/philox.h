// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and how the noise is numbered.
//
// Element i of a tensor of noise belongs to group i / 64. Within the group, with w = (i % 64) / 16 and l = i % 16, it
// is made from word w of the Philox block with
//   key     = (seed bits 0-31, seed bits 32-63)
//   counter = (block bits 0-31, block bits 32-63, sample, stream),   block = 16 * (i / 64) + l
// so that 16 adjacent lanes of a vector register run 16 adjacent counters and store 16 adjacent elements. Words 0 and 1
// make one Box-Muller pair, words 2 and 3 the other. Nothing depends on threads, on the vector width or on the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FW_HOST_DEVICE __host__ __device__ inline
#else
#define FW_HOST_DEVICE inline
#endif

namespace finite_width {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;
constexpr int64_t kNoiseGroup = 64;  // elements that share 16 counters
constexpr int64_t kNoiseLanes = 16;

// What names a tensor of noise.
struct NoiseKey {
  uint64_t seed;    // drawn by each call
  uint32_t sample;  // which of several samples of one call
  uint32_t stream;  // which tensor of the layer: 0 the weight, 1 the bias
};

// counter [4] -> 4 random words, in place.
FW_HOST_DEVICE void philox4x32_10(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * counter[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * counter[2];
    const uint32_t next0 = static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0;
    const uint32_t next2 = static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1;
    counter[1] = static_cast<uint32_t>(product1);
    counter[3] = static_cast<uint32_t>(product0);
    counter[0] = next0;
    counter[2] = next2;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

}  // namespace finite_width
