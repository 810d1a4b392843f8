// Asynchronous copies and warp-wide matrix products for the emulation; cuda_runtime.h includes it.
#pragma once

namespace cuda_on_host {

// cp.async: nothing is copied before a wait demands it.
inline void copy_async(void* to, const void* from, size_t bytes, size_t size) {
  if (bytes > size) fail("an asynchronous copy of more bytes than it has room for");
  for (const void* place : {static_cast<const void*>(to), from}) {
    if (reinterpret_cast<uintptr_t>(place) % size) fail("an asynchronous copy that is not aligned");
  }
  Block::instance().copies().back().push_back({to, from, bytes, size});
}

inline void commit_copies() {
  Block::instance().copies().emplace_back();
}

// Until at most `pending` closed groups are left.
inline void wait_for_copies(size_t pending) {
  auto& groups = Block::instance().copies();
  while (groups.size() > pending + 1) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.bytes);
      std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounds toward zero, as tensor cores do where they add.
inline float truncate(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? std::nextafter(nearest, 0.0f) : nearest;
}

// float16 and its rounding, by the compiler's own type.
inline float float_of_half(uint16_t bits) {
  _Float16 value;
  std::memcpy(&value, &bits, sizeof value);
  return static_cast<float>(value);
}

inline uint16_t round_to_half(float value) {
  const _Float16 nearest = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &nearest, sizeof bits);
  return bits;
}

// Which register of which lane holds an element, and which half of it: the tables "Matrix Fragments for mma.m16n8k8"
// (.tf32) and "mma.m16n8k16" (.bf16) of the PTX ISA, read backwards. g and t are groupID and threadID_in_group.
struct Place {
  int lane, reg, half;
};

struct Tf32 {
  static constexpr int kDepth = 8;
  static Place a(int row, int k) {
    return {row % 8 * 4 + k % 4, row / 8 + k / 4 * 2, 0};
  }  // a0 (g, t), a1 (g+8, t), ...
  static Place b(int k, int column) { return {column * 4 + k % 4, k / 4, 0}; }     // b0 (t, g), b1 (t+4, g)
  static float value(uint32_t word, int) { return float_of(word & 0xffffe000u); }  // the rest is not looked at
};

struct Bf16 {
  static constexpr int kDepth = 16;
  static Place a(int row, int k) { return {row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2}; }
  static Place b(int k, int column) { return {column * 4 + k % 8 / 2, k / 8, k % 2}; }
  static float value(uint32_t word, int half) { return float_of(half ? word & 0xffff0000u : word << 16); }
};

struct Fp16 : Bf16 {
  static float value(uint32_t word, int half) { return float_of_half(static_cast<uint16_t>(half ? word >> 16 : word)); }
};

// c [16, 8] += a [16, kDepth] b [kDepth, 8] over the fragments of the warp's lanes: c0, c1 at (g, 2t), (g, 2t + 1), and
// c2, c3 eight rows below. One sum, then one truncation.
template <class Type>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Block& block = Block::instance();
  Group& warp = block.warp();
  if (warp.alive != kWarp) fail("a matrix product in a warp of which threads are missing");
  uint32_t* own = warp.fragments[block.lane()];
  std::memcpy(own, a, sizeof a);
  std::memcpy(own + 4, b, sizeof b);
  block.barrier(warp);
  for (int i = 0; i < 4; ++i) {
    const int row = block.lane() / 4 + i / 2 * 8, column = block.lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < Type::kDepth; ++k) {
      const Place left = Type::a(row, k), right = Type::b(k, column);
      sum += static_cast<double>(Type::value(warp.fragments[left.lane][left.reg], left.half)) *
             Type::value(warp.fragments[right.lane][4 + right.reg], right.half);
    }
    c[i] = truncate(sum);
  }
  block.barrier(warp);
}

// ldmatrix.x4: the figure "mma.sync.m8n8 matrix fragment" of the PTX ISA, from the rows that the lanes name.
inline void load_matrices(uint32_t (&words)[4], const void* row, bool across) {
  Block& block = Block::instance();
  Group& warp = block.warp();
  if (warp.alive != kWarp) fail("a load of matrices in a warp of which threads are missing");
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a load of matrices that is not aligned");
  warp.slots[block.lane()] = reinterpret_cast<uintptr_t>(row);
  block.barrier(warp);
  const int g = block.lane() / 4, t = block.lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int line = across ? 2 * t + i : g, place = across ? g : 2 * t + i;
      std::memcpy(&pair[i], reinterpret_cast<const uint16_t*>(warp.slots[8 * m + line]) + place, sizeof pair[i]);
    }
    words[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  block.barrier(warp);
}

}  // namespace cuda_on_host
