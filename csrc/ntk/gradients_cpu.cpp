// Per-example weight gradients on the CPU: picks the copy for the instruction set in force.
#include "common/parallel.h"
#include "common/workspace.h"
#include "ntk/ntk.h"
#include "ntk/winograd.h"

#define FW_KERNEL_FILE "ntk/gradients_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::ntk {

template <class T>
void conv_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta, int64_t delta_row,
                    int64_t delta_output, bool bias, T* gradients) {
  if (winograd_serves(shape, kLeastForGradients)) {
    return winograd_gradients(N, O, shape, input, delta, delta_row, delta_output, bias, gradients);
  }
  FW_DISPATCH(ntk::conv_gradients<T>)(N, O, shape, input, delta, delta_row, delta_output, bias, gradients);
}

template <class T>
void position_gradients(int64_t N, int64_t O, int64_t positions, int64_t C, int64_t I, const T* a, const T* d,
                        int64_t d_row, int64_t d_output, int64_t d_position, T* gradients) {
  FW_DISPATCH(ntk::position_gradients<T>)(N, O, positions, C, I, a, d, d_row, d_output, d_position, gradients);
}

#define FW_INSTANTIATE(T)                                                                                           \
  template void conv_gradients<T>(int64_t, int64_t, const Convolution&, const T*, const T*, int64_t, int64_t, bool, \
                                  T*);                                                                              \
  template void position_gradients<T>(int64_t, int64_t, int64_t, int64_t, int64_t, const T*, const T*, int64_t,     \
                                      int64_t, int64_t, T*);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
#undef FW_INSTANTIATE

}  // namespace finite_width::ntk
