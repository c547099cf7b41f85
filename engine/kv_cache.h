// The bytes of the KV cache: one pool of equal blocks on the device. Knows no sequence and no token.
#ifndef ATP_ENGINE_KV_CACHE_H_
#define ATP_ENGINE_KV_CACHE_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine/block_table.h"
#include "engine/llama_config.h"
#include "kernels/backend.h"

namespace atp {

class KvCache {
 public:
  struct Shape {
    int layers = 0;
    int kv_heads = 0;
    int head_dim = 0;
    int block_tokens = 16;  // a multiple of 16
    KvFormat format = KvFormat::kF32;
    bool compressible = false;  // some sequences may hold principal entries
    // Of a compressible cache: at least, what its pages need (CompressedBlockBytes). 0: those of 16 bits. As
    // many as an exact page: principal entries take what room there is (PrincipalPageWithin).
    size_t block_bytes = 0;

    int heads_total() const { return layers * kv_heads; }  // blocks per block_tokens exact tokens
  };

  // Allocates as many blocks as fit into `memory_bytes`. InvalidArgument, with the numbers and the setting to
  // change, when that is less than one block for every head.
  static absl::StatusOr<KvCache> Create(Backend* backend, const Shape& shape, size_t memory_bytes);

  const Shape& shape() const { return shape_; }
  int64_t num_blocks() const { return num_blocks_; }
  // All blocks are of one size, whatever they hold.
  size_t block_bytes() const { return block_bytes_; }
  // Exact tokens that the whole pool holds.
  int64_t token_capacity() const { return num_blocks_ / shape_.heads_total() * shape_.block_tokens; }
  // As block tables address it: in parts of a block.
  KvPool pool() const { return {memory_.data(), block_bytes_ / kBlockParts, &page_}; }
  // How the queries of a segment that will be compressed are kept until it closes.
  const QueryPage& query_page() const { return query_page_; }

 private:
  explicit KvCache(const Shape& shape);

  Shape shape_;
  KvPage page_;
  size_t block_bytes_;
  QueryPage query_page_;
  Buffer memory_;
  int64_t num_blocks_ = 0;
};

}  // namespace atp

#endif  // ATP_ENGINE_KV_CACHE_H_
