// How a set of tensors of one shape is walked: in the memory order of the first, with the strides of
// each. Dense tensors of equal strides, the common case, collapse to one dimension of stride 1.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

namespace fastopt {

using Sizes = std::vector<int64_t>;

// Bytes from a tensor's first element to the end of its last.
inline int64_t extent(const Sizes& shape, const Sizes& strides, int64_t item_size) {
  int64_t last = 0;
  for (size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] == 0) return 0;
    last += (shape[d] - 1) * strides[d];
  }
  return (last + 1) * item_size;
}

class Layout {
 public:
  Layout() = default;

  // `strides` holds one vector for each tensor, counted in elements like `shape`.
  Layout(const Sizes& shape, const std::vector<Sizes>& strides) {
    for (int64_t size : shape) numel_ *= size;
    std::vector<size_t> dims;
    for (size_t d = 0; d < shape.size(); ++d)
      if (shape[d] != 1) dims.push_back(d);
    std::stable_sort(dims.begin(), dims.end(),
                     [&](size_t a, size_t b) { return strides[0][a] > strides[0][b]; });
    Dims merged{{}, std::vector<Sizes>(strides.size())};
    for (size_t d : dims) merged.append(shape[d], d, strides);
    for (size_t t = 0; t < strides.size(); ++t)
      if (merged.shape.empty() || merged.strides[t] == Sizes{1}) contiguous_ |= 1u << t;
    if (contiguous_ + 1 != 1u << strides.size()) dims_ = std::make_shared<Dims>(std::move(merged));
  }

  int64_t numel() const { return numel_; }
  bool contiguous(size_t tensor) const { return contiguous_ >> tensor & 1; }

  // Calls f(offset of the first element, stride, count) for each run of elements begin .. begin + n
  // of a tensor that lies along the innermost dimension.
  template <class F>
  void for_each_run(size_t tensor, int64_t begin, int64_t n, F&& f) const {
    if (contiguous(tensor)) return f(begin, int64_t{1}, n);
    const Sizes &shape = dims_->shape, &strides = dims_->strides[tensor];
    const int64_t inner = shape.back();
    while (n > 0) {
      int64_t outer = begin / inner;
      const int64_t start = begin % inner;
      int64_t offset = start * strides.back();
      for (size_t d = shape.size() - 1; d-- > 0; outer /= shape[d])
        offset += outer % shape[d] * strides[d];
      const int64_t count = std::min(n, inner - start);
      f(offset, strides.back(), count);
      begin += count;
      n -= count;
    }
  }

 private:
  struct Dims {
    Sizes shape;
    std::vector<Sizes> strides;

    // Adds a dimension inside the last one, merging the two where every tensor's strides allow.
    void append(int64_t size, size_t d, const std::vector<Sizes>& added) {
      bool mergeable = !shape.empty();
      for (size_t t = 0; mergeable && t < added.size(); ++t)
        mergeable = strides[t].back() == added[t][d] * size;
      if (mergeable) {
        shape.back() *= size;
        for (size_t t = 0; t < added.size(); ++t) strides[t].back() = added[t][d];
      } else {
        shape.push_back(size);
        for (size_t t = 0; t < added.size(); ++t) strides[t].push_back(added[t][d]);
      }
    }
  };

  int64_t numel_ = 1;
  uint32_t contiguous_ = 0;  // one bit for each tensor
  std::shared_ptr<const Dims> dims_;  // null where all tensors are contiguous: the common case is small
};

}  // namespace fastopt
