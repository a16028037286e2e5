// One check per op, run before anything is written, for CPU and CUDA alike; and every message a
// user can see from C++. A message names the op, what was expected and what came. Its first word is
// the Python exception it should become (torch turns every C++ exception into RuntimeError;
// specnorm_ext/_ops.py turns it back).
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "krylov.h"
#include "overlap.h"

namespace specnorm {

template <class... Parts>
[[noreturn]] void fail(const char* exception, const Parts&... parts) {
  std::ostringstream message;
  message << exception << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Operand& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim; ++i) text << (i ? ", " : "") << t.sizes[i];
  text << "]";
  return text.str();
}

// A tensor whose storage was freed (storage.resize_(0), as sharded training does between uses)
// still has its shape. `name` in parts: "weights[", 3, "]".
template <class... Name>
void check_memory(const char* op, const Operand& t, const Name&... name) {
  if (t.data != nullptr) return;
  for (int64_t d = 0; d < t.dim; ++d)
    if (t.sizes[d] == 0) return;
  fail("RuntimeError", op, ": expected ", name..., " to hold its elements, got a tensor of shape ",
       shape_text(t), " whose memory was freed; gather or load it first");
}

inline void check_status(const char* op, Status status) {
  if (status == kOutOfMemory)
    fail("RuntimeError", op,
         ": expected to allocate the workspace, got out of memory; pass fewer weights a call");
}

inline void check_lengths(const char* op, size_t weights, const char* name, size_t got) {
  if (weights != got)
    fail("ValueError", op, ": expected ", weights, " tensors in ", name, ", as in weights, got ",
         got);
}

inline void check_weights(const char* op, const Operands& weights, bool stacks = false) {
  for (size_t i = 0; i < weights.size(); ++i) {
    const Operand& w = weights[i];
    if (!kernel_dtype(w.dtype))
      fail("TypeError", op, ": expected weights[", i,
           "] to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got ",
           dtype_name(w.dtype));
    if (w.dtype != weights[0].dtype)
      fail("TypeError", op, ": expected one dtype a call, weights[0] is ",
           dtype_name(weights[0].dtype), ", got ", dtype_name(w.dtype), " in weights[", i, "]");
    if (!w.same_device(weights[0]))
      fail("TypeError", op, ": expected one device a call, weights[", i,
           "] is on another device than weights[0]");
    if (w.dim != 2 && !(stacks && is_stack(w)))
      fail("ValueError", op, ": expected weights[", i, "] to be a matrix [m, n]",
           stacks ? " or a stack of matrices [E, m, n]" : "", ", got shape ", shape_text(w));
    check_memory(op, w, "weights[", i, "]");
  }
}

// x (named u or v) must be [length] or [length, columns] beside a matrix weights[i], and a stack of
// those beside a stack.
inline void check_state(const char* op, const char* name, size_t i, const Operand& weight,
                        const Operand& x, int64_t length) {
  if (x.dtype != state_dtype(weight.dtype))
    fail("TypeError", op, ": expected ", name, "[", i, "] to be ",
         dtype_name(state_dtype(weight.dtype)), " beside a ", dtype_name(weight.dtype),
         " weight, got ", dtype_name(x.dtype));
  if (!x.same_device(weight))
    fail("TypeError", op, ": expected ", name, "[", i, "] on the device of weights[", i, "]");
  const int64_t lead = is_stack(weight);
  if (x.dim < 1 + lead || x.dim > 2 + lead || x.sizes[lead] != length ||
      (lead == 1 && x.sizes[0] != weight.sizes[0])) {
    const std::string each =
        (lead == 1 ? std::to_string(weight.sizes[0]) + ", " : "") + std::to_string(length);
    fail("ValueError", op, ": expected ", name, "[", i, "] to have shape [", each, "] or [", each,
         ", b], got ", shape_text(x));
  }
  check_memory(op, x, name, "[", i, "]");
}

inline int64_t matrix_rows(const Operand& weight) {
  return weight.sizes[weight.dim - 2];
}
inline int64_t matrix_width(const Operand& weight) {
  return weight.sizes[weight.dim - 1];
}
// of u or v beside that weight
inline int64_t columns_of(const Operand& x, const Operand& weight) {
  return x.dim == weight.dim ? x.sizes[x.dim - 1] : 1;
}

inline void check_pairs(const char* op, const Operands& weights, const Operands& u,
                        const Operands& v) {
  check_lengths(op, weights.size(), "u", u.size());
  check_lengths(op, weights.size(), "v", v.size());
  check_weights(op, weights, true);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Operand& w = weights[i];
    check_state(op, "u", i, w, u[i], matrix_rows(w));
    check_state(op, "v", i, w, v[i], matrix_width(w));
    if (u[i].dim != v[i].dim || columns_of(u[i], w) != columns_of(v[i], w))
      fail("ValueError", op, ": expected u[", i, "] and v[", i, "] to have the same columns, got ",
           shape_text(u[i]), " and ", shape_text(v[i]));
    if (columns_of(u[i], w) < 1)
      fail("ValueError", op, ": expected u[", i, "] to have at least 1 column, got ",
           shape_text(u[i]));
  }
}

inline void check_sigma_values(const char* op, const Operands& weights, const Operand& sigma) {
  if (sigma.dim != 1 || sigma.sizes[0] != count_matrices(weights))
    fail("ValueError", op, ": expected sigma to have shape [", count_matrices(weights), "], got ",
         shape_text(sigma));
  if (weights.empty()) return;
  if (sigma.dtype != state_dtype(weights[0].dtype))
    fail("TypeError", op, ": expected sigma to be ", dtype_name(state_dtype(weights[0].dtype)),
         ", got ", dtype_name(sigma.dtype));
  if (!sigma.same_device(weights[0]))
    fail("TypeError", op, ": expected sigma on the device of the weights");
  check_memory(op, sigma, "sigma");
}

// Two written tensors that share memory would be written by two threads at once, and a weight that
// shares it would change under the iteration.
inline void check_no_overlap(const char* op, const Operands& weights, const Operands& u,
                             const Operands& v) {
  const std::vector<Span> written = sorted_spans({&u, &v});
  if (written_twice(written))
    fail("ValueError", op,
         ": expected every tensor in u and v to have memory of its own, got two that share "
         "elements");
  const Shared shared = written_and_read(written, weights);
  if (shared.written == nullptr) return;
  const bool in_u =
      !u.empty() && shared.written >= u.data() && shared.written < u.data() + u.size();
  fail("ValueError", op, ": expected every tensor in u and v to have memory of its own, got ",
       in_u ? "u[" : "v[", shared.written - (in_u ? u : v).data(),
       "] that shares elements with weights[", shared.read - weights.data(), "]; pass a clone()");
}

inline void check_power_iteration(const Operands& weights, const Operands& u, const Operands& v,
                                  int64_t n_iterations, double eps) {
  const char* op = "power_iteration_";
  check_pairs(op, weights, u, v);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Operand& w = weights[i];
    const int64_t b = columns_of(u[i], w), m = matrix_rows(w), n = matrix_width(w);
    if (b > kMaxColumns)
      fail("ValueError", op, ": expected at most ", kMaxColumns, " columns in u[", i, "], got ", b);
    if (b > 1 && b > std::min(m, n))
      fail("ValueError", op, ": expected at most min(m, n) = ", std::min(m, n), " columns in u[", i,
           "], got ", b);
    for (const Operand* x : {&u[i], &v[i]})
      for (int64_t d = 0; d < x->dim; ++d)
        if (x->sizes[d] > 1 && x->strides[d] == 0)
          fail("ValueError", op, ": expected ", x == &u[i] ? "u[" : "v[", i,
               "] to be writable, got an expanded tensor; pass a clone()");
  }
  check_no_overlap(op, weights, u, v);
  if (n_iterations < 1) fail("ValueError", op, ": expected n_iterations >= 1, got ", n_iterations);
  if (n_iterations > kMostIterations)
    fail("ValueError", op, ": expected n_iterations <= ", kMostIterations, ", got ", n_iterations);
  if (!(eps >= 0) || !std::isfinite(eps))
    fail("ValueError", op, ": expected eps to be finite and >= 0, got ", eps);
}

inline void check_sigma(const Operands& weights, const Operands& u, const Operands& v) {
  check_pairs("sigma", weights, u, v);
}

inline void check_normalize(const Operands& weights, const Operands& u, const Operands& v,
                            const Operand& sigma) {
  check_pairs("normalize", weights, u, v);
  check_sigma_values("normalize", weights, sigma);
}

inline void check_normalize_backward(const Operands& grads, const Operands& weights,
                                     const Operands& u, const Operands& v, const Operand& sigma) {
  const char* op = "normalize_backward";
  check_pairs(op, weights, u, v);
  check_sigma_values(op, weights, sigma);
  check_lengths(op, weights.size(), "grads", grads.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Operand &g = grads[i], &w = weights[i];
    if (g.dtype != w.dtype)
      fail("TypeError", op, ": expected grads[", i, "] to be ", dtype_name(w.dtype), ", got ",
           dtype_name(g.dtype));
    if (!g.same_device(w))
      fail("TypeError", op, ": expected grads[", i, "] on the device of weights[", i, "]");
    if (!std::equal(g.sizes, g.sizes + g.dim, w.sizes, w.sizes + w.dim))
      fail("ValueError", op, ": expected grads[", i, "] to have shape ", shape_text(w), ", got ",
           shape_text(g));
    check_memory(op, g, "grads[", i, "]");
  }
}

inline void check_certified_matvec(const Operands& weights, const Operands& v) {
  const char* op = "certified_matvec";
  check_lengths(op, weights.size(), "v", v.size());
  check_weights(op, weights);
  for (size_t i = 0; i < weights.size(); ++i) {
    if (v[i].dtype != ScalarType::Double)
      fail("TypeError", op, ": expected v[", i, "] to be torch.float64, got ",
           dtype_name(v[i].dtype));
    if (!v[i].same_device(weights[i]))
      fail("TypeError", op, ": expected v[", i, "] on the device of weights[", i, "]");
    if (v[i].dim != 1 || v[i].sizes[0] != weights[i].sizes[1])
      fail("ValueError", op, ": expected v[", i, "] to have shape [", weights[i].sizes[1],
           "], got ", shape_text(v[i]));
    check_memory(op, v[i], "v[", i, "]");
  }
}

inline void check_krylov(const Operands& weights, const Operands& basis, const Operands& projected,
                         const Operand& units, const std::vector<int64_t>& filled, int64_t columns,
                         int64_t steps) {
  const char* op = "krylov_";
  check_lengths(op, weights.size(), "basis", basis.size());
  check_lengths(op, weights.size(), "projected", projected.size());
  if (filled.size() != weights.size())
    fail("ValueError", op, ": expected ", weights.size(), " numbers in filled, as in weights, got ",
         filled.size());
  check_weights(op, weights);
  if (columns < 1 || columns > kMaxBlock)
    fail("ValueError", op, ": expected columns from 1 to ", kMaxBlock, ", got ", columns);
  if (steps < 0) fail("ValueError", op, ": expected steps >= 0, got ", steps);
  const auto check = [&](const char* name, size_t i, const Operand& x, ScalarType dtype) {
    if (x.dtype != dtype)
      fail("TypeError", op, ": expected ", name, "[", i, "] to be ", dtype_name(dtype),
           " beside a ", dtype_name(weights[i].dtype), " weight, got ", dtype_name(x.dtype));
    if (!x.same_device(weights[i]))
      fail("TypeError", op, ": expected ", name, "[", i, "] on the device of weights[", i, "]");
    const bool contiguous = x.dim == 2 && (x.sizes[1] <= 1 || x.strides[1] == 1) &&
                            (x.sizes[0] <= 1 || x.sizes[1] == 0 || x.strides[0] == x.sizes[1]);
    if (x.dim == 2 && !contiguous)
      fail("ValueError", op, ": expected ", name, "[", i,
           "] to be contiguous, which it is written as; pass a contiguous() one");
    check_memory(op, x, name, "[", i, "]");
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    const Operand &w = weights[i], &q = basis[i], &h = projected[i];
    check("basis", i, q, state_dtype(w.dtype));
    check("projected", i, h, ScalarType::Double);
    if (w.sizes[1] > 1 && w.strides[1] != 1)
      fail(
          "ValueError", op, ": expected weights[", i,
          "] to have rows of unit stride; pass weight.mT, whose norm is the same, or contiguous()");
    if (q.dim != 2 || q.sizes[1] != w.sizes[1])
      fail("ValueError", op, ": expected basis[", i, "] to have shape [capacity, ", w.sizes[1],
           "], got ", shape_text(q));
    const int64_t capacity = q.sizes[0];
    if (h.dim != 2 || h.sizes[0] != capacity || h.sizes[1] != capacity)
      fail("ValueError", op, ": expected projected[", i, "] to have shape [", capacity, ", ",
           capacity, "], got ", shape_text(h));
    if (filled[i] != 0 && filled[i] < columns)
      fail("ValueError", op, ": expected filled[", i, "] to be 0 or at least columns = ", columns,
           ", got ", filled[i]);
    const int64_t rows = std::max(filled[i], columns);
    if (rows > capacity || steps > (capacity - rows) / columns)
      fail("ValueError", op, ": expected room for ", steps, " blocks of ", columns,
           " rows more in basis[", i, "], whose ", rows, " of ", capacity, " rows are taken");
  }
  if (units.dtype != ScalarType::Double)
    fail("TypeError", op, ": expected units to be torch.float64, got ", dtype_name(units.dtype));
  if (units.dim != 1 || size_t(units.sizes[0]) != weights.size() ||
      (units.sizes[0] > 1 && units.strides[0] != 1))
    fail("ValueError", op, ": expected units to be a contiguous vector [", weights.size(),
         "], got ", shape_text(units));
  if (!weights.empty() && !units.same_device(weights[0]))
    fail("TypeError", op, ": expected units on the device of the weights");
  check_memory(op, units, "units");
  const Operands scalars{units};
  const std::vector<Span> written = sorted_spans({&basis, &projected, &scalars});
  if (written_twice(written) || written_and_read(written, weights).written != nullptr)
    fail("ValueError", op,
         ": expected basis, projected and units to have memory of their own, got two that "
         "share elements");
}

inline void check_like_weight(const char* op, const char* name, const Operand& t,
                              const Operand& weight) {
  if (t.dtype != weight.dtype)
    fail("TypeError", op, ": expected ", name, " to be ", dtype_name(weight.dtype),
         ", as the weight, got ", dtype_name(t.dtype));
  if (!t.same_device(weight))
    fail("TypeError", op, ": expected ", name, " on the device of the weight");
  check_memory(op, t, name);
}

inline void check_spectral_linear(const char* op, const Operand& x, const Operand& weight,
                                  const Operand* bias, const Operand& u, const Operand& v,
                                  const Operand& sigma) {
  if (!kernel_dtype(weight.dtype))
    fail("TypeError", op,
         ": expected weight to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, "
         "got ",
         dtype_name(weight.dtype));
  if (weight.dim != 2)
    fail("ValueError", op, ": expected weight to be a matrix [out, in], got shape ",
         shape_text(weight));
  check_memory(op, weight, "weight");
  check_like_weight(op, "x", x, weight);
  if (x.dim < 1 || x.sizes[x.dim - 1] != weight.sizes[1])
    fail("ValueError", op, ": expected x to have shape [..., ", weight.sizes[1], "], got ",
         shape_text(x));
  if (bias != nullptr) {
    check_like_weight(op, "bias", *bias, weight);
    if (bias->dim != 1 || bias->sizes[0] != weight.sizes[0])
      fail("ValueError", op, ": expected bias to have shape [", weight.sizes[0], "], got ",
           shape_text(*bias));
  }
  const ScalarType state = state_dtype(weight.dtype);
  const auto like_state = [&](const char* name, const Operand& t) {
    if (t.dtype != state)
      fail("TypeError", op, ": expected ", name, " to be ", dtype_name(state), " beside a ",
           dtype_name(weight.dtype), " weight, got ", dtype_name(t.dtype));
    if (!t.same_device(weight))
      fail("TypeError", op, ": expected ", name, " on the device of the weight");
    check_memory(op, t, name);
  };
  like_state("u", u);
  like_state("v", v);
  like_state("sigma", sigma);
  if (u.dim != 1 || u.sizes[0] != weight.sizes[0])
    fail("ValueError", op, ": expected u to have shape [", weight.sizes[0], "], got ",
         shape_text(u));
  if (v.dim != 1 || v.sizes[0] != weight.sizes[1])
    fail("ValueError", op, ": expected v to have shape [", weight.sizes[1], "], got ",
         shape_text(v));
  if (sigma.dim > 1 || (sigma.dim == 1 && sigma.sizes[0] != 1))
    fail("ValueError", op, ": expected sigma to be one number, [] or [1], got ", shape_text(sigma));
}

inline void check_spectral_linear_backward(const Operand& g, const Operand& x,
                                           const Operand& weight, const Operand* bias,
                                           const Operand& u, const Operand& v, const Operand& sigma,
                                           const Operand* y) {
  const char* op = "spectral_linear_backward";
  check_spectral_linear(op, x, weight, bias, u, v, sigma);
  std::vector<int64_t> expected(x.sizes, x.sizes + x.dim);
  expected.back() = weight.sizes[0];
  Operand like = weight;
  like.dim = x.dim;
  like.sizes = expected.data();
  const auto check = [&](const char* name, const Operand& t) {
    check_like_weight(op, name, t, weight);
    if (t.dim != x.dim || !std::equal(t.sizes, t.sizes + t.dim, expected.begin()))
      fail("ValueError", op, ": expected ", name, " to have shape ", shape_text(like), ", got ",
           shape_text(t));
  };
  check("g", g);
  if (y != nullptr) check("y", *y);
}

}  // namespace specnorm
