// The safetensors format (https://github.com/huggingface/safetensors#format), parsed from bytes that may be
// hostile:
//   8 bytes   little-endian length N of the header
//   N bytes   JSON: {"<tensor>": {"dtype": …, "shape": […], "data_offsets": [begin, end]}, …, "__metadata__":
//   {…}} the rest  tensor data, which the tensors cover exactly: no gap, no overlap
// Nothing here opens a file, and nothing is allocated beyond a small multiple of the header itself.
#ifndef ATP_ENGINE_SAFETENSORS_HEADER_H_
#define ATP_ENGINE_SAFETENSORS_HEADER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace atp {

inline constexpr size_t kMaxSafetensorsHeaderBytes = 100'000'000;
inline constexpr size_t kMaxSafetensorsRank = 8;

struct SafetensorsTensor {
  std::string file;                 // for errors
  std::string dtype;                // as in the file, one that is known: "BF16"
  std::vector<int64_t> shape;       // row-major; empty for a scalar
  std::span<const std::byte> data;  // into the bytes that were parsed
};

using SafetensorsTensors = std::map<std::string, SafetensorsTensor, std::less<>>;

// `file` is the whole file and outlives the result; `source` names it in errors. InvalidArgument is one line:
// file, tensor, expected, found.
absl::StatusOr<SafetensorsTensors> ParseSafetensors(std::span<const std::byte> file,
                                                    const std::string& source);

// model.safetensors.index.json: tensor name -> shard, where a shard is the plain name of a file beside the
// index.
using SafetensorsIndex = std::map<std::string, std::string, std::less<>>;
absl::StatusOr<SafetensorsIndex> ParseSafetensorsIndex(std::string_view json, const std::string& source);

// A name from a file, fit for a one-line message: quoted, escaped, cut where it is too long.
std::string QuoteForError(std::string_view name);

}  // namespace atp

#endif  // ATP_ENGINE_SAFETENSORS_HEADER_H_
