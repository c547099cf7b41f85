// Token ids from a NumPy file. Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
#ifndef ATP_CLI_NPY_H_
#define ATP_CLI_NPY_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/request.h"

namespace atp {

// Rows of an array [rows, tokens] (or [tokens]: one row) of int32, int64 or uint16, little-endian, C order.
// Every id must be in [0, vocab_size). InvalidArgument says what was expected and found.
absl::StatusOr<std::vector<std::vector<TokenId>>> ReadTokenIds(const std::string& path, int64_t vocab_size);
absl::StatusOr<std::vector<std::vector<TokenId>>> ParseTokenIds(std::string_view bytes,
                                                                const std::string& source,
                                                                int64_t vocab_size);

}  // namespace atp

#endif  // ATP_CLI_NPY_H_
