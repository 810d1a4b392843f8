// Registers the Tensor-Train ops for CUDA.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/cuda_device.h"
#include "common/tensor.h"
#include "tt/arguments.h"
#include "tt/linear_cuda.h"

namespace finite_width::cuda {
namespace {

using tt::Arguments;

// Tensors that a call needs until its kernels are in the stream; torch's allocator gives their memory to nobody else
// before those have run.
class Room {
 public:
  explicit Room(const Tensor& like) : like_(like) {}

  Allocate allocate() {
    return [this](size_t bytes) -> void* {
      tensors_.push_back(torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
      return tensors_.back().data_ptr();
    };
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> tensors_;
};

// compute(T{}) for the CUDA kernels' type of a dtype.
template <class Compute>
void for_dtype(ScalarType dtype, const Compute& compute) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return compute(Bfloat16{});
    case ScalarType::Half:
      return compute(Float16{});
    case ScalarType::Float:
      return compute(float{});
    default:
      return compute(double{});
  }
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <class T>
T* written(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Arguments arguments_of(const Tensor& x, const std::vector<Tensor>& cores, const std::vector<int64_t>& plan) {
  return {x, cores, plan, check_here, {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}};
}

Tensor tt_linear_cuda(const Tensor& x, const std::vector<Tensor>& cores, const std::optional<Tensor>& bias,
                      const std::vector<int64_t>& plan) {
  const Arguments args = arguments_of(x, cores, plan);
  const std::optional<Tensor> shift = args.bias(bias, x, check_here);
  const OnDevice device(x);
  const Tensor in = as_contiguous(x);
  Tensor y = torch::stable::new_empty(x, {x.size(0), args.rows});
  if (x.size(0) == 0) return y;
  Room room(x);
  for_dtype(args.dtype, [&]<class T>(T) {
    linear<T>(args.plan, args.shapes, x.size(0), static_cast<ProductPrecision>(args.precision), read<T>(in),
              args.pointers<T>(), shift ? read<T>(*shift) : nullptr, written<T>(y), room.allocate(), device.stream());
  });
  return y;
}

std::vector<Tensor> tt_linear_backward_cuda(const Tensor& grad, const Tensor& x, const std::vector<Tensor>& cores,
                                            const std::vector<int64_t>& plan, const std::vector<int64_t>& needs) {
  const Arguments args = arguments_of(x, cores, plan);
  args.check_backward(grad, x, needs, check_here);
  const OnDevice device(x);
  const Tensor in = as_contiguous(x), out = as_contiguous(grad);
  const int64_t batch = x.size(0);
  std::vector<Tensor> result;
  if (needs[0]) result.push_back(torch::stable::new_empty(x, {batch, args.columns}));
  const size_t first_core = result.size();
  if (needs[1]) {
    for (const Tensor& core : args.cores) result.push_back(torch::stable::new_empty(x, core.sizes()));
  }
  if (needs[2]) result.push_back(torch::stable::new_empty(x, {args.rows}));
  if (batch == 0) {
    for (Tensor& each : result) torch::stable::zero_(each);
    return result;
  }
  Room room(x);
  for_dtype(args.dtype, [&]<class T>(T) {
    std::vector<T*> core_gradients;
    for (size_t k = 0; needs[1] && k < args.cores.size(); ++k) {
      core_gradients.push_back(written<T>(result[first_core + k]));
    }
    linear_backward<T>(args.plan, args.shapes, batch, static_cast<ProductPrecision>(args.precision), read<T>(out),
                       read<T>(in), args.pointers<T>(), needs[0] ? written<T>(result[0]) : nullptr, core_gradients,
                       needs[2] ? written<T>(result.back()) : nullptr, room.allocate(), device.stream());
  });
  return result;
}

}  // namespace
}  // namespace finite_width::cuda

FW_CUDA_LIBRARY(library) {
  if (!finite_width::cuda::wanted()) return;
  library.impl("tt_linear", TORCH_BOX(&finite_width::cuda::tt_linear_cuda));
  library.impl("tt_linear_backward", TORCH_BOX(&finite_width::cuda::tt_linear_backward_cuda));
}
