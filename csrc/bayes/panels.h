// How the linear kernels of the variational layers cut their weights: panels of rows, spans of a tensor, scratch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "bayes/bayes.h"

namespace finite_width {

constexpr int64_t kPanelElements = int64_t{1} << 21;  // 8 MB of float: a panel stays in the last cache

// Scratch; the GEMM called in between has the first slots.
constexpr int kBiasSlot = 5, kPanelSlot = 6, kProductSlot = 7;

// Rows of W per panel: whole groups of noise, and as many as fit into kPanelElements.
inline int64_t panel_rows(int64_t in, int64_t out) {
  const int64_t fitting = kPanelElements / std::max<int64_t>(in, 1) / kNoiseGroup * kNoiseGroup;
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
