// A model's files with other weights: what `atp quantize` does.
#ifndef ATP_ENGINE_QUANTIZE_MODEL_H_
#define ATP_ENGINE_QUANTIZE_MODEL_H_

#include <functional>
#include <string>

#include "absl/status/status.h"
#include "kernels/dtype.h"

namespace atp {

// `in` is a GGUF file: `out` becomes one with the same metadata, tokenizer included. `in` is a directory, of
// Hugging Face or with one GGUF file: `out` becomes a directory of a GGUF file, model.gguf, and copies of the
// tokenizer's and generation's files. Compression budgets beside `in` go along. Matrices become `dtype` as in
// LoadLlamaWeights(), norms and biases F32. InvalidArgument where `in` is broken, FailedPrecondition where
// `out` is there already or cannot be written.
absl::Status QuantizeModel(const std::string& in, const std::string& out, DType dtype,
                           const std::function<void(size_t done, size_t total)>& progress);

}  // namespace atp

#endif  // ATP_ENGINE_QUANTIZE_MODEL_H_
