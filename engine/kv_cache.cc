#include "engine/kv_cache.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/compression_plan.h"

namespace atp {

absl::StatusOr<KvCache> KvCache::Create(Backend* backend, const Shape& shape, size_t memory_bytes) {
  if (shape.block_tokens <= 0 || shape.block_tokens % 16 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kv_cache.block_tokens: expected a positive multiple of 16, found ", shape.block_tokens));
  }
  OpDesc desc;
  desc.kv_format = shape.format;
  desc.head_dim = shape.head_dim;
  desc.block_entries = shape.block_tokens;
  if (!backend->Supports(desc)) {
    return absl::UnimplementedError(
        absl::StrCat("the backend (", backend->Description(), ") has no KV cache of format ",
                     std::string(Name(shape.format)), " with head_dim ", shape.head_dim, " and blocks of ",
                     shape.block_tokens, " tokens; set kv_cache.dtype or block_tokens"));
  }
  KvCache cache(shape);
  const size_t block_bytes = cache.block_bytes_;
  const size_t heads = static_cast<size_t>(shape.heads_total());
  const size_t wanted = memory_bytes / block_bytes;
  if (wanted < heads) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kv_cache.memory_bytes: expected at least ", heads * block_bytes, " (one block of ", block_bytes,
        " bytes for each of ", heads, " heads), found ", memory_bytes, "; raise kv_cache.memory_bytes"));
  }
  const size_t num_blocks = std::min<size_t>(wanted, std::numeric_limits<BlockId>::max() / kBlockParts);
  absl::StatusOr<Buffer> memory = backend->Allocate(num_blocks * block_bytes);
  if (!memory.ok()) {
    return absl::Status(memory.status().code(), absl::StrCat("kv cache: ", memory.status().message(),
                                                             "; lower kv_cache.memory_bytes"));
  }
  // A block of principal entries may have up to kBlockParts pages, but those with more than one are few.
  StepLimits limits;
  limits.blocks = static_cast<int64_t>(num_blocks) * (shape.compressible ? 2 : 1);
  if (absl::Status reserved = backend->Reserve(limits); !reserved.ok()) {
    return absl::Status(reserved.code(), absl::StrCat("block tables of the kv cache: ", reserved.message(),
                                                      "; lower kv_cache.memory_bytes"));
  }
  cache.memory_ = *std::move(memory);
  cache.num_blocks_ = static_cast<int64_t>(num_blocks);
  return cache;
}

KvCache::KvCache(const Shape& shape)
    : shape_(shape),
      page_(shape.format, shape.block_tokens, shape.head_dim, /*with_log_mass=*/false),
      block_bytes_(page_.bytes()),
      query_page_(page_.bytes(), kPrincipalSamples, shape.head_dim) {
  if (!shape.compressible) return;
  const size_t wanted = shape.block_bytes > 0
                            ? shape.block_bytes
                            : PrincipalPage(shape.format, shape.block_tokens, shape.head_dim, 16).bytes();
  block_bytes_ = std::max(block_bytes_, wanted);
}

}  // namespace atp
