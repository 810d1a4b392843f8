// What the bindings of path_step for the CPU and for CUDA share: its lists of tensors, checked, as sweeps both ways.
#pragma once

#include <vector>

#include "pathsgd/bind.h"
#include "pathsgd/chain.h"

namespace finite_width::pathsgd {
namespace {

// A list's tensor; none where it is empty.
inline MaybeTensor entry(const std::vector<Tensor>& list, size_t index) {
  return index < list.size() && list[index].numel() > 0 ? MaybeTensor(list[index]) : MaybeTensor();
}

// The path vectors of a chain in one piece: F_0 ... F_L, B_0 ... B_L, and the layers' [4] masses.
struct PathPieces {
  std::vector<double*> forward, backward;
  double* masses;
  int64_t length;

  PathPieces(const std::vector<Tensor>& weights, double* at) {
    const double* const begin = at;
    for (std::vector<double*>* side : {&forward, &backward}) {
      for (size_t i = 0; i <= weights.size(); ++i) {
        side->push_back(at);
        at += (i == 0 ? weights[0].size(1) : weights[i - 1].size(0)) + 1;
      }
    }
    masses = at;
    length = at + 4 * weights.size() - begin;
  }
};

// The arguments of path_step, GradScaler's aside.
struct ChainTensors {
  const std::vector<Tensor>&weights, &grads, &momenta, &biases, &bias_grads, &bias_momenta;
  const Tensor &vectors, &state;
  double p;
  const std::vector<double>& rates;
  const std::vector<Tensor>& lrs;
  int64_t rebuild;

  size_t layers() const { return weights.size(); }

  template <class CheckPlace>
  void check(const CheckPlace& check_place) const {
    STD_TORCH_CHECK(layers() > 0, "finite_width: weights must hold at least one tensor");
    for (const auto* list : {&grads, &momenta, &biases, &bias_grads, &bias_momenta}) {
      STD_TORCH_CHECK(list->size() == layers(), "finite_width: all lists must be as long as weights");
    }
    STD_TORCH_CHECK(rates.size() == 10 * layers(), "finite_width: rates must hold ten numbers a layer");
    STD_TORCH_CHECK(lrs.empty() || lrs.size() == 2 * layers(),
                    "finite_width: lrs must be empty or hold two tensors a layer");
    STD_TORCH_CHECK(rebuild >= 0 && rebuild <= 2, "finite_width: rebuild must be 0, 1 or 2");
    check_float64(check_place, vectors, "vectors");
    check_float64(check_place, state, "state");
    check_shape(state, "state", {4});
    for (size_t i = 0; i < layers(); ++i) {
      check_place(weights[i], "weights");
      check_dim(weights[i], "weights", 2);
      check_dtype(weights[i], "weights", weights[0].scalar_type());
      check_contiguous(weights[i], "weights");
      const int64_t rows = weights[i].size(0), cols = weights[i].size(1);
      STD_TORCH_CHECK(i == 0 || cols == weights[i - 1].size(0), "finite_width: weights do not fit each other");
      check_like_parameter(check_place, entry(grads, i), "grads", weights[i]);
      check_like_parameter(check_place, entry(momenta, i), "momenta", weights[i]);
      if (const MaybeTensor bias = entry(biases, i)) {
        check_place(*bias, "biases");
        check_dtype(*bias, "biases", weights[0].scalar_type());
        check_contiguous(*bias, "biases");
        check_shape(*bias, "biases", {rows});
        check_like_parameter(check_place, entry(bias_grads, i), "bias_grads", *bias);
        check_like_parameter(check_place, entry(bias_momenta, i), "bias_momenta", *bias);
      }
    }
    const PathPieces at = pieces();
    STD_TORCH_CHECK(vectors.dim() == 1 && vectors.numel() == at.length, "finite_width: vectors must have ", at.length,
                    " elements, got shape ", shape_text(vectors));
  }

  PathPieces pieces() const { return {weights, vectors.mutable_data_ptr<double>()}; }

  Chain chain() const {
    const PathPieces at = pieces();
    return {static_cast<int64_t>(layers()),
            weights[0].size(1),
            weights[layers() - 1].size(0),
            at.forward[0],
            at.backward[0],
            at.forward[layers()],
            at.backward[layers()],
            at.masses,
            state.mutable_data_ptr<double>()};
  }

  // The five rates from `first` on.
  Rates rates_at(size_t first) const {
    return rates_of({rates.begin() + static_cast<int64_t>(first), rates.begin() + static_cast<int64_t>(first) + 5});
  }

  // Each layer's sweep in forward order; F is carried and B is known.
  template <class T>
  std::vector<Sweep<T>> forward_sweeps() const {
    const PathPieces at = pieces();
    std::vector<Sweep<T>> sweeps;
    for (size_t i = 0; i < layers(); ++i) {
      const MaybeTensor bias = entry(biases, i);
      sweeps.push_back({weights[i].size(0), weights[i].size(1), static_cast<T*>(weights[i].mutable_data_ptr()),
                        pointer<T>(entry(grads, i)), pointer<T>(entry(momenta, i)), pointer<T>(bias),
                        bias ? pointer<T>(entry(bias_grads, i)) : nullptr,
                        bias ? pointer<T>(entry(bias_momenta, i)) : nullptr, i == 0 ? at.forward[0] : at.backward[i],
                        at.forward[i], at.backward[i + 1], at.forward[i + 1], at.masses + 4 * i, true, p,
                        rates_at(10 * i), rates_at(10 * i + 5)});
    }
    return sweeps;
  }

  // The same layers' sweeps the other way; B is carried and F is known.
  template <class T>
  std::vector<Sweep<T>> backward_sweeps(std::vector<Sweep<T>> sweeps) const {
    const PathPieces at = pieces();
    for (size_t i = 0; i < layers(); ++i) {
      sweeps[i].forward = false;
      sweeps[i].from_old = i + 1 == layers() ? at.backward[layers()] : at.forward[i + 1];
      sweeps[i].from_new = at.backward[i + 1];
      sweeps[i].across = at.forward[i];
      sweeps[i].fresh = at.backward[i];
    }
    return sweeps;
  }
};

}  // namespace
}  // namespace finite_width::pathsgd
