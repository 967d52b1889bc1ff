// The passes over many tensors at once: a schedule of chunks, the norm pass and the update pass.
#pragma once

#include <array>
#include <cfenv>
#include <optional>
#include <utility>
#include <vector>

#include "kernels.h"
#include "layout.h"

namespace fastopt {

struct Operand {
  char* data = nullptr;
  char* beside = nullptr;    // the second array of a packing, in the order of the walk
  uint32_t* sums = nullptr;  // the checksums of a remainder's parameter
  int storage = 0;           // index into kStorages
  int32_t block = 1;         // how many elements share one of the second array

  bool is_plain() const { return storage < kDTypes; }
  DType dtype() const { return static_cast<DType>(storage); }  // if it is plain
  Packing packing() const { return static_cast<Packing>(storage - kDTypes); }
  const Storage& row() const { return kStorages[storage]; }
};

// Where the elements of a shard are in the whole tensor: Piece of fastopt/packing.py.
struct Piece {
  int64_t offset = 0;
  int64_t run = 0;
  int64_t stride = 0;

  bool is_whole() const { return !offset && !run; }
};

// One parameter with all that a step reads and writes of it.
struct Param {
  // operands[0] is the parameter, [1] the gradient, the rest the states, all walked by `layout`.
  static constexpr int kGrad = 1;
  std::array<Operand, 2 + kMaxStates> operands;
  int n_operands = 0;
  Layout layout;
  Layout grad_layout;  // the gradient in its own memory order: the order of the norm
  int rule = 0;        // index into rules()
  int number = 0;      // among the optimizer's parameters, for random numbers
  Piece piece;         // likewise
  int norm_class = 0;  // which of the sums of a norm it is part of
  bool in_double = false;
  int64_t extent = 0;  // bytes from the parameter's first element to the end of its last
  bool active = true;  // has a gradient in this step
  int row = 0;         // of the table of scalars

  Operand& grad() { return operands[kGrad]; }
  const Operand& grad() const { return operands[kGrad]; }
};

// A process forked after the first parallel region has no OpenMP workers, and libgomp would wait for
// them for ever: there, everything runs in one thread.
bool forked();

// A flat list of chunks of at most kChunk elements, grouped into tasks of about four times as many.
// Parameters that share memory with an earlier one go into a later wave, so that they are updated one
// after the other, in order, as a plain loop would.
class Schedule {
 public:
  struct Chunk {
    int param;
    int64_t begin, n;
    int64_t slot;  // where the norm pass puts its partial result: by norm class, then by parameter
  };

  explicit Schedule(const std::vector<Param>& params);

  // For each norm class the end of its slots.
  const std::vector<int64_t>& slot_ends() const { return slot_ends_; }

  // Calls f(chunk) for every chunk, in parallel within a wave. f must not throw.
  template <class F>
  void for_each_chunk(int threads, const F& f) const;

 private:
  std::vector<Chunk> chunks_;
  std::vector<int64_t> slot_ends_;
  std::vector<int64_t> tasks_;  // first chunk of each task, then the number of chunks
  std::vector<int64_t> waves_;  // first task of each wave, then the number of tasks
};

// The one parallel loop: calls f(0) .. f(n - 1) in blocks of `grain`, all under the caller's
// floating-point mode (torch.set_flush_denormal is a thread's own). f must not throw.
template <class F>
void parallel_for(int64_t n, [[maybe_unused]] int64_t grain, [[maybe_unused]] int threads,
                  const F& f) {
  if (forked()) threads = 1;
  std::fenv_t mode;
  std::fegetenv(&mode);
#pragma omp parallel num_threads(threads) if (threads > 1 && n > grain)
  {
    std::fenv_t own;
    std::fegetenv(&own);
    std::fesetenv(&mode);
#pragma omp for schedule(dynamic, grain) nowait
    for (int64_t i = 0; i < n; ++i) f(i);
    std::fesetenv(&own);
  }
}

// For each tensor, one more than the latest wave of the earlier ones that it shares memory with; -1 for
// those that have no part. Views that interleave count as sharing. A tensor's extent is the addresses
// from its first element to the end of its last.
std::vector<int> waves_of(const std::vector<std::pair<uintptr_t, uintptr_t>>& extents,
                          const std::vector<int>& members);

// For each norm class the sum of abs(x)^order over the gradients of its active parameters; their
// maximum for infinity.
std::vector<double> reduce_grads(const std::vector<Param>& params, const Schedule& schedule,
                                 double order, int threads);

// Updates all active parameters. `table` has rows of `row_size` scalars.
void update(const std::vector<Param>& params, const Schedule& schedule,
            const std::vector<double>& table, int64_t row_size, int threads);

}  // namespace fastopt
