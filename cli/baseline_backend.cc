#include "cli/baseline_backend.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/reference/principal_fit.h"

namespace atp {
namespace {

// How much of the references' attention each entry gets, summed.
std::vector<double> AttentionMass(const PrincipalFitProblem& p) {
  std::vector<double> mass(static_cast<size_t>(p.n)), row(static_cast<size_t>(p.n));
  for (int q = 0; q < p.m; ++q) {
    for (int i = 0; i < p.n; ++i) {
      double score = p.log_mass != nullptr ? p.log_mass[i] : 0.0;
      for (int c = 0; c < p.d; ++c) score += double{p.queries[q * p.d + c]} * p.keys[i * p.d + c];
      row[static_cast<size_t>(i)] = score;
    }
    const double top = *std::max_element(row.begin(), row.end());
    double sum = 0;
    for (double& value : row) sum += value = std::exp(value - top);
    for (size_t i = 0; i < row.size(); ++i) mass[i] += row[i] / sum;
  }
  return mass;
}

// The selection of the real fit; what it fits goes nowhere.
std::vector<int32_t> Pivots(const PrincipalFitProblem& p) {
  const auto r = static_cast<size_t>(p.count), d = static_cast<size_t>(p.d);
  std::vector<float> keys(r * d), values(r * d), log_mass(r);
  std::vector<int32_t> chosen(r);
  PrincipalFit fit;
  fit.keys = keys.data();
  fit.values = values.data();
  fit.log_mass = log_mass.data();
  fit.chosen = chosen.data();
  ReferenceFitPrincipal(p, &fit);
  return chosen;
}

}  // namespace

std::string_view Name(Baseline baseline) {
  switch (baseline) {
    case Baseline::kNone:
      return "none";
    case Baseline::kRecent:
      return "recent";
    case Baseline::kAttention:
      return "attention";
    case Baseline::kUnfitted:
      return "unfitted";
  }
  return "";
}

std::optional<Baseline> BaselineFromName(std::string_view name) {
  for (const Baseline b : {Baseline::kNone, Baseline::kRecent, Baseline::kAttention, Baseline::kUnfitted}) {
    if (Name(b) == name) return b;
  }
  return std::nullopt;
}

std::vector<int32_t> ChooseEntries(Baseline baseline, const PrincipalFitProblem& p) {
  std::vector<int32_t> order(static_cast<size_t>(p.n));
  std::iota(order.begin(), order.end(), 0);
  if (p.count >= p.n) return order;
  if (baseline == Baseline::kUnfitted || baseline == Baseline::kNone) return Pivots(p);
  const auto behind_sinks = order.begin() + p.forced;
  if (baseline == Baseline::kRecent) {
    std::reverse(behind_sinks, order.end());
  } else {
    const std::vector<double> mass = AttentionMass(p);
    std::stable_sort(behind_sinks, order.end(), [&mass](int32_t a, int32_t b) {
      return mass[static_cast<size_t>(a)] > mass[static_cast<size_t>(b)];
    });
  }
  order.resize(static_cast<size_t>(p.count));
  std::sort(order.begin(), order.end());
  return order;
}

void BaselineBackend::FitPrincipalKeys(const FitPrincipalKeysArgs& args) {
  if (baseline_ == Baseline::kNone) return inner_->FitPrincipalKeys(args);
  for (size_t j = 0; j < args.jobs.size(); ++j) {
    segment_.Gather(args, args.jobs[j]);
    const PrincipalFitProblem& p = segment_.problem();
    PrincipalFit* const fit = segment_.fit();
    const std::vector<int32_t> chosen = ChooseEntries(baseline_, p);
    for (size_t i = 0; i < chosen.size(); ++i) {
      const int from = chosen[i];
      std::copy_n(p.keys + static_cast<ptrdiff_t>(from) * p.d, p.d, fit->keys + i * static_cast<size_t>(p.d));
      std::copy_n(p.values + static_cast<ptrdiff_t>(from) * p.d, p.d,
                  fit->values + i * static_cast<size_t>(p.d));
      fit->log_mass[i] = p.log_mass != nullptr ? p.log_mass[from] : 0.0f;
      fit->chosen[i] = from;
    }
    segment_.Scatter(args, args.jobs[j]);
    args.reports[j] = segment_.report();
  }
}

}  // namespace atp
