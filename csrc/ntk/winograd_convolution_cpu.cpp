// Convolutions in Winograd's form on the CPU: picks the copy for the instruction set in force.
#include <algorithm>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ntk/winograd.h"

#define FW_KERNEL_FILE "ntk/winograd_convolution_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::ntk {

template <class T>
void winograd_convolve(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias,
                       const T* gate, int64_t gates, bool local, T* output) {
  FW_DISPATCH(ntk::winograd_convolve<T>)(N, shape, input, weight, bias, gate, gates, local, output);
}

template void winograd_convolve<float>(int64_t, const Convolution&, const float*, const float*, const float*,
                                       const float*, int64_t, bool, float*);
template void winograd_convolve<double>(int64_t, const Convolution&, const double*, const double*, const double*,
                                        const double*, int64_t, bool, double*);

}  // namespace finite_width::ntk
