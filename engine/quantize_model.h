// A model's files with other weights: what `atp quantize` does.
#ifndef ATP_ENGINE_QUANTIZE_MODEL_H_
#define ATP_ENGINE_QUANTIZE_MODEL_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "kernels/dtype.h"

namespace atp {

// `in` is a GGUF file (or a directory with one): `out` becomes a GGUF file with the same metadata, tokenizer
// included. `in` is a Hugging Face directory: `out` becomes a directory of a GGUF file, model.gguf, without a
// tokenizer, and copies of the tokenizer's and generation's files, from which both come. Matrices become
// `dtype` as in LoadLlamaWeights(), norms and biases F32. InvalidArgument where `in` is broken,
// FailedPrecondition where `out` is there already or cannot be written.
absl::Status QuantizeModel(const std::string& in, const std::string& out, DType dtype,
                           const std::function<void(size_t done, size_t total)>& progress);

}  // namespace atp

#endif  // ATP_ENGINE_QUANTIZE_MODEL_H_
