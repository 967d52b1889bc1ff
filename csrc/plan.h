// One optimizer's step: which row of scalars each parameter takes, the norm, the update. Two calls a
// step: `begin` tells what rows are wanted, `step` gets them.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "watch.h"

namespace fastopt {

class Plan {
 public:
  // The index of a param group, and the number, counted from 1, of the step that some of its
  // parameters are about to make.
  using Cohort = std::pair<int, double>;

  // groups and state: what is watched of the optimizer. Each item stands for a parameter, in the order
  // of the groups: (index of its group in the optimizer, parameter, details). See Watch.
  Plan(py::list groups, py::dict state, const py::list& items);

  // Holds the gradients that are there now, and returns `wanted`; none if the plan is stale.
  std::optional<std::vector<Cohort>> begin(int threads);

  // What this step consists of: one row of scalars is wanted for each.
  const std::vector<Cohort>& wanted();

  // Changes when another set of parameters has gradients.
  int64_t pattern() const { return pattern_; }

  // For each parameter of a part other than 0, which is updated elsewhere, an int64: the address of
  // its gradient or kNoGrad; its row.
  py::bytes grads(int part) const;
  py::bytes row_of(int part) const;

  // For each norm class.
  std::vector<double> power_sums(double order, int threads) const;

  // Updates those of part 0; counts the steps of all cohorts; and increments the versions of all
  // parameters that this step writes, in whatever part. Clears `undo` once that is done, which an
  // interrupt could keep Python from.
  // rows: of doubles, one for each cohort; may be empty if part 0 is.
  // measures: takes the norm by which the gradients are clipped, if there is one norm class; else they
  //   are clipped by `norm`, if there is one.
  // finds_inf: a norm that is not finite changes nothing.
  // inv_scale: of the gradients, for the norm.
  // skips: nothing is to change, whatever the norm.
  // Returns the norm, NaN if there is none, and whether the step was skipped.
  std::pair<double, bool> step(const py::buffer& rows, bool measures, bool finds_inf,
                               std::optional<double> norm, double inv_scale, bool skips, int threads,
                               const py::list& undo);

 private:
  struct Item {
    int32_t group;
    int16_t repeat;  // how often the parameter stands earlier in the groups
    int16_t part;
    bool scalars_here;  // its step is counted here, and it belongs to a cohort
    bool fresh;         // it has no step to count, and its states are new
  };

  static constexpr int64_t kNoGrad = -1;  // as in kernels/launches.py

  template <class F>
  py::bytes words_of(int part, const F& word) const;
  void check_ready() const;
  void schedule();
  int cohort_of(size_t i);

  Watch watch_;
  std::vector<Item> items_;
  std::vector<Param> params_;  // one for each item
  int64_t pattern_ = 0;
  bool any_fresh_ = false;
  bool ready_ = true;  // the gradients are held
  Numbering<Cohort> cohorts_;
  std::vector<int> last_cohort_;  // of each group
  std::optional<Schedule> schedule_;
};

}  // namespace fastopt
