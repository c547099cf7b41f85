// Tables of a step (row indices, positions, block ids) on their way to the device, and what ops report on its
// way back, through pinned memory.
// Nothing here waits for the device as long as a step's tables fit; the first steps grow it.
#ifndef ATP_KERNELS_CUDA_STAGING_H_
#define ATP_KERNELS_CUDA_STAGING_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace atp::cuda {

// Device memory that an op uses while it runs; the next op on the stream may use it again. Grows to the
// largest op seen, then stays.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace();

  // Once per op: a second call may move it. 256-byte aligned; null, with *error set, when the device has no
  // more.
  void* Reserve(size_t bytes, cudaStream_t stream, cudaError_t* error);

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

class Staging {
 public:
  Staging() = default;
  Staging(const Staging&) = delete;
  Staging& operator=(const Staging&) = delete;
  ~Staging();

  // Room for `bytes` of a table: fill `host`, then Send(). Both are 256-byte aligned.
  struct Table {
    std::byte* host = nullptr;
    std::byte* device = nullptr;
    size_t bytes = 0;
  };
  Table Take(size_t bytes, cudaError_t* error);
  cudaError_t Send(const Table& table, cudaStream_t stream) const;

  // Take, copy and Send; the device address, or null with *error set.
  template <class T>
  const T* Upload(std::span<const T> values, cudaStream_t stream, cudaError_t* error) {
    const Table table = Take(values.size_bytes(), error);
    if (table.host == nullptr) return nullptr;
    if (!values.empty()) std::memcpy(table.host, values.data(), values.size_bytes());
    *error = Send(table, stream);
    return *error == cudaSuccess ? reinterpret_cast<const T*>(table.device) : nullptr;
  }

  // Bytes for the host's `to`, which has them after Reset(): a copy to memory that is not pinned would wait.
  cudaError_t Receive(void* to, const void* device, size_t bytes, cudaStream_t stream);

  // The device has done all that was sent: its room may be used again, all tables are gone.
  void Reset();

 private:
  struct Chunk {
    std::byte* host;  // pinned
    std::byte* device;
    size_t bytes;
  };
  struct Received {
    void* to;
    const std::byte* pinned;
    size_t bytes;
  };
  cudaError_t Grow(size_t bytes);
  void Free();

  std::vector<Chunk> chunks_;  // tables are taken from the last; one, once the largest step has been seen
  size_t used_ = 0;            // of the last
  std::vector<Received> received_;  // since the last Reset()
};

}  // namespace atp::cuda

#endif  // ATP_KERNELS_CUDA_STAGING_H_
