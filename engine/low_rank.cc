#include "engine/low_rank.h"

#include <cstdio>

#include "absl/strings/str_cat.h"

namespace atp {
namespace {

// It must be clearly faster: a result is given up for it.
constexpr double kWorthwhile = 0.9;
// Orthonormalising goes column by column on one thread, in vectors: a multiply-add takes as long as so many
// of a product's.
constexpr double kSerial = 6;
// A product of activations first puts one factor in order: the time of so many multiply-adds per element.
constexpr double kPack = 12;

// Multiply-adds of fp32 products, or the time of as many: n rows, inputs of `in`, outputs of `out` in all,
// rank r.
double Exact(double n, double in, double out, double speed) { return n * in * out / speed; }

double LowRank(double n, double in, double out, double r, double speed) {
  const double inner = r + 1;
  const double decomposition = 4 * n * r * in + kSerial * 2 * n * r * r;
  const double packing = kPack * (4 * n * in + inner * out);
  return decomposition + packing + inner * in * out / speed + n * inner * out;
}

}  // namespace

LinearLayersChoice ChooseLinearLayers(const LlamaConfig& model, double matmul_speed, double linear_rank,
                                      int segment_tokens) {
  LinearLayersChoice choice;
  if (matmul_speed <= 0) {
    choice.reasons = "not taken: this device has no low-rank linear layers";
    return choice;
  }
  const double heads = static_cast<double>(model.heads + 2 * model.kv_heads);
  const auto hidden = static_cast<double>(model.hidden_size);
  const auto intermediate = static_cast<double>(model.intermediate_size);
  const struct {
    const char* name;
    LinearLayers layers;
    double in, out;
  } groups[] = {{"q/k/v", kQueryKeyValue, hidden, heads * model.head_dim},
                {"gate/up", kGateUp, hidden, 2 * intermediate},
                {"down", kDown, intermediate, hidden}};
  std::string taken, others;
  for (const auto& group : groups) {
    const double n = segment_tokens;
    const double time = LowRank(n, group.in, group.out, n * linear_rank, matmul_speed) /
                        Exact(n, group.in, group.out, matmul_speed);
    const bool worth = time < kWorthwhile;
    if (worth) choice.layers |= group.layers;
    char number[32];
    std::snprintf(number, sizeof number, " (%.2f of the time)", time);
    std::string* const list = worth ? &taken : &others;
    absl::StrAppend(list, list->empty() ? "" : ", ", group.name, number);
  }
  if (!taken.empty()) choice.reasons = "taken for " + taken;
  if (!others.empty()) absl::StrAppend(&choice.reasons, taken.empty() ? "" : "; ", "not for ", others);
  return choice;
}

}  // namespace atp
