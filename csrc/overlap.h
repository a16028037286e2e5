// Whether tensors that are written share elements with one another or with what is read. A test of
// spans first, in n log n; the elements themselves only where spans cross, which columns of one
// buffer do without sharing anything.
#pragma once

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace specnorm {

struct Span {
  const char *begin, *end;
  const Operand* of;
};

// From the first byte to past the last; false if there is none.
inline bool span_of(const Operand& t, Span& out) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim; ++d) {
    if (t.sizes[d] == 0) return false;
    last += (t.sizes[d] - 1) * t.strides[d];
  }
  out = {t.data, t.data + (last + 1) * t.element_size(), &t};
  return true;
}

// Calls body(address) for every element of a tensor of any dimension but 0.
template <class F>
void for_each_element(const Operand& x, F body) {
  const int64_t size = x.element_size();
  for (int64_t i = 0; i < x.sizes[0]; ++i) {
    if (x.dim == 1)
      body(x.data + i * x.strides[0] * size);
    else
      for_each_element(slice_of(x, i), body);
  }
}

// Whether `index` = i * far + j * near for some i, j within w's sizes.
inline bool is_element(const Operand& w, int64_t index) {
  const int d = w.strides[0] >= w.strides[1] ? 0 : 1;
  const int64_t far = w.strides[d], near = w.strides[1 - d];
  const int64_t far_size = far == 0 ? 1 : w.sizes[d];
  const int64_t near_size = near == 0 ? 1 : w.sizes[1 - d];
  const auto in_run = [&](int64_t rest) {
    return rest == 0 || (near != 0 && rest % near == 0 && rest / near < near_size);
  };
  if (far == 0 || near * (near_size - 1) < far) {  // runs do not overlap
    const int64_t i = far == 0 ? 0 : std::min(index / far, far_size - 1);
    return in_run(index - i * far);
  }
  for (int64_t i = 0; i < far_size && i * far <= index; ++i)
    if (in_run(index - i * far)) return true;
  return false;
}

inline bool share_elements(const Operand& written, const Operand& w) {
  if (is_stack(w)) {
    for (int64_t i = 0; i < w.sizes[0]; ++i)
      if (share_elements(written, slice_of(w, i))) return true;
    return false;
  }
  const int64_t size = w.element_size(), bytes = written.element_size();
  bool found = false;
  for_each_element(written, [&](const char* p) {
    // an element of u or v may lie over two of a 16-bit weight
    const int64_t first = p - w.data, last = first + bytes - 1;
    for (int64_t at = first < 0 ? 0 : first / size; !found && at * size <= last; ++at)
      found = is_element(w, at);
  });
  return found;
}

// The spans in order of their beginnings.
inline std::vector<Span> sorted_spans(std::initializer_list<const Operands*> lists) {
  std::vector<Span> spans;
  size_t most = 0;
  for (const Operands* list : lists) most += list->size();
  spans.reserve(most);
  Span span;
  for (const Operands* list : lists)
    for (const Operand& t : *list)
      if (span_of(t, span)) spans.push_back(span);
  const auto earlier = [](const Span& a, const Span& b) { return a.begin < b.begin; };
  if (!std::is_sorted(spans.begin(), spans.end(), earlier))
    std::sort(spans.begin(), spans.end(), earlier);
  return spans;
}

// Whether two indices of one tensor lead to one element. Dimensions that nest, as they do in any
// permutation of contiguous ones, tell without a look at each.
inline bool may_repeat(const Operand& x) {
  constexpr int64_t kMost = 4;
  if (x.dim > kMost) return true;
  int64_t order[kMost], count = 0;  // by stride, without dimensions of one
  for (int64_t d = 0; d < x.dim; ++d) {
    if (x.sizes[d] == 1) continue;
    int64_t at = count++;
    for (; at > 0 && x.strides[order[at - 1]] > x.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t last = 0;  // the furthest element of the dimensions so far
  for (int64_t k = 0; k < count; ++k) {
    if (x.strides[order[k]] <= last) return true;
    last += (x.sizes[order[k]] - 1) * x.strides[order[k]];
  }
  return false;
}

// Two written tensors, or two matrices of a stack, that share an element?
inline bool written_twice(const std::vector<Span>& written) {
  bool crossing = false;
  for (const Span& s : written) crossing = crossing || (s.of->dim > 1 && may_repeat(*s.of));
  const char* end = nullptr;
  for (const Span& s : written) {
    crossing = crossing || s.begin < end;
    end = std::max(end, s.end);
  }
  if (!crossing) return false;
  std::vector<const char*> elements;
  for (const Span& s : written)
    for_each_element(*s.of, [&](const char* p) { elements.push_back(p); });
  std::sort(elements.begin(), elements.end());
  return std::adjacent_find(elements.begin(), elements.end()) != elements.end();
}

struct Shared {
  const Operand *written, *read;  // null if nothing is shared
};

// `written` sorted and not written_twice.
inline Shared written_and_read(const std::vector<Span>& written, const Operands& read) {
  if (written.empty()) return {};
  std::vector<const char*> ends;  // the furthest end so far, for spans that cross
  Span span;
  for (const Operand& w : read) {
    // most often all weights lie on one side of everything that is written
    if (!span_of(w, span) || span.end <= written.front().begin) continue;
    if (ends.empty()) {
      ends.reserve(written.size());
      const char* end = nullptr;
      for (const Span& s : written) ends.push_back(end = std::max(end, s.end));
    }
    if (span.begin >= ends.back()) continue;
    auto next = std::lower_bound(written.begin(), written.end(), span.end,
                                 [](const Span& s, const char* p) { return s.begin < p; });
    for (auto i = next - written.begin(); i-- > 0 && ends[size_t(i)] > span.begin;) {
      const Span& s = written[size_t(i)];
      if (s.end > span.begin && share_elements(*s.of, w)) return {s.of, &w};
    }
  }
  return {};
}

}  // namespace specnorm
