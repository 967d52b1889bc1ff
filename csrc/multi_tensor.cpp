#include "multi_tensor.h"

#include <pthread.h>

#include <map>

namespace fastopt {
namespace {

constexpr int64_t kTask = 4 * kChunk;  // elements: enough to be worth a thread's while
constexpr int64_t kStaged = 512;       // elements: few enough for all buffers to stay in L1

// Copies n elements of 16 bits between an array and a tensor; `f(in the array, in the tensor)`.
template <class F>
void for_each_16(const Layout& layout, int index, const Operand& operand, int64_t begin, int64_t n,
                 uint16_t* array, const F& f) {
  auto* data = reinterpret_cast<uint16_t*>(operand.data);
  layout.for_each_run(index, begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
    for (int64_t i = 0; i < count; ++i) f(*array++, data[offset + i * stride]);
  });
}

// Where the second array of a packing has what belongs to the elements from `begin` on.
char* beside(const Operand& operand, int64_t begin) {
  return operand.beside ? operand.beside + begin / operand.block * operand.row().b_bytes : nullptr;
}

uint32_t* sums(const Operand& operand, int64_t begin) {
  return operand.sums ? operand.sums + begin / kSumBlock : nullptr;
}

// Whether the first array of an operand can be used where it is. Codes are in the order of the walk.
bool in_place(const Layout& layout, int index, const Operand& operand) {
  return layout.contiguous(index) || is_coded(operand.packing());
}

void unpack(const Layout& layout, int index, const Operand& operand, int64_t begin, int64_t n,
            float* to) {
  const int packing = static_cast<int>(operand.packing());
  const void* from = operand.data + begin * operand.row().a_bytes;
  uint16_t gathered[kStaged];
  if (!in_place(layout, index, operand)) {
    for_each_16(layout, index, operand, begin, n, gathered,
                [](uint16_t& here, uint16_t& there) { here = there; });
    from = gathered;
  }
  packing_kernels().unpack[packing](from, beside(operand, begin), sums(operand, begin),
                                    operand.block, static_cast<int32_t>(n), to);
}

// Where random numbers come from: those of an element are of its chunk in the whole tensor.
class Random {
 public:
  Random(const Param& param, const double* row)
      : param_(param),
        seed_(static_cast<uint64_t>(row[kSeed])),
        step_(static_cast<uint64_t>(row[kStep])) {}

  // Calls f(begin, n, key, first) for each run of elements of one chunk, with that one's key and the
  // first's place in it.
  template <class F>
  void for_each_run(int64_t begin, int64_t n, const F& f) {
    const Piece& piece = param_.piece;
    for (const int64_t end = begin + n; begin < end; begin += n) {
      int64_t place = begin;
      n = end - begin;
      if (piece.run) {
        place = begin / piece.run * piece.stride + begin % piece.run;
        n = std::min(n, piece.run - begin % piece.run);
      }
      place += piece.offset;
      n = std::min(n, kChunk - place % kChunk);
      f(begin, n, key(place / kChunk), static_cast<int32_t>(place % kChunk));
    }
  }

  uint32_t key(int64_t chunk) {
    if (chunk != chunk_) key_ = random_key(seed_, step_, param_.number, chunk);
    chunk_ = chunk;
    return key_;
  }

  // Whether a chunk of the parameter is one of the whole tensor.
  bool is_whole() const { return param_.piece.is_whole(); }

 private:
  const Param& param_;
  uint64_t seed_, step_;
  int64_t chunk_ = -1;
  uint32_t key_ = 0;  // of that chunk
};

void pack(const Layout& layout, int index, const Operand& operand, int64_t begin, int64_t n,
          const float* from, Random& random) {
  const int packing = static_cast<int>(operand.packing());
  const bool direct = in_place(layout, index, operand);
  uint16_t gathered[kStaged];
  char* to = direct ? operand.data + begin * operand.row().a_bytes
                    : reinterpret_cast<char*>(gathered);
  const auto put = [&](int64_t at, int64_t count, uint32_t key, int32_t first) {
    const int64_t done = at - begin;
    packing_kernels().pack[packing](from + done, key, first, operand.block,
                                    static_cast<int32_t>(count),
                                    to + done * operand.row().a_bytes, beside(operand, at),
                                    sums(operand, at));
  };
  if (random.is_whole() || !is_random(operand.packing()))
    put(begin, n, random.key(begin / kChunk), static_cast<int32_t>(begin % kChunk));
  else
    random.for_each_run(begin, n, put);
  if (!direct)
    for_each_16(layout, index, operand, begin, n, gathered,
                [](uint16_t& here, uint16_t& there) { there = here; });
}

template <class T>
T* stage_in(const Kernels<T>& k, const Layout& layout, int index, const Operand& operand,
            int64_t begin, int64_t n, T* buffer) {
  constexpr DType own = sizeof(T) == sizeof(double) ? DType::float64 : DType::float32;
  if constexpr (own == DType::float32) {
    if (!operand.is_plain()) {
      unpack(layout, index, operand, begin, n, buffer);
      return buffer;
    }
  }
  const int64_t size = operand.row().a_bytes;
  const auto load = k.load[operand.storage];
  if (layout.contiguous(index)) {
    char* at = operand.data + begin * size;
    if (operand.dtype() == own) return reinterpret_cast<T*>(at);
    load(at, 1, n, buffer);
    return buffer;
  }
  T* to = buffer;
  layout.for_each_run(index, begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
    load(operand.data + offset * size, stride, count, to);
    to += count;
  });
  return buffer;
}

template <class T>
void stage_out(const Kernels<T>& k, const Layout& layout, int index, const Operand& operand,
               int64_t begin, int64_t n, const T* from, Random& random) {
  if constexpr (std::is_same_v<T, float>)
    if (!operand.is_plain()) return pack(layout, index, operand, begin, n, from, random);
  const int64_t size = operand.row().a_bytes;
  const auto store = k.store[operand.storage];
  layout.for_each_run(index, begin, n, [&](int64_t offset, int64_t stride, int64_t count) {
    store(from, operand.data + offset * size, stride, count);
    from += count;
  });
}

template <class T>
void update_chunk(const Param& param, const Schedule::Chunk& chunk, const double* row) {
  const Kernels<T>& k = kernels<T>();
  const UpdateKernel<T> update = update_kernel<T>(param.rule);
  T buffers[2 + kMaxStates][kStaged];
  Random random(param, row);
  for (int64_t done = 0, n; done < chunk.n; done += n) {
    T* blocks[2 + kMaxStates];
    bool staged[2 + kMaxStates];
    n = std::min(kStaged, chunk.n - done);
    bool any_staged = false;
    for (int i = 0; i < param.n_operands; ++i) {
      blocks[i] = stage_in(k, param.layout, i, param.operands[i], chunk.begin + done, n,
                           buffers[i]);
      staged[i] = blocks[i] == buffers[i];
      any_staged |= staged[i];
    }
    if (!any_staged) n = chunk.n;  // nothing to convert: the whole chunk in one go
    update(blocks[0], blocks[1], blocks + 2, n, row);
    for (int i = 0; i < param.n_operands; ++i)
      if (staged[i] && i != Param::kGrad)
        stage_out(k, param.layout, i, param.operands[i], chunk.begin + done, n, blocks[i],
                  random);
  }
}

double reduce_chunk(const Param& param, const Schedule::Chunk& chunk, Reduction reduction,
                    double order) {
  const Operand& grad = param.grad();
  if (param.grad_layout.contiguous(0)) {
    const char* from = grad.data + chunk.begin * grad.row().a_bytes;
    return reduce(reduction, grad.dtype(), from, chunk.n, order);
  }
  double buffer[kChunk];
  stage_in(kernels<double>(), param.grad_layout, 0, grad, chunk.begin, chunk.n, buffer);
  return reduce(reduction, DType::float64, buffer, chunk.n, order);
}

bool in_child = false;
const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });

}  // namespace

bool forked() { return in_child; }

std::vector<int> waves_of(const std::vector<std::pair<uintptr_t, uintptr_t>>& extents,
                          const std::vector<int>& members) {
  std::vector<int> waves(extents.size(), -1);
  std::vector<int> order;
  for (int i : members) {
    waves[i] = 0;
    if (extents[i].first < extents[i].second) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](int a, int b) { return extents[a] < extents[b]; });
  bool any_shared = false;
  for (size_t k = 1; k < order.size(); ++k)
    any_shared |= extents[order[k - 1]].second > extents[order[k]].first;
  if (!any_shared) return waves;

  std::sort(order.begin(), order.end());
  // The latest wave that writes each address: that of the last key that is not greater.
  std::map<uintptr_t, int> latest{{0, -1}};
  const auto cut_at = [&](uintptr_t address) {
    return latest.emplace(address, std::prev(latest.upper_bound(address))->second).first;
  };
  for (int i : order) {
    const auto first = cut_at(extents[i].first), last = cut_at(extents[i].second);
    for (auto piece = first; piece != last; ++piece)
      waves[i] = std::max(waves[i], piece->second + 1);
    latest.erase(std::next(first), last);
    first->second = waves[i];
  }
  return waves;
}

Schedule::Schedule(const std::vector<Param>& params) {
  std::vector<int> order;
  std::vector<std::pair<uintptr_t, uintptr_t>> extents;
  int64_t room = 0;
  int classes = 1;
  for (size_t p = 0; p < params.size(); ++p) {
    const auto begin = reinterpret_cast<uintptr_t>(params[p].operands[0].data);
    extents.emplace_back(begin, begin + params[p].extent);
    if (params[p].active) order.push_back(static_cast<int>(p));
    classes = std::max(classes, params[p].norm_class + 1);
  }
  std::vector<int64_t> slots(params.size());  // the first of each parameter
  int64_t n_slots = 0;
  for (int norm_class = 0; norm_class < classes; ++norm_class) {
    for (int p : order) {
      if (params[p].norm_class != norm_class) continue;
      slots[p] = n_slots;
      n_slots += (params[p].layout.numel() + kChunk - 1) / kChunk;
    }
    slot_ends_.push_back(n_slots);
  }
  const std::vector<int> wave = waves_of(extents, order);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return wave[a] < wave[b]; });
  for (int p : order) {
    if (static_cast<size_t>(wave[p]) == waves_.size()) {
      waves_.push_back(static_cast<int64_t>(tasks_.size()));
      room = 0;
    }
    const int64_t numel = params[p].layout.numel();
    for (int64_t begin = 0; begin < numel; begin += kChunk) {
      const int64_t n = std::min(kChunk, numel - begin);
      if (room < n) {
        tasks_.push_back(static_cast<int64_t>(chunks_.size()));
        room = kTask;
      }
      room -= n;
      chunks_.push_back({p, begin, n, slots[p] + begin / kChunk});
    }
  }
  waves_.push_back(static_cast<int64_t>(tasks_.size()));
  tasks_.push_back(static_cast<int64_t>(chunks_.size()));
}

template <class F>
void Schedule::for_each_chunk(int threads, const F& f) const {
  for (size_t w = 0; w + 1 < waves_.size(); ++w)
    parallel_for(waves_[w + 1] - waves_[w], 1, threads, [&, first = waves_[w]](int64_t i) {
      for (int64_t c = tasks_[first + i]; c < tasks_[first + i + 1]; ++c) f(chunks_[c]);
    });
}

std::vector<double> reduce_grads(const std::vector<Param>& params, const Schedule& schedule,
                                 double order, int threads) {
  const Reduction reduction = reduction_of(order);
  std::vector<double> partials(schedule.slot_ends().back());
  schedule.for_each_chunk(threads, [&](const Schedule::Chunk& chunk) {
    partials[chunk.slot] = reduce_chunk(params[chunk.param], chunk, reduction, order);
  });
  // No chunk's result is negative: abs changes nothing.
  const bool is_max = reduction == Reduction::max_of_abs;
  std::vector<double> sums;
  int64_t begin = 0;
  for (int64_t end : schedule.slot_ends()) {
    sums.push_back(reduce(is_max ? Reduction::max_of_abs : Reduction::sum_of_abs, DType::float64,
                          partials.data() + begin, end - begin, order));
    begin = end;
  }
  return sums;
}

void update(const std::vector<Param>& params, const Schedule& schedule,
            const std::vector<double>& table, int64_t row_size, int threads) {
  schedule.for_each_chunk(threads, [&](const Schedule::Chunk& chunk) {
    const Param& param = params[chunk.param];
    const double* row = table.data() + param.row * row_size;
    param.in_double ? update_chunk<double>(param, chunk, row)
                    : update_chunk<float>(param, chunk, row);
  });
}

}  // namespace fastopt
