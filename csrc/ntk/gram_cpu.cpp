// Products of Jacobians on the CPU: picks the copy for the instruction set in force.
#include "common/parallel.h"
#include "common/workspace.h"
#include "ntk/ntk.h"

#define FW_KERNEL_FILE "ntk/gram_kernel.h"
#include "common/foreach_isa.h"

namespace finite_width::ntk {

template <class T>
void gram_accumulate(const Side<T>& one, const Side<T>& two, int64_t I, int64_t O, int64_t C, Contraction contraction,
                     bool inner, T bias, const Tile<T>& out) {
  FW_DISPATCH(ntk::gram_accumulate<T>)(one, two, I, O, C, contraction, inner, bias, out);
}

template void gram_accumulate<float>(const Side<float>&, const Side<float>&, int64_t, int64_t, int64_t, Contraction,
                                     bool, float, const Tile<float>&);
template void gram_accumulate<double>(const Side<double>&, const Side<double>&, int64_t, int64_t, int64_t, Contraction,
                                      bool, double, const Tile<double>&);

}  // namespace finite_width::ntk
