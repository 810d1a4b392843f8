// Per-example weight gradients in Winograd's form on the CPU: picks the copy for the instruction set in force.
#include <algorithm>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ntk/winograd.h"

#define FW_KERNEL_FILE "ntk/winograd_gradients_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::ntk {

template <class T>
void winograd_gradients(int64_t N, int64_t O, const Convolution& shape, const T* input, const T* delta,
                        int64_t delta_row, int64_t delta_output, bool bias, T* gradients) {
  FW_DISPATCH(ntk::winograd_gradients<T>)
  (N, O, shape, input, delta, delta_row, delta_output, bias, gradients);
}

template void winograd_gradients<float>(int64_t, int64_t, const Convolution&, const float*, const float*, int64_t,
                                        int64_t, bool, float*);
template void winograd_gradients<double>(int64_t, int64_t, const Convolution&, const double*, const double*, int64_t,
                                         int64_t, bool, double*);

}  // namespace finite_width::ntk
