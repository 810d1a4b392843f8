// The names of the Tensor-Train kernels' pieces of scratch memory (common/workspace.h).
#pragma once

#include <cstdint>

#include "common/workspace.h"

namespace finite_width::tt {

// Two pieces of one thread with different names do not overlap.
enum class Piece : int {
  merged_left,  // the chains of cores, multiplied out
  merged_right,
  gradient_left,
  gradient_right,
  merge_step,
  half_a,
  half_a_transposed,
  half_b,
  half_b_transposed,
  a_gradient,
  b_gradient,
  slots,
  dense,
  dense_gradient,
  wide_x,
  wide_y,
  wide_z,
  wide_cores,
  tile_t,
  tile_d,
  tile_v,
  count,
};

// At least `size` values of this thread's scratch memory; valid until the thread asks for more of the same piece.
template <class T>
T* scratch(Piece piece, int64_t size) {
  constexpr int kFirst = 8;  // the slots before are those of the tile GEMM and of other kernels that nest it
  static_assert(kFirst + static_cast<int>(Piece::count) <= kWorkspaceSlots);
  return ::finite_width::thread_workspace<T>(kFirst + static_cast<int>(piece), size);
}

}  // namespace finite_width::tt
