// Path sums through convolutions on the CPU: picks the copy for the instruction set in force.
#include "pathsgd/convolution.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "common/parallel.h"
#include "pathsgd/path_math.h"
#include "pathsgd/workspace.h"

#define FW_KERNEL_FILE "pathsgd/convolution_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::pathsgd {

template <class T>
void convolve(const Convolution& shape, const double* x, const T* weight, double p, double* y) {
  FW_DISPATCH(path_convolve<T>)(shape, x, weight, p, y);
}

template <class T>
void convolve_back(const Convolution& shape, const double* known, const T* weight, double p, double* below) {
  FW_DISPATCH(path_convolve_back<T>)(shape, known, weight, p, below);
}

template <class T>
void update_convolution(const Convolution& shape, const double* x, const double* known, T* weight, const T* grad,
                        T* momentum, double exponent, double p, const Rates& rates) {
  FW_DISPATCH(path_update_convolution<T>)
  (shape, x, known, weight, grad, momentum, step_scale(exponent, p), p, rates);
}

#define FW_INSTANTIATE(T)                                                                                         \
  template void convolve<T>(const Convolution&, const double*, const T*, double, double*);                        \
  template void convolve_back<T>(const Convolution&, const double*, const T*, double, double*);                   \
  template void update_convolution<T>(const Convolution&, const double*, const double*, T*, const T*, T*, double, \
                                      double, const Rates&);
FW_INSTANTIATE(float)
FW_INSTANTIATE(double)
FW_INSTANTIATE(Bfloat16)
#undef FW_INSTANTIATE

}  // namespace finite_width::pathsgd
