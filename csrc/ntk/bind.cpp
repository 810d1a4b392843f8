// Registers the NTK kernels with torch's dispatcher.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "common/check.h"
#include "common/convolution_check.h"
#include "common/tensor.h"
#include "gemm/gemm.h"
#include "ntk/convolution.h"
#include "ntk/ntk.h"
#include "ntk/tile_tensors.h"

namespace finite_width::ntk {
namespace {

// Calls run(T{}) with the T of a dtype, float or double.
template <class Run>
void with_type(const Tensor& like, const Run& run) {
  if (like.scalar_type() == ScalarType::Float) {
    run(float{});
  } else {
    run(double{});
  }
}

void check_like(const Tensor& tensor, const char* name, const Tensor& other) {
  check_cpu(tensor, name);
  check_dtype(tensor, name, other.scalar_type());
}

// The kernel on cotangents [rows, O, C] and inputs [rows, I] or none.
void accumulate(const Tensor& out, const Tensor* a1, const Tensor* a2, const Tensor& d1, const Tensor& d2,
                int64_t positions1, int64_t positions2, double bias, Contraction contraction) {
  const Tensor first = cotangents(d1, contraction);
  const Tensor second = same_memory(d1, d2) ? first : cotangents(d2, contraction);
  with_type(out, [&]<class T>(T) {
    auto side = [](const Tensor& d, const Tensor* a, int64_t positions) {
      return Side<T>{positions ? d.size(0) / positions : 0,
                     positions,
                     a ? a->const_data_ptr<T>() : nullptr,
                     a ? a->stride(0) : 0,
                     a ? a->stride(1) : 0,
                     d.const_data_ptr<T>(),
                     d.stride(0),
                     d.stride(1)};
    };
    gram_accumulate<T>(side(first, a1, positions1), side(second, a2, positions2), a1 ? a1->size(1) : 0, d1.size(1),
                       d1.size(2), contraction, a1 != nullptr, static_cast<T>(bias), tile_of<T>(out, contraction));
  });
}

// The precision is that of the CUDA kernels' products; here they are always in the tensors' own.
void gram_cpu(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2, double bias,
              int64_t compute, int64_t /*precision*/) {
  const Contraction contraction = contraction_of(compute);
  check_gram(out, a1, a2, d1, d2, contraction);
  check_cpu(out, "out");
  check_like(a1, "a1", out);
  check_like(a2, "a2", out);
  check_like(d1, "d1", out);
  check_like(d2, "d2", out);
  accumulate(out, &a1, &a2, d1, d2, 1, 1, bias, contraction);
}

void jacobian_cpu(const Tensor& out, const Tensor& j1, const Tensor& j2, int64_t compute, int64_t /*precision*/) {
  const Contraction contraction = contraction_of(compute);
  check_jacobian(out, j1, j2, contraction);
  check_cpu(out, "out");
  check_like(j1, "j1", out);
  check_like(j2, "j2", out);
  accumulate(out, nullptr, nullptr, j1, j2, 1, 1, 0, contraction);
}

// [N, T, I] -> [N T, I], and [N, O, T, C] -> [N T, O, C].
Tensor rows_of_inputs(const Tensor& a) {
  return torch::stable::view(torch::stable::contiguous(a), {a.size(0) * a.size(1), a.size(2)});
}

Tensor rows_of_cotangents(const Tensor& d) {
  return torch::stable::view(torch::stable::contiguous(torch::stable::transpose(d, 1, 2)),
                             {d.size(0) * d.size(2), d.size(1), d.size(3)});
}

void ghost_cpu(const Tensor& out, const Tensor& a1, const Tensor& a2, const Tensor& d1, const Tensor& d2, double bias,
               int64_t compute, int64_t /*precision*/) {
  const Contraction contraction = contraction_of(compute);
  check_ghost(out, a1, a2, d1, d2, contraction);
  check_cpu(out, "out");
  check_like(a1, "a1", out);
  check_like(a2, "a2", out);
  check_like(d1, "d1", out);
  check_like(d2, "d2", out);
  const bool same_inputs = same_memory(a1, a2), same_cotangents = same_memory(d1, d2);
  const Tensor left = rows_of_inputs(a1), left_d = rows_of_cotangents(d1);
  const Tensor right = same_inputs ? left : rows_of_inputs(a2);
  const Tensor right_d = same_cotangents ? left_d : rows_of_cotangents(d2);
  accumulate(out, &left, &right, left_d, right_d, a1.size(1), a2.size(1), bias, contraction);
}

Tensor position_cpu(const Tensor& a, const Tensor& d, int64_t /*precision*/) {
  check_position_gradients(a, d);
  check_cpu(a, "a");
  check_like(d, "d", a);
  const Tensor inputs = torch::stable::contiguous(a), deltas = adjacent_from(d, 3);
  const int64_t outputs = d.size(1), channels = d.size(3);
  Tensor gradients = empty_cpu(d, {d.size(0), outputs, channels * a.size(2)});
  with_type(a, [&]<class T>(T) {
    position_gradients<T>(a.size(0), outputs, a.size(1), channels, a.size(2), inputs.const_data_ptr<T>(),
                          deltas.const_data_ptr<T>(), deltas.stride(0), deltas.stride(1), deltas.stride(2),
                          gradients.mutable_data_ptr<T>());
  });
  return gradients;
}

Tensor conv_cpu(const Tensor& input, const Tensor& delta, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool bias,
                int64_t /*precision*/) {
  check_cpu(input, "input");
  check_like(delta, "delta", input);
  const Convolution shape = check_conv_gradients(input, delta, kernel_size, stride, padding, dilation, groups, bias);
  const Tensor inputs = torch::stable::contiguous(input), deltas = adjacent_from(delta, 2);
  Tensor gradients = empty_cpu(delta, {delta.size(0), delta.size(1), conv_weights(shape, bias)});
  with_type(input, [&]<class T>(T) {
    conv_gradients<T>(delta.size(0), delta.size(1), shape, inputs.const_data_ptr<T>(), deltas.const_data_ptr<T>(),
                      deltas.stride(0), deltas.stride(1), bias, gradients.mutable_data_ptr<T>());
  });
  return gradients;
}

void check_gate_rows(const Tensor& gated, const Tensor& gate) {
  STD_TORCH_CHECK(gated.size(0) == 0 || (gate.size(0) > 0 && gated.size(0) % gate.size(0) == 0),
                  "finite_width: the rows that are gated must be a multiple of those of gate");
}

Tensor convolve_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& gate, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    int64_t groups, bool local) {
  const int64_t spatial = weight.dim() - 2;
  STD_TORCH_CHECK(spatial >= 1 && spatial <= kMaxAxes, "finite_width: weight must have 1, 2 or 3 spatial axes");
  std::vector<int64_t> kernel_size;
  for (int64_t i = 0; i < spatial; ++i) kernel_size.push_back(weight.size(i + 2));
  const std::vector<int64_t> stride(kernel_size.size(), 1);
  check_cpu(input, "input");
  const Convolution shape = convolution_of(input, weight.size(0), kernel_size, stride, padding, dilation, groups);
  check_like(weight, "weight", input);
  STD_TORCH_CHECK(weight.size(1) == input.size(1) / groups, "finite_width: weight does not fit the channels of input");
  std::vector<int64_t> sizes{input.size(0), weight.size(0)};
  for (int64_t i = 0; i < spatial; ++i) sizes.push_back(shape.positions[kMaxAxes - spatial + i]);
  Tensor shift, kept;
  if (bias) {
    check_like(*bias, "bias", input);
    check_dim(*bias, "bias", 1);
    check_shape(*bias, "bias", {weight.size(0)});
    shift = torch::stable::contiguous(*bias);
  }
  if (gate) {
    check_like(*gate, "gate", input);
    check_dim(*gate, "gate", spatial + 2);
    for (int64_t axis = 1; axis < spatial + 2; ++axis) {
      STD_TORCH_CHECK(gate->size(axis) == sizes[static_cast<size_t>(axis)],
                      "finite_width: gate must have the shape of ", "the output, but for its first axis");
    }
    check_gate_rows(input, *gate);
    kept = torch::stable::contiguous(*gate);
  }
  const Tensor inputs = torch::stable::contiguous(input), weights = torch::stable::contiguous(weight);
  Tensor output = empty_cpu(input, sizes);
  with_type(input, [&]<class T>(T) {
    convolve<T>(input.size(0), shape, inputs.const_data_ptr<T>(), weights.const_data_ptr<T>(),
                bias ? shift.const_data_ptr<T>() : nullptr, gate ? kept.const_data_ptr<T>() : nullptr,
                gate ? gate->size(0) : 1, local, output.mutable_data_ptr<T>());
  });
  return output;
}

Tensor gated_product_cpu(const Tensor& a, const Tensor& b, const Tensor& gate) {
  check_cpu(a, "a");
  check_float_or_double(a, "a");
  check_like(b, "b", a);
  check_like(gate, "gate", a);
  check_dim(a, "a", 2);
  check_shape(b, "b", {a.size(1), -1});
  check_shape(gate, "gate", {-1, b.size(1)});
  const int64_t rows = a.size(0), columns = b.size(1);
  check_gate_rows(a, gate);
  const Tensor kept = as_contiguous(gate);
  Tensor c = empty_cpu(a, {rows, columns});
  with_type(a, [&]<class T>(T) {
    gated_gemm<T>(rows, columns, a.size(1), a.const_data_ptr<T>(), a.stride(0), a.stride(1), b.const_data_ptr<T>(),
                  b.stride(0), b.stride(1), kept.const_data_ptr<T>(), gate.size(0), c.mutable_data_ptr<T>(), columns);
  });
  return c;
}

}  // namespace
}  // namespace finite_width::ntk

STABLE_TORCH_LIBRARY_IMPL(finite_width, CPU, library) {
  library.impl("ntk_gram_accumulate", TORCH_BOX(&finite_width::ntk::gram_cpu));
  library.impl("ntk_jacobian_accumulate", TORCH_BOX(&finite_width::ntk::jacobian_cpu));
  library.impl("ntk_ghost_accumulate", TORCH_BOX(&finite_width::ntk::ghost_cpu));
  library.impl("ntk_position_gradients", TORCH_BOX(&finite_width::ntk::position_cpu));
  library.impl("ntk_conv_gradients", TORCH_BOX(&finite_width::ntk::conv_cpu));
  library.impl("ntk_convolve", TORCH_BOX(&finite_width::ntk::convolve_cpu));
  library.impl("ntk_gated_product", TORCH_BOX(&finite_width::ntk::gated_product_cpu));
}
