// One check per op, run before anything is written, for CPU and CUDA alike; and every message a user can see from
// C++. A message names the op, what was expected and what came. Its first word is the Python exception it
// should become (torch turns every C++ exception into RuntimeError; specnorm_ext/_ops.py turns it back).
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"

namespace specnorm {

template <class... Parts>
[[noreturn]] void fail(const char* exception, const Parts&... parts) {
  std::ostringstream message;
  message << exception << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << "]";
  return text.str();
}

inline void check_status(const char* op, Status status) {
  if (status == kOutOfMemory)
    fail("RuntimeError", op, ": expected to allocate the workspace, got out of memory; pass fewer weights a call");
}

inline void check_lengths(const char* op, size_t weights, const char* name, size_t got) {
  if (weights != got)
    fail("ValueError", op, ": expected ", weights, " tensors in ", name, ", as in weights, got ", got);
}

inline void check_weights(const char* op, const std::vector<Tensor>& weights) {
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& w = weights[i];
    if (!kernel_dtype(w.scalar_type()))
      fail("TypeError", op, ": expected weights[", i,
           "] to be torch.float32, torch.float64, torch.bfloat16 or torch.float16, got ",
           dtype_name(w.scalar_type()));
    if (w.scalar_type() != weights[0].scalar_type())
      fail("TypeError", op, ": expected one dtype a call, weights[0] is ",
           dtype_name(weights[0].scalar_type()), ", got ", dtype_name(w.scalar_type()), " in weights[", i, "]");
    if (w.get_device_index() != weights[0].get_device_index() || w.is_cpu() != weights[0].is_cpu())
      fail("TypeError", op, ": expected one device a call, weights[", i, "] is on another device than weights[0]");
    if (w.dim() != 2)
      fail("ValueError", op, ": expected weights[", i, "] to be a matrix [m, n], got shape ", shape_text(w));
  }
}

// x (named u or v) must be [length] or [length, columns] beside weights[i].
inline void check_state(const char* op, const char* name, size_t i, const Tensor& weight, const Tensor& x,
                        int64_t length) {
  if (x.scalar_type() != state_dtype(weight.scalar_type()))
    fail("TypeError", op, ": expected ", name, "[", i, "] to be ",
         dtype_name(state_dtype(weight.scalar_type())), " beside a ", dtype_name(weight.scalar_type()),
         " weight, got ", dtype_name(x.scalar_type()));
  if (x.get_device_index() != weight.get_device_index() || x.is_cpu() != weight.is_cpu())
    fail("TypeError", op, ": expected ", name, "[", i, "] on the device of weights[", i, "]");
  if (x.dim() < 1 || x.dim() > 2 || x.size(0) != length)
    fail("ValueError", op, ": expected ", name, "[", i, "] to have shape [", length, "] or [", length,
         ", b], got ", shape_text(x));
}

inline int64_t columns_of(const Tensor& x) { return x.dim() == 2 ? x.size(1) : 1; }

inline void check_pairs(const char* op, const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                        const std::vector<Tensor>& v) {
  check_lengths(op, weights.size(), "u", u.size());
  check_lengths(op, weights.size(), "v", v.size());
  check_weights(op, weights);
  for (size_t i = 0; i < weights.size(); ++i) {
    check_state(op, "u", i, weights[i], u[i], weights[i].size(0));
    check_state(op, "v", i, weights[i], v[i], weights[i].size(1));
    if (u[i].dim() != v[i].dim() || columns_of(u[i]) != columns_of(v[i]))
      fail("ValueError", op, ": expected u[", i, "] and v[", i, "] to have the same columns, got ",
           shape_text(u[i]), " and ", shape_text(v[i]));
    if (columns_of(u[i]) < 1)
      fail("ValueError", op, ": expected u[", i, "] to have at least 1 column, got ", shape_text(u[i]));
  }
}

inline void check_sigma_values(const char* op, const std::vector<Tensor>& weights, const Tensor& sigma) {
  if (sigma.dim() != 1 || size_t(sigma.size(0)) != weights.size())
    fail("ValueError", op, ": expected sigma to have shape [", weights.size(), "], got ", shape_text(sigma));
  if (weights.empty()) return;
  if (sigma.scalar_type() != state_dtype(weights[0].scalar_type()))
    fail("TypeError", op, ": expected sigma to be ", dtype_name(state_dtype(weights[0].scalar_type())),
         ", got ", dtype_name(sigma.scalar_type()));
  if (sigma.get_device_index() != weights[0].get_device_index() || sigma.is_cpu() != weights[0].is_cpu())
    fail("TypeError", op, ": expected sigma on the device of the weights");
}

// Two written tensors that share memory would be written by two threads at once.
inline void check_no_overlap(const char* op, const std::vector<Tensor>& u, const std::vector<Tensor>& v) {
  std::vector<std::pair<const char*, const char*>> spans;
  spans.reserve(u.size() + v.size());
  const auto add = [&spans](const Tensor& t) {
    const auto* begin = static_cast<const char*>(t.data_ptr());
    int64_t last = 0;
    bool empty = false;
    for (int64_t d = 0; d < t.dim(); ++d) {
      empty = empty || t.size(d) == 0;
      last += (t.size(d) - 1) * t.stride(d);
    }
    if (!empty) spans.emplace_back(begin, begin + (last + 1) * int64_t(t.element_size()));
  };
  for (const Tensor& t : u) add(t);
  for (const Tensor& t : v) add(t);
  if (!std::is_sorted(spans.begin(), spans.end())) std::sort(spans.begin(), spans.end());
  bool overlap = false;
  for (size_t i = 1; i < spans.size(); ++i) overlap = overlap || spans[i].first < spans[i - 1].second;
  if (overlap) {
    // Interleaved views (columns of one buffer) have spans that cross without sharing an element; only equal
    // starts are certain to collide, and those are what a list built by mistake contains.
    for (size_t i = 1; i < spans.size(); ++i)
      if (spans[i].first == spans[i - 1].first)
        fail("ValueError", op, ": expected every tensor in u and v to have memory of its own, got the same tensor twice");
  }
}

inline void check_power_iteration(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                                  const std::vector<Tensor>& v, int64_t n_iterations, double eps) {
  const char* op = "power_iteration_";
  check_pairs(op, weights, u, v);
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t b = columns_of(u[i]), m = weights[i].size(0), n = weights[i].size(1);
    if (b > kMaxColumns)
      fail("ValueError", op, ": expected at most ", kMaxColumns, " columns in u[", i, "], got ", b);
    if (b > 1 && b > std::min(m, n))
      fail("ValueError", op, ": expected at most min(m, n) = ", std::min(m, n), " columns in u[", i, "], got ", b);
    for (const Tensor* x : {&u[i], &v[i]})
      for (int64_t d = 0; d < x->dim(); ++d)
        if (x->size(d) > 1 && x->stride(d) == 0)
          fail("ValueError", op, ": expected ", x == &u[i] ? "u[" : "v[", i,
               "] to be writable, got an expanded tensor; pass a clone()");
  }
  check_no_overlap(op, u, v);
  if (n_iterations < 1) fail("ValueError", op, ": expected n_iterations >= 1, got ", n_iterations);
  if (!(eps >= 0) || !std::isfinite(eps))
    fail("ValueError", op, ": expected eps to be finite and >= 0, got ", eps);
}

inline void check_sigma(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                        const std::vector<Tensor>& v) {
  check_pairs("sigma", weights, u, v);
}

inline void check_normalize(const std::vector<Tensor>& weights, const std::vector<Tensor>& u,
                            const std::vector<Tensor>& v, const Tensor& sigma) {
  check_pairs("normalize", weights, u, v);
  check_sigma_values("normalize", weights, sigma);
}

inline void check_normalize_backward(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                     const std::vector<Tensor>& u, const std::vector<Tensor>& v,
                                     const Tensor& sigma) {
  const char* op = "normalize_backward";
  check_pairs(op, weights, u, v);
  check_sigma_values(op, weights, sigma);
  check_lengths(op, weights.size(), "grads", grads.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor &g = grads[i], &w = weights[i];
    if (g.scalar_type() != w.scalar_type())
      fail("TypeError", op, ": expected grads[", i, "] to be ", dtype_name(w.scalar_type()), ", got ",
           dtype_name(g.scalar_type()));
    if (g.dim() != 2 || g.size(0) != w.size(0) || g.size(1) != w.size(1))
      fail("ValueError", op, ": expected grads[", i, "] to have shape ", shape_text(w), ", got ", shape_text(g));
  }
}

}  // namespace specnorm
