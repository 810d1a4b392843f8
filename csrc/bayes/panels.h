// How the linear kernels of the variational layers cut their weights: panels of rows, spans of a tensor, scratch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bayes/bayes.h"

namespace finite_width {

// A quarter of the weights, so that they never stand in memory as a whole; 1 MB of float at least, and 8 MB at most: a
// panel stays in the last cache.
constexpr int64_t kLeastPanel = int64_t{1} << 18, kMostPanel = int64_t{1} << 21;

// Scratch; the GEMM called in between has the first slots.
constexpr int kBiasSlot = 5, kPanelSlot = 6, kProductSlot = 7;

// Rows of W per panel, in whole groups of noise.
inline int64_t panel_rows(int64_t in, int64_t out) {
  const int64_t elements = std::clamp(in * out / 4, kLeastPanel, kMostPanel);
  const int64_t fitting = elements / std::max<int64_t>(in, 1) / kNoiseGroup * kNoiseGroup;
  return std::min(out, std::max(fitting, kNoiseGroup));
}

// Elements [offset, offset + count) of a span.
template <class T>
Span<T> part_of(const Span<T>& span, int64_t offset, int64_t count) {
  Span<T> part = span;
  part.mu += offset;
  part.rho += offset;
  if (part.prior_mean) part.prior_mean += offset;
  if (part.weight) part.weight += offset;
  part.begin += offset;
  part.count = count;
  return part;
}

}  // namespace finite_width
