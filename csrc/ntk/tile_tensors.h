// What the NTK wing's bindings for the CPU and for CUDA share: kernel tiles, shapes, and cotangents as the kernels want
// them. The device is checked by each.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "common/check.h"
#include "ntk/ntk.h"

namespace finite_width::ntk {

inline bool same_memory(const Tensor& one, const Tensor& two) {
  bool same = one.const_data_ptr() == two.const_data_ptr() && one.dim() == two.dim();
  for (int64_t axis = 0; same && axis < one.dim(); ++axis) {
    same = one.size(axis) == two.size(axis) && one.stride(axis) == two.stride(axis);
  }
  return same;
}

// A number and not a name: torch's stable-ABI headers leak a string for every text argument of every call.
inline Contraction contraction_of(int64_t compute) {
  STD_TORCH_CHECK(compute >= 0 && compute <= 2,
                  "finite_width: compute must be 0 (full), 1 (diagonal) or 2 (trace), got ", compute);
  return static_cast<Contraction>(compute);
}

template <class T>
Tile<T> tile_of(const Tensor& out, Contraction contraction) {
  const bool full = contraction == Contraction::full;
  return {out.mutable_data_ptr<T>(), out.stride(0), out.stride(1),
          contraction == Contraction::trace ? 0 : out.stride(2), full ? out.stride(3) : 0};
}

inline void check_tile(const Tensor& out, int64_t rows, int64_t columns, int64_t outputs, Contraction contraction) {
  check_float_or_double(out, "out");
  if (contraction == Contraction::full) {
    check_shape(out, "out", {rows, columns, outputs, outputs});
  } else if (contraction == Contraction::diagonal) {
    check_shape(out, "out", {rows, columns, outputs});
  } else {
    check_shape(out, "out", {rows, columns});
  }
}

constexpr int64_t kShortRun = 64;  // adjacent channels that take longer to pack than to copy

// Cotangents [rows, O, C] with adjacent channels; where these are few, for a trace with adjacent outputs too.
inline Tensor cotangents(const Tensor& d, Contraction contraction) {
  const bool adjacent = d.size(2) <= 1 || d.stride(2) == 1;
  const bool outputs_adjacent = d.size(1) <= 1 || d.stride(1) == d.size(2);
  const bool long_runs = contraction != Contraction::trace || outputs_adjacent || d.size(2) >= kShortRun;
  return adjacent && long_runs ? d : torch::stable::contiguous(d);
}

// The shapes of ntk_gram_accumulate.
inline void check_gram(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2,
                       Contraction contraction) {
  check_dim(a1, "a1", 2);
  check_shape(a2, "a2", {-1, a1.size(1)});
  check_dim(d1, "d1", 3);
  check_shape(d1, "d1", {a1.size(0), -1, -1});
  check_shape(d2, "d2", {a2.size(0), d1.size(1), d1.size(2)});
  check_tile(out, a1.size(0), a2.size(0), d1.size(1), contraction);
}

// The shapes of ntk_jacobian_accumulate.
inline void check_jacobian(const Tensor& out, const Tensor& j1, const Tensor& j2, Contraction contraction) {
  check_dim(j1, "j1", 3);
  check_shape(j2, "j2", {-1, j1.size(1), j1.size(2)});
  check_tile(out, j1.size(0), j2.size(0), j1.size(1), contraction);
}

// The shapes of ntk_ghost_accumulate.
inline void check_ghost(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2,
                        Contraction contraction) {
  check_dim(a1, "a1", 3);
  check_shape(a2, "a2", {-1, -1, a1.size(2)});
  check_dim(d1, "d1", 4);
  check_shape(d1, "d1", {a1.size(0), -1, a1.size(1), -1});
  check_shape(d2, "d2", {a2.size(0), d1.size(1), a2.size(1), d1.size(3)});
  check_tile(out, a1.size(0), a2.size(0), d1.size(1), contraction);
}

}  // namespace finite_width::ntk
