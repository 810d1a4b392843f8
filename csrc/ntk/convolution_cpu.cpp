// Convolutions on the CPU: picks the copy for the instruction set in force.
#include "ntk/convolution.h"

#include <algorithm>
#include <utility>

#include "common/parallel.h"
#include "common/workspace.h"
#include "ntk/winograd.h"

#define FW_KERNEL_FILE "ntk/convolution_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::ntk {

template <class T>
void convolve(int64_t N, const Convolution& shape, const T* input, const T* weight, const T* bias, const T* gate,
              int64_t gates, bool local, T* output) {
  if (winograd_serves(shape, kLeastForConvolution)) {
    return winograd_convolve(N, shape, input, weight, bias, gate, gates, local, output);
  }
  FW_DISPATCH(ntk::convolve<T>)(N, shape, input, weight, bias, gate, gates, output);
}

template void convolve<float>(int64_t, const Convolution&, const float*, const float*, const float*, const float*,
                              int64_t, bool, float*);
template void convolve<double>(int64_t, const Convolution&, const double*, const double*, const double*, const double*,
                               int64_t, bool, double*);

}  // namespace finite_width::ntk
