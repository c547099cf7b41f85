#include "engine/compression_budgets.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace atp {
namespace {

constexpr double kPower = 1.5;  // p
constexpr double kIdle = 1e-7;  // added to sensitivities, so that heads measured as 0 share alike
constexpr size_t kMaxFileBytes = 16 << 20;

double Mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

absl::Status Wrong(const std::string& source, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", what));
}

// "a number in [0, 1]" and the like, where `value` is not one; else empty.
std::string WrongRange(std::string_view key, double value) {
  if (key == "bits") return value == 16 || value == 8 || value == 4 ? "" : "16, 8 or 4";
  if (key == "ratio" ? value >= 0 && value <= 1 : value >= 0 && std::isfinite(value)) return "";
  return key == "ratio" ? "a number in [0, 1]" : "a number that is not negative";
}

absl::StatusOr<std::vector<double>> ParseTable(const nlohmann::json& table, std::string_view key,
                                               const std::string& source, int layers, int kv_heads) {
  const auto size = [](const nlohmann::json& j) {
    return j.is_array() ? absl::StrCat("an array of ", j.size()) : std::string(j.type_name());
  };
  if (!table.is_array() || table.size() != static_cast<size_t>(layers)) {
    return Wrong(source, absl::StrCat(std::string(key), ": expected an array of ", layers, " layers, found ",
                                      size(table)));
  }
  std::vector<double> values;
  for (size_t l = 0; l < table.size(); ++l) {
    if (!table[l].is_array() || table[l].size() != static_cast<size_t>(kv_heads)) {
      return Wrong(source, absl::StrCat(std::string(key), "[", l, "]: expected an array of ", kv_heads,
                                        " kv heads, found ", size(table[l])));
    }
    for (size_t h = 0; h < table[l].size(); ++h) {
      const nlohmann::json& value = table[l][h];
      const std::string wanted = WrongRange(key, value.is_number() ? value.get<double>() : -1.0);
      if (!wanted.empty()) {
        return Wrong(source, absl::StrCat(std::string(key), "[", l, "][", h, "]: expected ", wanted,
                                          ", found ", value.is_primitive() ? value.dump() : size(value)));
      }
      values.push_back(value.get<double>());
    }
  }
  return values;
}

constexpr std::string_view kNone = "sensitivity_none";

// The optional tables of the file, by key.
struct OptionalTable {
  std::string_view key;
  std::vector<double> CompressionBudgets::*values;
};
constexpr OptionalTable kSensitivities[] = {
    {"sensitivity", &CompressionBudgets::sensitivity},
    {"sensitivity_half", &CompressionBudgets::sensitivity_half},
    {"sensitivity_quarter", &CompressionBudgets::sensitivity_quarter},
    {"sensitivity_eighth", &CompressionBudgets::sensitivity_eighth},
    {"sensitivity_4_bits", &CompressionBudgets::sensitivity_4_bits},
    {kNone, &CompressionBudgets::sensitivity_none},
};

template <class T>
nlohmann::ordered_json Table(const std::vector<T>& values, int kv_heads) {
  nlohmann::ordered_json table = nlohmann::ordered_json::array();
  for (size_t i = 0; i < values.size(); i += static_cast<size_t>(kv_heads)) {
    table.push_back(std::vector<T>(values.begin() + static_cast<ptrdiff_t>(i),
                                   values.begin() + static_cast<ptrdiff_t>(i) + kv_heads));
  }
  return table;
}

absl::Status CheckKeys(const nlohmann::json& file, const std::string& source) {
  std::string known = "ratio, bits";
  for (const OptionalTable& table : kSensitivities) absl::StrAppend(&known, ", ", std::string(table.key));
  for (const auto& [key, value] : file.items()) {
    const std::string& name = key;  // a structured binding cannot be captured
    if (name == "ratio" || name == "bits" ||
        std::any_of(std::begin(kSensitivities), std::end(kSensitivities),
                    [&name](const OptionalTable& table) { return table.key == name; }))
      continue;
    return Wrong(source,
                 absl::StrCat(nlohmann::json(name).dump(-1, ' ', true), ": no such key; there are ", known));
  }
  if (!file.contains("ratio")) return Wrong(source, "ratio: missing");
  const auto is_curve = [](const OptionalTable& table) { return table.key != "sensitivity"; };
  const auto missing = [&](const OptionalTable& table) {
    return table.key != kNone && !file.contains(std::string(table.key));
  };
  const auto* first_missing = std::find_if(std::begin(kSensitivities), std::end(kSensitivities), missing);
  const bool curves =
      std::any_of(std::begin(kSensitivities), std::end(kSensitivities),
                  [&](const OptionalTable& t) { return is_curve(t) && file.contains(std::string(t.key)); });
  if (curves && first_missing != std::end(kSensitivities))
    return Wrong(source,
                 absl::StrCat(std::string(first_missing->key), ": missing beside the other sensitivities"));
  return absl::OkStatus();
}

}  // namespace

double CompressionBudgets::MeanRatio() const { return Mean(ratio); }

std::vector<double> ShareBudget(std::span<const double> sensitivity, double mean_ratio, double least) {
  std::vector<double> ratio(sensitivity.size());
  // Bisection of the factor, in its logarithm.
  double low = 1e-9, high = 1e9;
  for (int i = 0; i < 200; ++i) {
    const double factor = std::sqrt(low * high);
    std::transform(sensitivity.begin(), sensitivity.end(), ratio.begin(), [factor, least](double s) {
      return std::clamp(factor * std::pow(s + kIdle, 1 / (kPower + 1)), least, 1.0);
    });
    (Mean(ratio) > mean_ratio ? high : low) = factor;
  }
  return ratio;
}

std::vector<double> RoundToBlocks(std::span<const double> ratio, int segment_tokens, int block_entries) {
  const std::vector<double> same(ratio.begin(), ratio.end());
  if (segment_tokens % block_entries != 0) return same;
  const int most = segment_tokens / block_entries;  // blocks
  const double blocks_per_ratio = static_cast<double>(segment_tokens) / block_entries;
  // The sum in blocks is rounded down, but not for a rounding error of the sum.
  const auto total = static_cast<int64_t>(
      std::floor(std::accumulate(ratio.begin(), ratio.end(), 0.0) * blocks_per_ratio + 1e-6));
  std::vector<int> blocks;
  std::vector<size_t> order(ratio.size());
  std::iota(order.begin(), order.end(), size_t{0});
  for (const double r : ratio) blocks.push_back(std::clamp(static_cast<int>(r * blocks_per_ratio), 1, most));
  int64_t left = total - std::accumulate(blocks.begin(), blocks.end(), int64_t{0});
  // What is farthest above its blocks gets one more; while there are too many, what is farthest below gives
  // one.
  const auto excess = [&](size_t i) { return ratio[i] * blocks_per_ratio - blocks[i]; };
  for (; left != 0; left += left > 0 ? -1 : 1) {
    const auto may = [&](size_t i) { return left > 0 ? blocks[i] < most : blocks[i] > 1; };
    const auto better = [&](size_t a, size_t b) {
      if (may(a) != may(b)) return may(a);
      return left > 0 ? excess(a) > excess(b) : excess(a) < excess(b);
    };
    const size_t best = *std::min_element(order.begin(), order.end(), better);
    if (!may(best)) return same;
    blocks[best] += left > 0 ? 1 : -1;
  }
  std::vector<double> rounded;
  for (const int b : blocks) rounded.push_back(b / blocks_per_ratio);
  return rounded;
}

absl::StatusOr<CompressionBudgets> ParseCompressionBudgets(std::string_view json, const std::string& source,
                                                           int layers, int kv_heads) {
  const nlohmann::json file = nlohmann::json::parse(json.begin(), json.end(), nullptr, /*exceptions=*/false);
  if (file.is_discarded()) return Wrong(source, "not JSON");
  if (!file.is_object()) {
    return Wrong(source, absl::StrCat("expected an object with ratio, bits and sensitivity, found ",
                                      std::string(file.type_name())));
  }
  if (absl::Status s = CheckKeys(file, source); !s.ok()) return s;
  CompressionBudgets budgets;
  budgets.layers = layers;
  budgets.kv_heads = kv_heads;
  absl::StatusOr<std::vector<double>> ratio = ParseTable(file["ratio"], "ratio", source, layers, kv_heads);
  if (!ratio.ok()) return ratio.status();
  budgets.ratio = *std::move(ratio);
  if (Mean(budgets.ratio) == 0)
    return Wrong(source, "ratio: 0 for all heads; at least one must keep entries");
  if (file.contains("bits")) {
    absl::StatusOr<std::vector<double>> bits = ParseTable(file["bits"], "bits", source, layers, kv_heads);
    if (!bits.ok()) return bits.status();
    budgets.bits.assign(bits->begin(), bits->end());
  }
  for (const OptionalTable& table : kSensitivities) {
    const std::string key(table.key);
    if (!file.contains(key)) continue;
    absl::StatusOr<std::vector<double>> values = ParseTable(file[key], key, source, layers, kv_heads);
    if (!values.ok()) return values.status();
    budgets.*table.values = *std::move(values);
  }
  return budgets;
}

absl::StatusOr<CompressionBudgets> LoadCompressionBudgets(const std::string& path, int layers, int kv_heads) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::string text;
  char buffer[1 << 16];
  while (file.read(buffer, sizeof(buffer)) || file.gcount() > 0) {
    text.append(buffer, static_cast<size_t>(file.gcount()));
    if (text.size() > kMaxFileBytes) return Wrong(path, absl::StrCat("more than ", kMaxFileBytes, " bytes"));
  }
  if (file.bad()) return Wrong(path, "cannot be read");
  return ParseCompressionBudgets(text, path, layers, kv_heads);
}

absl::Status SaveCompressionBudgets(const CompressionBudgets& budgets, const std::string& path) {
  nlohmann::ordered_json json = {{"ratio", Table(budgets.ratio, budgets.kv_heads)}};
  if (!budgets.bits.empty()) json["bits"] = Table(budgets.bits, budgets.kv_heads);
  for (const OptionalTable& table : kSensitivities) {
    const std::vector<double>& values = budgets.*table.values;
    if (!values.empty()) json[std::string(table.key)] = Table(values, budgets.kv_heads);
  }
  const std::string draft = path + ".tmp";
  {
    std::ofstream file(draft, std::ios::binary | std::ios::trunc);
    file << json.dump() << "\n";
    file.close();
    if (!file) return absl::PermissionDeniedError(absl::StrCat(draft, ": cannot be written"));
  }
  if (std::rename(draft.c_str(), path.c_str()) != 0) {
    std::remove(draft.c_str());
    return absl::PermissionDeniedError(absl::StrCat(path, ": cannot be written"));
  }
  return absl::OkStatus();
}

}  // namespace atp
