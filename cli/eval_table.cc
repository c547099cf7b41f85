#include "cli/eval_table.h"

#include <cmath>
#include <cstdio>
#include <numeric>

#include "nlohmann/json.hpp"

namespace atp {
namespace {

using nlohmann::ordered_json;

std::string Method(const EvalRow& row) {
  if (row.plan == nullptr) return "exact";
  return row.method == Baseline::kNone ? "atp" : std::string(Name(row.method));
}

template <class T>
double MeanOr(const std::vector<T>& values, double otherwise) {
  if (values.empty()) return otherwise;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double Share(int64_t part, int64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

Recall AllDistances(const Score& score) {
  Recall all;
  for (const Recall& recall : score.recall) all.right += recall.right, all.tokens += recall.tokens;
  return all;
}

ordered_json RecallJson(const Score& score) {
  ordered_json buckets = ordered_json::array();
  for (size_t i = 0; i < score.recall.size(); ++i) {
    const Recall& recall = score.recall[i];
    if (recall.tokens == 0) continue;
    buckets.push_back({{"distance", int64_t{1} << i},
                       {"accuracy", Share(recall.right, recall.tokens)},
                       {"tokens", recall.tokens}});
  }
  return buckets;
}

void PrintRecall(const std::vector<EvalRow>& rows) {
  const Score& first = rows.front().score;
  if (AllDistances(first).tokens == 0) return;
  std::printf("\nrecall by distance in tokens\n%-9s  %-4s  %-4s  %-7s  %-8s", "method", "kv", "bits", "ratio",
              "all");
  for (size_t i = 0; i < first.recall.size(); ++i) {
    if (first.recall[i].tokens > 0) std::printf("  %4lld..%-6lld", 1LL << i, (2LL << i) - 1);
  }
  std::printf("\n");
  for (const EvalRow& row : rows) {
    const ordered_json j = EvalJson(row);
    std::printf("%-9s  %-4s  %-4.3g  %-7.4g  %-8.4f", Method(row).c_str(), row.kv_dtype.c_str(),
                j["bits"].get<double>(), j["ratio"].get<double>(), j["recall"].get<double>());
    for (const Recall& recall : row.score.recall) {
      if (recall.tokens > 0) std::printf("  %-12.4f", Share(recall.right, recall.tokens));
    }
    std::printf("\n");
  }
}

}  // namespace

ordered_json EvalJson(const EvalRow& row) {
  const auto tokens = static_cast<double>(row.score.tokens);
  const bool exact = row.plan == nullptr;
  const Recall recall = AllDistances(row.score);
  return {{"method", Method(row)},
          {"kv_dtype", row.kv_dtype},
          {"ratio", exact ? 1 : MeanOr(row.settings.head_ratio, row.settings.ratio)},
          {"segment", exact ? 0 : row.settings.segment_tokens},
          {"window", exact ? 0 : row.settings.window_tokens},
          {"cap", exact ? 0 : row.settings.max_principal_keys},
          {"per_head", !exact && !row.settings.head_ratio.empty()},
          {"bits", exact ? 16 : MeanOr(row.settings.head_bits, row.settings.bits)},
          {"kv_bytes_ratio", row.kv_bytes_ratio},
          {"bf16_bytes_ratio", row.bf16_bytes_ratio},
          {"kv_held_ratio",
           static_cast<double>(row.score.held_bytes) / static_cast<double>(row.score.exact_bytes)},
          {"cross_entropy", row.score.CrossEntropy()},
          {"perplexity", std::exp(row.score.CrossEntropy())},
          {"kl", row.score.Kl()},
          {"agreement", static_cast<double>(row.score.agree) / tokens},
          {"accuracy", static_cast<double>(row.score.right) / tokens},
          {"tokens", row.score.tokens},
          {"recall", Share(recall.right, recall.tokens)},
          {"recall_tokens", recall.tokens},
          {"recall_by_distance", RecallJson(row.score)}};
}

void PrintEvalTable(const std::vector<EvalRow>& rows) {
  std::printf(
      "method     kv    bits  ratio    segment  window  cap   kv_bytes  held    cross_entropy  perplexity  "
      "kl        agreement  accuracy  tokens\n");
  for (const EvalRow& row : rows) {
    const ordered_json j = EvalJson(row);
    std::printf(
        "%-9s  %-4s  %-4.3g  %-7.4g  %-7d  %-6d  %-4d  %-8.4f  %-6.4f  %-13.4f  %-10.4f  %-8.2e  %-9.4f  "
        "%-8.4f  %lld\n",
        Method(row).c_str(), row.kv_dtype.c_str(), j["bits"].get<double>(), j["ratio"].get<double>(),
        j["segment"].get<int>(), j["window"].get<int>(), j["cap"].get<int>(), row.kv_bytes_ratio,
        j["kv_held_ratio"].get<double>(), row.score.CrossEntropy(), std::exp(row.score.CrossEntropy()),
        row.score.Kl(), j["agreement"].get<double>(), j["accuracy"].get<double>(),
        static_cast<long long>(row.score.tokens));
  }
  PrintRecall(rows);
}

}  // namespace atp
