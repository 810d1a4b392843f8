// The inner loops of a Path-SGD sweep: eight double lanes on every instruction set, fused where it says fma.
#include "pathsgd/lanes_kernel.h"

namespace finite_width::FW_ISA {

using pathsgd::Sweep;

// Values of T in a cache line.
template <class T>
constexpr int kLine = 64 / static_cast<int>(sizeof(T));

// How many values ahead of a row's place its cache lines are asked for: the rows of a group are as many streams, which
// the processor's own prefetcher does not follow across pages. Into the first level, and near: asked for a whole group
// of rows ahead, they were late or gone (784-4000-4000-10 with AVX-512 at 1.27 of SGD's time, where this takes 1.15).
constexpr int64_t kAhead = FW_ISA_LEVEL == 2 ? 320 : 640;

// Asks for the cache lines at `place`.
template <class T, Rule R>
FW_INLINE void prefetch(const Sweep<T>& task, int64_t place) {
  __builtin_prefetch(task.weight + place);
  if constexpr (R != Rule::none) __builtin_prefetch(task.grad + place);
  if constexpr (R == Rule::momentum) __builtin_prefetch(task.momentum + place);
}

// From a place in column col of [begin, end) to what is read there kAhead values later: in the same row, or at the
// start of one in the next group, whose rows begin next_group values behind.
FW_INLINE int64_t ahead_of(int64_t col, int64_t begin, int64_t end, int64_t next_group) {
  return col + kAhead < end ? kAhead : kAhead + next_group - (end - begin);
}

// total + power * source, or the larger of the two at p = infinity.
template <Norm N>
FW_INLINE Part collect(Part power, Part source, Part total) {
  if constexpr (N == Norm::infinity) {
    const Part product = power * source;
    return product > total ? product : total;
  } else {
    return simd::fma(power, source, total);
  }
}

// What a row's elements are multiplied by: its unit's part of 1 / gamma, with the sign, and in a plain step the rate.
template <Rule R>
double row_part(double factor, const Rates& rates) {
  return R == Rule::momentum ? factor : -rates.lr * factor;
}

// Rows that are swept together, so that a column's factors (and, backward, its sums) are read once for all of them: as
// many as their sums have registers (with AVX2, four rows of them spill, at 1.25 of SGD's time where two take 1.1).
// Forward with AVX2 one row alone is quicker, at 1.08 of SGD's time where two take 1.15: two streams of memory for
// four, and the factors come from the second cache in time. One where every element takes a call, a power or fma
// without an instruction: there is nothing to gain, and the code would be four times as long.
template <Norm N>
constexpr int kBackwardGroup = FW_ISA_LEVEL == 0 || N == Norm::any ? 1
                               : FW_ISA_LEVEL == 1                 ? 2
                                                                   : 4;
template <Norm N>
constexpr int kForwardGroup = FW_ISA_LEVEL == 1 ? 1 : kBackwardGroup<N>;

// The updated weights. Momentum is rounded to its storage before it is used, so that a resumed run continues with the
// same bits. Few operations matter here: this loop takes about as long as the memory does.
template <class T, Rule R>
FW_INLINE Part updated(Part w, const T* grad, T* momentum, Part in_factor, double row, const Rates& rates) {
  const Part part = load_part(grad) * in_factor;
  if constexpr (R != Rule::plain) w = w * rates.keep;
  if constexpr (R == Rule::momentum) {
    const Part mu = simd::broadcast(rates.momentum), direction = part * row;
    Part step = store_part(momentum, simd::fma(mu, load_part(momentum), direction));
    if (rates.nesterov) step = simd::fma(mu, step, direction);
    return simd::fma(simd::broadcast(-rates.lr), step, w);
  }
  return simd::fma(part, simd::broadcast(row), w);
}

// Updates eight weights at one place and returns the powers of the old and of the new ones.
template <class T, Norm N, Rule R>
FW_INLINE void edge(T* weight, const T* grad, T* momentum, Part in_factor, double row, const Rates& rates, double p,
                    Part& power_old, Part& power_new) {
  const Part w = load_part(weight);
  power_old = power<N>(w, p);
  if constexpr (R == Rule::none) {
    power_new = power_old;
  } else {
    power_new = power<N>(store_part(weight, updated<T, R>(w, grad, momentum, in_factor, row, rates)), p);
  }
}

// A row's last columns, fewer than eight, in a buffer of eight with zeros behind: so they take the steps of the others.
template <class T, Rule R>
struct Tail {
  T weight[8] = {}, grad[8] = {}, momentum[8] = {};

  FW_INLINE Tail(const Sweep<T>& task, int64_t place, size_t bytes) {
    std::memcpy(weight, task.weight + place, bytes);
    if constexpr (R != Rule::none) std::memcpy(grad, task.grad + place, bytes);
    if constexpr (R == Rule::momentum) std::memcpy(momentum, task.momentum + place, bytes);
  }

  FW_INLINE void write(const Sweep<T>& task, int64_t place, size_t bytes) const {
    if constexpr (R != Rule::none) std::memcpy(task.weight + place, weight, bytes);
    if constexpr (R == Rule::momentum) std::memcpy(task.momentum + place, momentum, bytes);
  }
};

// `Count` rows from `row` on: the sums over their columns, each in eight lanes.
template <class T, Norm N, Rule R, int Count>
void forward_rows(const Sweep<T>& shared, int64_t row, const double* in_factor, const double* out_factor,
                  const double* old_source, const double* new_source, double* sum_old, double* sum_new) {
  constexpr int kLanes = simd::kLanes<double>;
  const Sweep<T> task = shared;  // a copy that no store to the weights can alias: it stays in registers
  double row_factor[Count];
  for (int r = 0; r < Count; ++r) row_factor[r] = row_part<R>(out_factor[row + r], task.weight_rates);
  Octet old_total[Count] = {}, new_total[Count] = {};
  const int64_t cols = task.cols, whole = cols / 8 * 8, first = row * cols;
  auto eight = [&](int64_t col, auto ahead) FW_STRAIGHT {
    const int64_t later = ahead_of(col, 0, cols, Count * cols);
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = col + part * kLanes;
      const Part factor = simd::load(in_factor + at);
      const Part from_old = simd::load(old_source + at), from_new = simd::load(new_source + at);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        const int64_t place = first + r * cols + at;
        if constexpr (ahead.value) {
          if (part == 0) prefetch<T, R>(task, place + later);
        }
        Part power_old, power_new;
        edge<T, N, R>(task.weight + place, R == Rule::none ? nullptr : task.grad + place,
                      R == Rule::momentum ? task.momentum + place : nullptr, factor, row_factor[r], task.weight_rates,
                      task.p, power_old, power_new);
        old_total[r].part[part] = collect<N>(power_old, from_old, old_total[r].part[part]);
        new_total[r].part[part] = collect<N>(power_new, from_new, new_total[r].part[part]);
      }
    }
  };
  int64_t col = 0;
  for (; col + kLine<T> <= whole; col += kLine<T>) {
    eight(col, std::true_type());
    for (int more = 8; more < kLine<T>; more += 8) eight(col + more, std::false_type());
  }
  for (; col < whole; col += 8) eight(col, std::false_type());
  if (whole < cols) {
    const size_t bytes = static_cast<size_t>(cols - whole) * sizeof(T);
    for (int r = 0; r < Count; ++r) {
      const int64_t place = first + r * cols + whole;
      Tail<T, R> tail(task, place, bytes);
      for (int part = 0; part < kParts; ++part) {
        const int at = part * kLanes;
        Part power_old, power_new;
        edge<T, N, R>(tail.weight + at, tail.grad + at, tail.momentum + at, simd::load(in_factor + whole + at),
                      row_factor[r], task.weight_rates, task.p, power_old, power_new);
        Part &old_sum = old_total[r].part[part], &new_sum = new_total[r].part[part];
        old_sum = collect<N>(power_old, simd::load(old_source + whole + at), old_sum);
        new_sum = collect<N>(power_new, simd::load(new_source + whole + at), new_sum);
      }
      tail.write(task, place, bytes);
    }
  }
  for (int r = 0; r < Count; ++r) {
    sum_old[row + r] = folded<N>(old_total[r]);
    sum_new[row + r] = folded<N>(new_total[r]);
  }
}

template <class T, Norm N, Rule R>
void forward_block(const Sweep<T>& task, int64_t begin, int64_t end, const double* in_factor, const double* out_factor,
                   const double* old_source, const double* new_source, double* sum_old, double* sum_new) {
  int64_t row = begin;
  for (; kForwardGroup<N> > 1 && row + kForwardGroup<N> <= end; row += kForwardGroup<N>) {
    forward_rows<T, N, R, kForwardGroup<N>>(task, row, in_factor, out_factor, old_source, new_source, sum_old, sum_new);
  }
  for (; row < end; ++row) {
    forward_rows<T, N, R, 1>(task, row, in_factor, out_factor, old_source, new_source, sum_old, sum_new);
  }
}

// Adds `Count` rows to the column sums; each sum takes the rows in order.
template <class T, Norm N, Rule R, int Count>
void backward_rows(const Sweep<T>& shared, int64_t row, int64_t col_begin, int64_t col_end, const double* in_factor,
                   const double* out_factor, const double* old_source, const double* new_source, double* sum_old,
                   double* sum_new) {
  constexpr int kLanes = simd::kLanes<double>;
  const Sweep<T> task = shared;  // as in forward_rows
  double row_factor[Count], row_old[Count], row_new[Count];
  for (int r = 0; r < Count; ++r) {
    row_factor[r] = row_part<R>(out_factor[row + r], task.weight_rates);
    row_old[r] = old_source[row + r];
    row_new[r] = new_source[row + r];
  }
  const int64_t cols = task.cols, whole = col_begin + (col_end - col_begin) / 8 * 8, first = row * cols;
  auto eight = [&](int64_t col, auto ahead) FW_STRAIGHT {
    const int64_t later = ahead_of(col, col_begin, col_end, Count * cols);
    for (int part = 0; part < kParts; ++part) {
      const int64_t at = col + part * kLanes;
      const Part factor = simd::load(in_factor + at);
      Part old_sum = simd::load(sum_old + at), new_sum = simd::load(sum_new + at);
#pragma GCC unroll 4
      for (int r = 0; r < Count; ++r) {
        const int64_t place = first + r * cols + at;
        if constexpr (ahead.value) {
          if (part == 0) prefetch<T, R>(task, place + later);
        }
        Part power_old, power_new;
        edge<T, N, R>(task.weight + place, R == Rule::none ? nullptr : task.grad + place,
                      R == Rule::momentum ? task.momentum + place : nullptr, factor, row_factor[r], task.weight_rates,
                      task.p, power_old, power_new);
        old_sum = collect<N>(power_old, simd::broadcast(row_old[r]), old_sum);
        new_sum = collect<N>(power_new, simd::broadcast(row_new[r]), new_sum);
      }
      simd::store(sum_old + at, old_sum);
      simd::store(sum_new + at, new_sum);
    }
  };
  int64_t col = col_begin;
  for (; col + kLine<T> <= whole; col += kLine<T>) {
    eight(col, std::true_type());
    for (int more = 8; more < kLine<T>; more += 8) eight(col + more, std::false_type());
  }
  for (; col < whole; col += 8) eight(col, std::false_type());
  if (whole < col_end) {  // the sums have room for eight
    const size_t bytes = static_cast<size_t>(col_end - whole) * sizeof(T);
    for (int r = 0; r < Count; ++r) {
      const int64_t place = first + r * cols + whole;
      Tail<T, R> tail(task, place, bytes);
      for (int at = 0; at < 8; at += kLanes) {
        Part power_old, power_new;
        edge<T, N, R>(tail.weight + at, tail.grad + at, tail.momentum + at, simd::load(in_factor + whole + at),
                      row_factor[r], task.weight_rates, task.p, power_old, power_new);
        double *old_sum = sum_old + whole + at, *new_sum = sum_new + whole + at;
        simd::store(old_sum, collect<N>(power_old, simd::broadcast(row_old[r]), simd::load(old_sum)));
        simd::store(new_sum, collect<N>(power_new, simd::broadcast(row_new[r]), simd::load(new_sum)));
      }
      tail.write(task, place, bytes);
    }
  }
}

template <class T, Norm N, Rule R>
void backward_tile(const Sweep<T>& task, int64_t begin, int64_t end, int64_t col_begin, int64_t col_end,
                   const double* in_factor, const double* out_factor, const double* old_source,
                   const double* new_source, double* sum_old, double* sum_new) {
  int64_t row = begin;
  for (; kBackwardGroup<N> > 1 && row + kBackwardGroup<N> <= end; row += kBackwardGroup<N>) {
    backward_rows<T, N, R, kBackwardGroup<N>>(task, row, col_begin, col_end, in_factor, out_factor, old_source,
                                              new_source, sum_old, sum_new);
  }
  for (; row < end; ++row) {
    backward_rows<T, N, R, 1>(task, row, col_begin, col_end, in_factor, out_factor, old_source, new_source, sum_old,
                              sum_new);
  }
}

// The variant for a norm and a rule.
template <class T, class Run>
FW_INLINE void choose(double p, const T* grad, const T* momentum, double keep, const Run& run) {
  auto with_rule = [&]<Norm N>(std::integral_constant<Norm, N>) {
    if (!grad) {
      run.template operator()<N, Rule::none>();
    } else if (!momentum) {
      if (keep == 1) {
        run.template operator()<N, Rule::plain>();
      } else {
        run.template operator()<N, Rule::decay>();
      }
    } else {
      run.template operator()<N, Rule::momentum>();
    }
  };
  if (p == 1) {
    with_rule(std::integral_constant<Norm, Norm::one>());
  } else if (p == 2) {
    with_rule(std::integral_constant<Norm, Norm::two>());
  } else if (std::isinf(p)) {
    with_rule(std::integral_constant<Norm, Norm::infinity>());
  } else {
    with_rule(std::integral_constant<Norm, Norm::any>());
  }
}

template <class T>
void path_forward_block(const Sweep<T>& task, int64_t begin, int64_t end, const double* in_factor,
                        const double* out_factor, const double* old_source, const double* new_source, double* sum_old,
                        double* sum_new) {
  choose(task.p, task.grad, task.momentum, task.weight_rates.keep, [&]<Norm N, Rule R>() {
    forward_block<T, N, R>(task, begin, end, in_factor, out_factor, old_source, new_source, sum_old, sum_new);
  });
}

template <class T>
void path_backward_tile(const Sweep<T>& task, int64_t begin, int64_t end, int64_t col_begin, int64_t col_end,
                        const double* in_factor, const double* out_factor, const double* old_source,
                        const double* new_source, double* sum_old, double* sum_new) {
  choose(task.p, task.grad, task.momentum, task.weight_rates.keep, [&]<Norm N, Rule R>() {
    backward_tile<T, N, R>(task, begin, end, col_begin, col_end, in_factor, out_factor, old_source, new_source, sum_old,
                           sum_new);
  });
}

}  // namespace finite_width::FW_ISA
