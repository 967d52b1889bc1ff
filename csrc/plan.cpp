#include "plan.h"

#include <pybind11/stl.h>

#include <cmath>
#include <limits>

namespace fastopt {

Plan::Plan(py::list groups, py::dict state, const py::list& items)
    : watch_(std::move(groups), std::move(state)) {
  for (py::handle handle : items) {
    const auto [group, param, details] =
        handle.cast<std::tuple<int, py::object, std::optional<py::object>>>();
    Item item{};
    item.group = group;
    if (last_cohort_.size() <= static_cast<size_t>(group)) last_cohort_.resize(group + 1);
    Param of_item;
    std::vector<Description> operands;
    if (details) {
      for (py::handle d : details->attr("operands")) operands.emplace_back(py::cast<py::tuple>(d));
      of_item = make_param(details->attr("rule").cast<int>(), operands);
      of_item.number = details->attr("number").cast<int>();
      const auto piece = details->attr("piece").cast<std::array<int64_t, 3>>();
      of_item.piece = {piece[0], piece[1], piece[2]};
      of_item.norm_class = details->attr("norm_class").cast<int>();
      if (details->attr("grad").is_none()) of_item.grad().data = nullptr;  // until there is one
      item.repeat = details->attr("repeat").cast<int16_t>();
      item.part = details->attr("part").cast<int16_t>();
      item.scalars_here = details->attr("scalars_here").cast<bool>();
      item.fresh = details->attr("fresh").cast<bool>();
      any_fresh_ |= item.fresh;
    }
    watch_.add(param, details, operands);
    items_.push_back(item);
    params_.push_back(std::move(of_item));
  }
  schedule();
}

std::optional<std::vector<Plan::Cohort>> Plan::begin(int threads) {
  ready_ = false;
  if (!watch_.holds(params_, threads)) return std::nullopt;
  if (!watch_.same_grads()) schedule();
  ready_ = true;
  return wanted();
}

void Plan::check_ready() const {
  if (!ready_) throw std::logic_error("a plan was used without its gradients");
}

void Plan::schedule() {
  for (size_t i = 0; i < items_.size(); ++i)
    params_[i].active = watch_.items()[i].has_grad && items_[i].part == 0;
  schedule_ = Schedule(params_);
  // Only now: without the memory for a schedule, the old one belongs to the old pattern.
  watch_.settle();
  ++pattern_;
}

int Plan::cohort_of(size_t i) {
  const Item& item = items_[i];
  const Watch::Item& watched = watch_.items()[i];
  const double step = watched.step ? watched.steps_made + 1.0 + item.repeat
                                   : (item.fresh && item.repeat == 0 ? 1.0 : 2.0);
  const Cohort wanted{item.group, step};
  int& last = last_cohort_[item.group];
  if (last < 0 || cohorts_.keys()[last] != wanted) last = cohorts_.number(wanted);
  return last;
}

const std::vector<Plan::Cohort>& Plan::wanted() {
  cohorts_.clear();
  std::fill(last_cohort_.begin(), last_cohort_.end(), -1);
  for (size_t i = 0; i < items_.size(); ++i)
    if (watch_.items()[i].has_grad && items_[i].scalars_here) params_[i].row = cohort_of(i);
  return cohorts_.keys();
}

template <class F>
py::bytes Plan::words_of(int part, const F& word) const {
  std::string words;
  for (size_t i = 0; i < items_.size(); ++i) {
    if (!watch_.items()[i].updated || items_[i].part != part) continue;
    const int64_t w = word(i);
    words.append(reinterpret_cast<const char*>(&w), sizeof w);
  }
  return words;
}

py::bytes Plan::grads(int part) const {
  return words_of(part, [this](size_t i) {
    return watch_.items()[i].has_grad ? reinterpret_cast<int64_t>(params_[i].grad().data) : kNoGrad;
  });
}

py::bytes Plan::row_of(int part) const {
  return words_of(part, [this](size_t i) { return int64_t{params_[i].row}; });
}

std::vector<double> Plan::power_sums(double order, int threads) const {
  check_ready();
  py::gil_scoped_release release;
  return reduce_grads(params_, *schedule_, order, threads);
}

std::pair<double, bool> Plan::step(const py::buffer& rows, bool measures, bool finds_inf,
                                   std::optional<double> norm, double inv_scale, bool skips,
                                   int threads, const py::list& undo) {
  check_ready();
  const size_t n_rows = cohorts_.keys().size();
  std::vector<double> table = doubles(rows);
  const size_t row_size = n_rows ? table.size() / n_rows : 0;
  {
    py::gil_scoped_release release;
    if (measures) {
      norm = std::sqrt(reduce_grads(params_, *schedule_, 2, threads).front()) * inv_scale;
      skips |= finds_inf && !std::isfinite(*norm);
    }
    if (norm && row_size)
      for (size_t r = 0; r < n_rows; ++r) {
        double* row = table.data() + r * row_size;
        row[kCoef] = row[kUnclippedCoef] * clip_coef(*norm, row[kMaxNorm]);
      }
    if (!skips) update(params_, *schedule_, table, row_size, threads);
  }
  if (!skips) {
    watch_.count(threads);
    // All of them had a gradient, for which their states were made.
    if (any_fresh_)
      for (Item& item : items_) item.fresh = false;
    any_fresh_ = false;
    PyList_Type.tp_clear(undo.ptr());  // needs no memory
  }
  ready_ = false;
  watch_.release();
  if (!skips && !versions_known()) watch_.increment_versions();
  return {norm.value_or(std::numeric_limits<double>::quiet_NaN()), skips};
}

}  // namespace fastopt
