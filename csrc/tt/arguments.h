// The checked arguments that both Tensor-Train ops share, on any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/tensor.h"
#include "tt/linear.h"

namespace finite_width::tt {
namespace {

// Whether a tensor is where it must be: the same place as the last argument, x.
using CheckPlace = void (*)(const Tensor& tensor, const char* name, const Tensor& like);

struct Arguments {
  Plan plan;
  int64_t precision = 0;  // of float32 on a GPU: reference.py
  std::vector<CoreShape> shapes;
  std::vector<Tensor> cores;
  int64_t batch, rows = 1, columns = 1;
  ScalarType dtype;

  Arguments(const Tensor& x, const std::vector<Tensor>& given, const std::vector<int64_t>& code, CheckPlace check_place,
            std::initializer_list<ScalarType> dtypes) {
    check_place(x, "x", x);
    check_dim(x, "x", 2);
    batch = x.size(0);
    dtype = x.scalar_type();
    STD_TORCH_CHECK(std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end(),
                    "finite_width: x must be float32, float64 or bfloat16, or float16 on a GPU");
    const int64_t count = static_cast<int64_t>(given.size());
    STD_TORCH_CHECK((code.size() == 6 || code.size() == 7) && code[0] >= 1 && code[0] < count,
                    "finite_width: plan must have 6 or 7 entries and leave a core for each half");
    plan = {code[0], code[1] != 0, code[2] != 0, code[3] != 0, code[4] != 0};
    const int64_t in_cores = code[5];
    if (code.size() == 7) precision = code[6];
    STD_TORCH_CHECK(precision >= 0 && precision <= 2,
                    "finite_width: a plan's precision must be 0 (ieee), 1 (split) or 2 (tf32), got ", precision);
    for (int64_t k = 0; k < count; ++k) {
      check_place(given[k], "cores", x);
      check_dtype(given[k], "cores", dtype);
      check_dim(given[k], "cores", in_cores ? 3 : 4);
      const Tensor core = as_contiguous(given[k]);
      cores.push_back(core);
      const int64_t mode = core.size(1), last = core.size(in_cores ? 2 : 3);
      shapes.push_back({core.size(0), in_cores && k < in_cores ? 1 : mode,
                        !in_cores      ? core.size(2)
                        : k < in_cores ? mode
                                       : 1,
                        last});
      STD_TORCH_CHECK(shapes[k].rank_left == (k ? shapes[k - 1].rank_right : 1),
                      "finite_width: cores must have adjoining ranks");
      STD_TORCH_CHECK(shapes[k].size() > 0, "finite_width: cores must not be empty");
      rows *= shapes[k].m;
      columns *= shapes[k].n;
    }
    STD_TORCH_CHECK(shapes.back().rank_right == 1, "finite_width: cores must end with rank 1");
    check_shape(x, "x", {-1, columns});
  }

  // The bias [M] or none, checked and contiguous.
  std::optional<Tensor> bias(const std::optional<Tensor>& given, const Tensor& x, CheckPlace check_place) const {
    if (!given) return std::nullopt;
    check_place(*given, "bias", x);
    check_dtype(*given, "bias", dtype);
    check_shape(*given, "bias", {rows});
    return as_contiguous(*given);
  }

  void check_backward(const Tensor& grad, const Tensor& x, const std::vector<int64_t>& needs,
                      CheckPlace check_place) const {
    check_place(grad, "grad", x);
    check_dtype(grad, "grad", dtype);
    check_shape(grad, "grad", {batch, rows});
    STD_TORCH_CHECK(needs.size() == 3, "finite_width: needs must have 3 entries");
  }

  template <class T>
  std::vector<const T*> pointers() const {
    std::vector<const T*> result;
    for (const Tensor& core : cores) result.push_back(static_cast<const T*>(core.data_ptr()));
    return result;
  }
};

}  // namespace
}  // namespace finite_width::tt
