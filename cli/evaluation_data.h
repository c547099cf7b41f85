// The token sequences that `atp eval` judges and `atp calibrate` measures on: from a text, or from a NumPy
// file.
#ifndef ATP_CLI_EVALUATION_DATA_H_
#define ATP_CLI_EVALUATION_DATA_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "cli/served_engine.h"
#include "engine/request.h"

namespace CLI {
class App;
}

namespace atp {

using TokenSequences = std::vector<std::vector<TokenId>>;

struct DataFlags {
  std::string text_file;
  std::string ids_file;
  int context = 0;  // tokens per sequence; 0: default_context, or the model's positions
  int default_context = 0;
  int64_t limit = 0;  // sequences; 0: all
};

// --text, --ids, --context, --limit.
void AddDataFlags(CLI::App* app, DataFlags* flags, int64_t default_limit, int default_context);
// One of text and ids must be given. `command` is for the message.
absl::Status CheckDataFlags(const DataFlags& flags, const std::string& command);

// flags.context, or its default; InvalidArgument where the model has fewer positions, or too few to predict
// anything.
absl::StatusOr<int> ContextTokens(const DataFlags& flags, const LoadedModel& loaded);
// Errors name the file.
absl::StatusOr<TokenSequences> LoadSequences(const DataFlags& flags, const LoadedModel& loaded, int context);

// Every `every`th sequence, or the first one that can where none of those can, keeps its first half, and
// repeats spans of it (8 to 64 tokens, from anywhere, at all distances) in place of the rest, so that
// predicting it needs recall. Deterministic. Sequences of less than 32 tokens stay as they are;
// InvalidArgument where those are all.
absl::Status RepeatSpans(size_t every, TokenSequences* sequences);

}  // namespace atp

#endif  // ATP_CLI_EVALUATION_DATA_H_
