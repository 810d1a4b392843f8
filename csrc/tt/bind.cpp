// Registers the Tensor-Train ops with torch's dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/parallel.h"
#include "common/tensor.h"
#include "tt/arguments.h"
#include "tt/linear.h"
#include "tt/workspace.h"

namespace finite_width {
namespace {

using tt::Arguments;
using tt::CoreShape;
using tt::Piece;

// The upper half of a float's bits, rounded to even; a quiet NaN for NaN.
uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

constexpr int64_t kChunk = 16384;

void widen(const void* from, int64_t size, float* to) {
  const uint16_t* half = static_cast<const uint16_t*>(from);
  parallel_blocks((size + kChunk - 1) / kChunk, [&](int64_t chunk) {
    for (int64_t k = chunk * kChunk; k < std::min(size, (chunk + 1) * kChunk); ++k) to[k] = from_bfloat16(half[k]);
  });
}

void narrow(const float* from, int64_t size, void* to) {
  uint16_t* half = static_cast<uint16_t*>(to);
  parallel_blocks((size + kChunk - 1) / kChunk, [&](int64_t chunk) {
    for (int64_t k = chunk * kChunk; k < std::min(size, (chunk + 1) * kChunk); ++k) half[k] = to_bfloat16(from[k]);
  });
}

void check_on_cpu(const Tensor& tensor, const char* name, const Tensor&) {
  check_cpu(tensor, name);
}

Arguments arguments_of(const Tensor& x, const std::vector<Tensor>& cores, const std::vector<int64_t>& plan) {
  return {x, cores, plan, check_on_cpu, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16}};
}

// The cores in float32, for bfloat16.
std::vector<const float*> wide_pointers(const Arguments& args) {
  int64_t total = 0;
  for (const CoreShape& shape : args.shapes) total += shape.size();
  float* room = tt::scratch<float>(Piece::wide_cores, total);
  std::vector<const float*> result;
  for (size_t k = 0; k < args.cores.size(); ++k) {
    widen(args.cores[k].data_ptr(), args.shapes[k].size(), room);
    result.push_back(room);
    room += args.shapes[k].size();
  }
  return result;
}

Tensor tt_linear_cpu(const Tensor& x, const std::vector<Tensor>& cores, const std::optional<Tensor>& bias,
                     const std::vector<int64_t>& plan) {
  const Arguments args = arguments_of(x, cores, plan);
  const std::optional<Tensor> shift = args.bias(bias, x, check_on_cpu);
  const Tensor in = as_contiguous(x);
  const int64_t batch = x.size(0);
  Tensor y = empty_cpu(x, {batch, args.rows});
  if (batch == 0) return y;
  if (args.dtype == ScalarType::BFloat16) {
    float* wide_x = tt::scratch<float>(Piece::wide_x, batch * args.columns);
    float* wide_y = tt::scratch<float>(Piece::wide_y, batch * args.rows);
    std::vector<float> wide_bias(shift ? args.rows : 0);
    widen(in.data_ptr(), batch * args.columns, wide_x);
    if (shift) widen(shift->data_ptr(), args.rows, wide_bias.data());
    tt::linear<float>(args.plan, args.shapes, batch, wide_x, wide_pointers(args), shift ? wide_bias.data() : nullptr,
                      wide_y);
    narrow(wide_y, batch * args.rows, y.data_ptr());
    return y;
  }
  auto compute = [&]<class T>(T) {
    tt::linear<T>(args.plan, args.shapes, batch, in.const_data_ptr<T>(), args.pointers<T>(),
                  shift ? shift->const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>());
  };
  args.dtype == ScalarType::Float ? compute(float{}) : compute(double{});
  return y;
}

std::vector<Tensor> tt_linear_backward_cpu(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& cores,
                                           const std::vector<int64_t>& plan, const std::vector<int64_t>& needs) {
  const Arguments args = arguments_of(x, cores, plan);
  args.check_backward(grad, x, needs, check_on_cpu);
  const Tensor in = as_contiguous(x), out = as_contiguous(grad);
  const int64_t batch = x.size(0);
  std::vector<Tensor> result;
  if (needs[0]) result.push_back(empty_cpu(x, {batch, args.columns}));
  const size_t first_core = result.size();
  if (needs[1]) {
    for (const Tensor& core : args.cores) result.push_back(empty_cpu(x, core.sizes()));
  }
  if (needs[2]) result.push_back(empty_cpu(x, {args.rows}));
  if (batch == 0) {
    for (Tensor& each : result) torch::stable::zero_(each);
    return result;
  }
  if (args.dtype == ScalarType::BFloat16) {
    std::vector<int64_t> sizes;
    int64_t total = 0;
    for (const Tensor& each : result) sizes.push_back(each.numel()), total += each.numel();
    float* wide_x = tt::scratch<float>(Piece::wide_x, batch * args.columns);
    float* wide_grad = tt::scratch<float>(Piece::wide_y, batch * args.rows);
    float* room = tt::scratch<float>(Piece::wide_z, total);
    widen(in.data_ptr(), batch * args.columns, wide_x);
    widen(out.data_ptr(), batch * args.rows, wide_grad);
    std::vector<float*> wide;
    for (int64_t size : sizes) wide.push_back(room), room += size;
    std::vector<float*> core_gradients;
    for (size_t k = 0; needs[1] && k < args.cores.size(); ++k) core_gradients.push_back(wide[first_core + k]);
    tt::linear_backward<float>(args.plan, args.shapes, batch, wide_grad, wide_x, wide_pointers(args),
                               needs[0] ? wide[0] : nullptr, core_gradients, needs[2] ? wide.back() : nullptr);
    for (size_t k = 0; k < result.size(); ++k) narrow(wide[k], sizes[k], result[k].data_ptr());
    return result;
  }
  auto compute = [&]<class T>(T) {
    std::vector<T*> core_gradients;
    for (size_t k = 0; needs[1] && k < args.cores.size(); ++k) {
      core_gradients.push_back(result[first_core + k].mutable_data_ptr<T>());
    }
    tt::linear_backward<T>(args.plan, args.shapes, batch, out.const_data_ptr<T>(), in.const_data_ptr<T>(),
                           args.pointers<T>(), needs[0] ? result[0].mutable_data_ptr<T>() : nullptr, core_gradients,
                           needs[2] ? result.back().mutable_data_ptr<T>() : nullptr);
  };
  args.dtype == ScalarType::Float ? compute(float{}) : compute(double{});
  return result;
}

}  // namespace
}  // namespace finite_width

STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library) {
  library.impl("tt_linear", TORCH_BOX(&finite_width::tt_linear_cpu));
  library.impl("tt_linear_backward", TORCH_BOX(&finite_width::tt_linear_backward_cpu));
}
