// atp quantize: a model's files with other weights, once and for all what --weight-dtype does at each load.
#include <memory>
#include <string>

#include "CLI/CLI.hpp"
#include "cli/command.h"
#include "cli/load_progress.h"
#include "cli/logging.h"
#include "engine/llama_weights.h"
#include "engine/quantize_model.h"

namespace atp {
namespace {

struct QuantizeFlags {
  std::string in;
  std::string out;
  std::string weight_dtype;
};

int Quantize(const QuantizeFlags& flags) {
  SetUpLogging("info");  // on stderr, as every command's
  LoadProgressBar bar(flags.in);
  const absl::Status status = QuantizeModel(flags.in, flags.out, *WeightDTypeFromName(flags.weight_dtype),
                                            [&bar](size_t done, size_t total) { bar.Update(done, total); });
  return status.ok() ? 0 : Failure(status);
}

}  // namespace

void AddQuantize(CLI::App* app, int* exit_code) {
  CLI::App* const quantize =
      app->add_subcommand("quantize", "Write a model with weights of fewer bits, which loads at once");
  auto flags = std::make_shared<QuantizeFlags>();
  quantize->add_option("IN", flags->in, "model directory in Hugging Face layout, or GGUF file")->required();
  quantize
      ->add_option(
          "OUT", flags->out,
          "new GGUF file where IN is one; else a new directory of model.gguf and the tokenizer's files")
      ->required();
  quantize
      ->add_option(
          "--weight-dtype", flags->weight_dtype,
          "f32, bf16, q8 (8 bits and a scale per 32 elements) or q4 (4 bits and a scale per 32 elements)")
      ->option_text("DTYPE")
      ->required()
      ->check(CLI::IsMember({"f32", "bf16", "q8", "q4"}));
  quantize->callback([flags, exit_code] { *exit_code = Quantize(*flags); });
}

}  // namespace atp
